"""Makes numba's cache on disk safe for processes that compile at the same time.

Numba writes a kernel into a function's index, then its machine code into a file, and locks neither. Of two
processes that compile two kernels of one function, both may choose the same file: the index then names one
and the file has the other, and a process that loads it runs code for other shapes, over memory that is not
its own. Here each process locks the function's index meanwhile.

Numba names compiled functions by a counter that starts from 1 in every process: kernels of one function that
two processes compiled may have parts of the same name, and a third process that loads both calls the parts of
one from the other. Here each process starts the counter at a random number.

Two processes would also both compile the same kernel. Here the second waits for the first, and loads it.

Numba compiles a kernel again when the file that it is in has changed. Here it does so, too, when a file that
the kernel may have inlined has changed, so that an update does not go on with the old machine code.

Importing this module is enough; every module that decorates a cached kernel imports it first.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, wraps
from hashlib import sha256
from pathlib import Path
from typing import Any

from numba.core.bytecode import FunctionIdentity
from numba.core.caching import IndexDataCacheFile, NullCache, _SourceFileBackedLocatorMixin
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher
from numba.core.sigutils import normalize_signature

PATIENCE_S = 60.0
"""Longest wait for the compiler of another process, which may hang; then a kernel is compiled here, too."""

LOOK_S = 0.02

KERNELS = Path(__file__).parent
"""Kernels in this folder inline functions of this folder; those elsewhere inline none."""

CONSTANTS = KERNELS.parent / "record.py"
"""The module whose constants are compiled into kernels."""


@cache
def sources(folder: Path = KERNELS, *others: Path) -> bytes:
    """Return a hash of all modules of a folder, and of other files."""
    digest = sha256()
    for path in (*sorted(folder.rglob("*.py")), *others):
        digest.update(sha256(path.read_bytes()).digest())
    return digest.digest()


def _whole(stamp: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stamp)
    def whole(self: Any) -> Any:
        inlines = KERNELS in Path(self._py_file).parents
        return (stamp(self), sources(KERNELS, CONSTANTS)) if inlines else stamp(self)

    return whole


@contextmanager
def _opened(path: str) -> Iterator[int | None]:
    """Open a file for locks; gives None where it cannot be opened."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _guarded(method: Callable[..., Any], how: int) -> Callable[..., Any]:
    @wraps(method)
    def guarded(self: Any, *arguments: Any) -> Any:
        with _opened(f"{self._index_path}.lock") as lock:
            if lock is not None:
                with suppress(OSError):  # the file system has no locks
                    fcntl.flock(lock, how)
            return method(self, *arguments)

    return guarded


def _once(compile_kernel: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(compile_kernel)
    def once(self: Any, signature: Any) -> Any:
        # numba's lock comes first: with a kernel's lock held, another thread could wait for it forever.
        with global_compiler_lock:
            kinds = tuple(normalize_signature(signature)[0])
            if kinds in self.overloads or isinstance(self._cache, NullCache):
                return compile_kernel(self, signature)
            key = self._cache._index_key(signature, self.targetctx.codegen())
            # A separate file: on NFS, locks of whole files and locks of bytes exclude each other.
            with _opened(f"{self._cache._cache_file._index_path}.once") as lock:
                if lock is not None:
                    _wait(lock, key)
                return compile_kernel(self, signature)

    return once


def _wait(lock: int, key: object) -> None:
    """Lock a kernel's byte of a file, unless that takes longer than PATIENCE_S."""
    place = int.from_bytes(sha256(repr(key).encode()).digest()[:7])
    request = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            fcntl.fcntl(lock, fcntl.F_OFD_SETLK, request)
        except BlockingIOError:
            time.sleep(LOOK_S)
        except OSError:  # the file system has no locks
            return
        else:
            return


FunctionIdentity._unique_ids = itertools.count(secrets.randbits(62))
IndexDataCacheFile.save = _guarded(IndexDataCacheFile.save, fcntl.LOCK_EX)
IndexDataCacheFile.load = _guarded(IndexDataCacheFile.load, fcntl.LOCK_SH)
IndexDataCacheFile.flush = _guarded(IndexDataCacheFile.flush, fcntl.LOCK_EX)
Dispatcher.compile = _once(Dispatcher.compile)  # type: ignore[method-assign]
_SourceFileBackedLocatorMixin.get_source_stamp = _whole(_SourceFileBackedLocatorMixin.get_source_stamp)
