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
    """Return whether the device is lost, so that it can compute nothing any more."""
    return isinstance(error, DeviceError) and not isinstance(error, OutOfMemory)


def typed(error: Exception, what: str) -> SpilldError:
    """Return the error that a client receives; the traceback of a bug goes to the log.

    Args:
        error: The error that was raised.
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
    """Log an error that is raised within the context, in work of no request that is tried again later.

    Args:
        what: What has failed, to begin the message with.

    Raises:
        DeviceError: The device is lost.
    """
    try:
        yield
    except Exception as error:
        if is_lost(error):
            raise
        expected = isinstance(error, OSError | OffloadError | SpilldError)
        log.error("%s: %s", what, error, exc_info=None if expected else error)
