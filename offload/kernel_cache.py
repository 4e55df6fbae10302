"""numba's cache on disk, made safe for processes that compile at the same time.

numba writes a kernel into a function's index, then its machine code into a file, and locks neither. Of two
processes that compile two kernels of one function, both may choose the same file: the index then names one
and the file has the other, and whoever loads it runs code for other shapes, over memory that is not its own.
Here each holds a lock on the function's index meanwhile.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from numba.core.caching import IndexDataCacheFile


@contextmanager
def _locked(path: str, how: int) -> Iterator[None]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:  # nobody writes here, then
        yield
        return
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _guarded(method: Callable[..., Any], how: int) -> Callable[..., Any]:
    @wraps(method)
    def guarded(self: Any, *arguments: Any) -> Any:
        with _locked(f"{self._index_path}.lock", how):
            return method(self, *arguments)

    return guarded


def guard() -> None:
    """Have numba hold the locks, in this process, from now on. To be called once."""
    IndexDataCacheFile.save = _guarded(IndexDataCacheFile.save, fcntl.LOCK_EX)
    IndexDataCacheFile.load = _guarded(IndexDataCacheFile.load, fcntl.LOCK_SH)
    IndexDataCacheFile.flush = _guarded(IndexDataCacheFile.flush, fcntl.LOCK_EX)
