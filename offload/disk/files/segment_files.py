"""Segment files: their descriptors, and their lengths, which follow the ranges in them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spilld.offload.errors import TierFull
from spilld.offload.system import SystemCalls

from .folder import StoreFolder
from .segment import Range, SegmentSpace

log = logging.getLogger(__name__)


@dataclass(eq=False)
class SegmentFile:
    """An open segment file.

    Attributes:
        descriptor: The file's descriptor.
        durable_name: Whether its name in the folder outlives a power cut.
        holds: Leases of places in it.
    """

    descriptor: int
    durable_name: bool = False
    holds: int = 0


class SegmentFiles:
    """Space in the segment files of one folder.

    A file has its new length before anything is written into it, and is shortened as soon as its end is free;
    one that the file system does not shorten stays counted.
    """

    def __init__(
        self, folder: StoreFolder, system: SystemCalls, space: SegmentSpace, floor_bytes: int
    ) -> None:
        """Begin without files.

        Args:
            folder: Where the files are.
            system: The calls to the kernel.
            space: The bookkeeping of ranges.
            floor_bytes: What the file system must have left after each growth of a file.
        """
        self.space = space
        self.floor_bytes = floor_bytes
        self._folder = folder
        self._system = system
        self._files: dict[int, SegmentFile] = {}

    def __getitem__(self, number: int) -> SegmentFile:
        return self._files[number]

    def __len__(self) -> int:
        """Number of open files."""
        return len(self._files)

    def adopt(self, number: int, path: Path, taken: Sequence[Range]) -> None:
        """Open a file that was there before and cut it off behind these ranges; without any, unlink it.

        Raises:
            OSError: A system call failed.
        """
        if not taken:
            self._system.unlink(path)
            return
        file = self._system.open(path, os.O_RDWR | self._folder.flags)
        self._files[number] = SegmentFile(file, durable_name=True)
        self.space.adopt(number, taken)
        self._system.ftruncate(file, self.space.size(number))

    def allocate(self, nbytes: int) -> tuple[Range, SegmentFile]:
        """Take a range, in a file that is long enough for it. On an error nothing has changed.

        Raises:
            TierFull: The budget or the floor leaves no room.
            OSError: The file cannot be made or grown.
        """
        found = self.space.find(nbytes)
        self._respect_floor(found)
        file = self._grow(found)
        self.space.take(found)
        return found, file

    def free(self, place: Range) -> None:
        """Give a range back, and shorten files where that is possible."""
        self.space.give_back(place)
        self.trim()

    def trim(self) -> None:
        """Cut off the free ends of files, also those that could not be cut off before."""
        for number in self.space.uncut():
            spare = self.space.spare(number)
            try:
                if spare:
                    self._system.ftruncate(self._files[number].descriptor, spare)
                else:
                    self._system.unlink(self._folder.segment(number))
            except OSError as error:
                log.warning(
                    "%s: cannot shorten segment %d, its space stays counted: %s",
                    *(self._folder.path, number, error),
                )
                continue
            self.space.cut(number)
            if not spare:
                self._close(self._files.pop(number).descriptor)

    def close(self) -> int:
        """Close the files without leases and return how many stay open."""
        self.trim()
        for number, file in list(self._files.items()):
            if not file.holds:
                self.close_file(number)
        return len(self._files)

    def close_file(self, number: int) -> None:
        """Close one file."""
        self._close(self._files.pop(number).descriptor)

    def check_integrity(self, taken: list[Range]) -> None:
        """Check that ranges partition the segments, and that the files have the lengths on record."""
        self.space.check_integrity(taken)
        sizes = {self._folder.segment(number): size for number, size in self.space.sizes().items()}
        found = {path: path.stat().st_size for path in self._folder.segments().values()}
        assert found == sizes, f"the folder holds {found}, {sizes} are on record"
        assert self._files.keys() == self.space.sizes().keys(), "a segment has no open file"

    def _respect_floor(self, found: Range) -> None:
        """Raise TierFull if the growth that a range needs would leave less than the floor."""
        growth = found.end - self.space.size(found.segment)
        if growth > 0 and self.floor_bytes:
            left = self._system.free_bytes(self._folder.path) - growth
            if left < self.floor_bytes:
                raise TierFull(
                    f"{growth} bytes more would leave {left} bytes free; {self.floor_bytes} must be"
                )

    def _grow(self, found: Range) -> SegmentFile:
        """Return the file of a range, long enough for it. On OSError file and folder are as before."""
        file = self._files.get(found.segment)
        if file is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | self._folder.flags
            file = SegmentFile(self._system.open(self._folder.segment(found.segment), flags))
            try:
                self._system.ftruncate(file.descriptor, found.end)
            except OSError:
                self._close(file.descriptor)
                self._unlink(found.segment)
                raise
            self._files[found.segment] = file
        elif found.end > self.space.size(found.segment):
            self._system.ftruncate(file.descriptor, found.end)
        return file

    def _close(self, descriptor: int) -> None:
        """Close a descriptor, which is gone even if a failed disk reports an error here."""
        try:
            self._system.close(descriptor)
        except OSError as error:
            log.warning("%s: cannot close a segment: %s", self._folder.path, error)

    def _unlink(self, number: int) -> None:
        try:
            self._system.unlink(self._folder.segment(number))
        except OSError as error:
            log.warning("%s: cannot remove segment %d: %s", self._folder.path, number, error)
