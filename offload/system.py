"""The seam to the operating system: calls that tests can make fail, and loops that finish what they begin."""

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
    """Private anonymous memory, uint8[nbytes]: zero, page-aligned, backed by pages only once touched.

    huge asks the kernel for 2 MiB pages; it may decline, and memory then grows in steps of 4 KiB.
    """
    memory = mmap.mmap(-1, round_up(nbytes, PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)[:nbytes]


def give_back(memory: Bytes, start: int, stop: int) -> None:
    """Let the kernel have the whole pages within bytes [start, stop) of page_aligned memory: they read as
    zeros from now on, and are backed again once touched.
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
    """What the disk tier asks of the kernel. Each raises OSError as `os` does."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def close(self, file: int) -> None:
        os.close(file)

    def preadv(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(file, buffers, offset)

    def pwritev(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(file, buffers, offset)

    def fdatasync(self, file: int) -> None:
        os.fdatasync(file)

    def fsync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def ftruncate(self, file: int, nbytes: int) -> None:
        os.ftruncate(file, nbytes)

    def free_bytes(self, folder: Path) -> int:
        """What its file system has left for such as us."""
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)


def read_fully(system: SystemCalls, file: int, buffer: Bytes, offset: int) -> int:
    """Fill the buffer from the file; returns the bytes read, fewer than len(buffer) only at its end.

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
    """Write the whole buffer. Raises OSError; what lies in the file is then undefined."""
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
