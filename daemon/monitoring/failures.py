"""What an exception that nobody expected is to the request in which it came."""

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
    """Whether it says that the device computes nothing any more, for anybody."""
    return isinstance(error, DeviceError) and not isinstance(error, OutOfMemory)


def typed(error: Exception, what: str) -> SpilldError:
    """The error that a client is told. what has failed; a bug's traceback goes to the log."""
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
    """Work that is nobody's request: what goes wrong is logged, and done again another time. A lost device is
    raised."""
    try:
        yield
    except Exception as error:
        if is_lost(error):
            raise
        expected = isinstance(error, OSError | OffloadError | SpilldError)
        log.error("%s: %s", what, error, exc_info=None if expected else error)
