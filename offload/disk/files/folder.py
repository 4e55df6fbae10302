"""The folder of the disk tier: its lock, the files in it, and what its file system can do."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
from pathlib import Path

import numpy as np

from spilld.offload.errors import FolderInUse, FolderUnusable
from spilld.offload.system import (
    PAGE,
    SystemCalls,
    page_aligned,
    read_fully,
    write_fully,
)

log = logging.getLogger(__name__)

_SEGMENT_NAME = re.compile(r"\d{8}\.segment")


class StoreFolder:
    """A folder of mode 0700 that one process locks until close.

    direct: O_DIRECT works here.
    """

    def __init__(self, path: Path, system: SystemCalls) -> None:
        """Make the folder if it is missing, lock it, and probe its file system.

        Raises:
            FolderInUse: Another daemon holds the folder.
            FolderUnusable: Its parent is missing, or it cannot be written.
        """
        self.path = path
        self._system = system
        self._lock = _lock(path)
        try:
            self.direct = self._probe()
        except OSError as error:
            os.close(self._lock)
            raise FolderUnusable(f"{path}: {error}") from error

    def segment(self, number: int) -> Path:
        """Return the path of a segment file."""
        return self.path / f"{number:08}.segment"

    def segments(self) -> dict[int, Path]:
        """Return the segment files that are in the folder now, by their numbers."""
        names = {path.name: path for path in self.path.iterdir()}
        return {int(name[:8]): path for name, path in names.items() if _SEGMENT_NAME.fullmatch(name)}

    @property
    def flags(self) -> int:
        """Flags for opening segments, beside the access mode."""
        return os.O_DIRECT if self.direct else 0

    @property
    def index(self) -> Path:
        """Path of the index."""
        return self.path / "index.sqlite"

    def close(self) -> None:
        """Unlock the folder."""
        os.close(self._lock)

    def _probe(self) -> bool:
        """Return whether O_DIRECT works here, by writing a page and reading it back."""
        if self._round_trip(os.O_DIRECT):
            return True
        log.warning("%s: no O_DIRECT here, the page cache will hold copies of what is read", self.path)
        if not self._round_trip(0):
            raise OSError(errno.EIO, "a page read back differs from what was written")
        return False

    def _round_trip(self, flags: int) -> bool:
        path = self.path / "probe.scratch"
        page, back = page_aligned(PAGE), page_aligned(PAGE)
        page[:] = np.arange(PAGE) % 251
        try:
            file = self._system.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | flags)
            try:
                write_fully(self._system, file, page, 0)
                read_fully(self._system, file, back, 0)
            finally:
                self._system.close(file)
        except OSError as error:
            if not flags or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return False
        finally:
            path.unlink(missing_ok=True)
        return bool((page == back).all())


def _lock(path: Path) -> int:
    """Return a descriptor of the folder's lock file; the kernel drops the lock with the process."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise FolderUnusable(f"{path}: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise FolderInUse(f"{path} is in use by another daemon") from error
        raise FolderUnusable(f"{path}: {error}") from error
    return lock
