"""System calls that tests can make fail, and loops that complete partial reads and writes."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .record import round_up

PAGE = 4096
"""Alignment in bytes of memory, file offsets and lengths, so that O_DIRECT accepts them."""

Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]
"""Places of records in the host slab."""


def page_aligned(nbytes: int, *, huge: bool = False) -> Bytes:
    """Return private anonymous memory, uint8 [nbytes]: zero, page-aligned, backed by pages only once touched.

    Args:
        nbytes: How many bytes there are.
        huge: Whether to ask the kernel for 2 MiB pages; it may decline, and memory then grows in steps of
            4 KiB.
    """
    memory = mmap.mmap(-1, round_up(nbytes, PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)[:nbytes]


def give_back(memory: Bytes, start: int, stop: int) -> None:
    """Return the whole pages within bytes [start, stop) of page_aligned memory to the kernel.

    They read as zeros from now on, and are backed again once touched.
    """
    first, last = round_up(start, PAGE), stop // PAGE * PAGE
    if first < last:
        mapping: object = memory
        while isinstance(mapping, np.ndarray):
            mapping = mapping.base
        assert isinstance(mapping, memoryview), "not page_aligned memory"
        assert isinstance(mapping.obj, mmap.mmap), "not page_aligned memory"
        mapping.obj.madvise(mmap.MADV_DONTNEED, first, last - first)


class SystemCalls:
    """The disk tier's system calls. Each raises OSError as `os` does."""

    def open(self, path: Path, flags: int) -> int:
        """Open a file, with mode 0600 if it is made; links are not followed."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def close(self, file: int) -> None:
        """See os.close."""
        os.close(file)

    def preadv(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        """See os.preadv."""
        return os.preadv(file, buffers, offset)

    def pwritev(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        """See os.pwritev."""
        return os.pwritev(file, buffers, offset)

    def fdatasync(self, file: int) -> None:
        """See os.fdatasync."""
        os.fdatasync(file)

    def fsync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def ftruncate(self, file: int, nbytes: int) -> None:
        """See os.ftruncate."""
        os.ftruncate(file, nbytes)

    def free_bytes(self, folder: Path) -> int:
        """Return how many bytes the folder's file system has left for unprivileged users."""
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize

    def unlink(self, path: Path) -> None:
        """Remove a file, if it exists."""
        path.unlink(missing_ok=True)


def read_fully(system: SystemCalls, file: int, buffer: Bytes, offset: int) -> int:
    """Fill the buffer from the file and return the bytes read, fewer than len(buffer) only at the file's end.

    A short read is resumed at the page it stopped in, because O_DIRECT refuses any other offset.
    """
    done = 0
    while done < len(buffer):
        start = done - done % PAGE
        try:
            count = system.preadv(file, [buffer[start:].data], offset + start)
        except InterruptedError:
            continue
        if start + count <= done:
            return done
        done = start + count
    return done


def write_fully(system: SystemCalls, file: int, buffer: Bytes, offset: int) -> None:
    """Write the whole buffer.

    Raises:
        OSError: The file does not take it; what lies in the file is then undefined.
    """
    done = 0
    while done < len(buffer):
        start = done - done % PAGE
        try:
            count = system.pwritev(file, [buffer[start:].data], offset + start)
        except InterruptedError:
            continue
        if start + count <= done:
            raise OSError(errno.EIO, "the file takes no more bytes")
        done = start + count
