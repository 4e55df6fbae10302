"""Turns unexpected exceptions into typed errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from spilld.cuda_ext.errors import DeviceError, OutOfMemory
from spilld.errors import (
    InternalError,
    Overloaded,
    SpilldError,
    StorageFailed,
)
from spilld.offload.errors import OffloadError

log = logging.getLogger(__name__)


def is_lost(error: Exception) -> bool:
    """Whether the device is lost: it computes nothing any more."""
    return isinstance(error, DeviceError) and not isinstance(error, OutOfMemory)


def typed(error: Exception, what: str) -> SpilldError:
    """The error that a client is told; the traceback of a bug goes to the log.

    Args:
        error: What was raised.
        what: What has failed, to begin the message with.
    """
    match error:
        case SpilldError():
            return error
        case OutOfMemory():
            return Overloaded(f"{what}: the device has no memory: {error}")
        case OSError() | OffloadError():
            return StorageFailed(f"{what}: {error}")
    log.error("%s", what, exc_info=error)
    return InternalError(f"{what}: {error!r}; the daemon's log says where")


@contextmanager
def logged(what: str) -> Iterator[None]:
    """Log what goes wrong inside, in work that belongs to no request and is tried again later. A lost device
    is raised.

    Args:
        what: What has failed, to begin the message with.
    """
    try:
        yield
    except Exception as error:
        if is_lost(error):
            raise
        expected = isinstance(error, OSError | OffloadError | SpilldError)
        log.error("%s: %s", what, error, exc_info=None if expected else error)
