"""Bookkeeping of space in segment files: where runs lie, and how long each file is. No system calls."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from spilld.offload.errors import TierFull
from spilld.offload.record import round_up
from spilld.offload.system import PAGE

from .min_set import MinSet

SEGMENT_BYTES = 256 << 20
"""A segment file grows no longer than this, unless a single run is larger."""


@dataclass(frozen=True)
class Range:
    """Bytes [offset, offset + nbytes) of a segment file; both are multiples of 4096."""

    segment: int
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """Where the range ends in the file."""
        return self.offset + self.nbytes


@dataclass
class _Segment:
    """A file of places for ranges of one size, numbered from 0.

    Attributes:
        unit: Bytes of every range in it, while it has one: a hole fits the next range, whatever is evicted.
        nbytes: Length of the file, more than what its places take where it could not be shortened.
        stop: One more than the last taken place; 0 if none is.
        holes: The free places below `stop`.
    """

    unit: int
    nbytes: int = 0
    stop: int = 0
    holes: MinSet = field(default_factory=MinSet)

    @property
    def used(self) -> int:
        """Bytes up to the end of the last range: the length to which the file can be shortened."""
        return self.stop * self.unit

    @property
    def taken(self) -> int:
        """Number of ranges."""
        return self.stop - len(self.holes)


class _SizeClass:
    """Segments with ranges of one size, in the orders in which they are searched: (ranges, segment)."""

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.all: list[tuple[int, int]] = []
        self.with_holes: list[tuple[int, int]] = []
        self.growable = MinSet()

    def add(self, number: int, segment: _Segment, *, growable: bool) -> None:
        """Add a segment."""
        insort(self.all, (segment.taken, number))
        if segment.holes:
            insort(self.with_holes, (segment.taken, number))
        if growable:
            self.growable.add(number)

    def remove(self, number: int, segment: _Segment) -> None:
        """Remove a segment; to be called before the segment changes."""
        key = segment.taken, number
        del self.all[bisect_left(self.all, key)]
        if segment.holes:
            del self.with_holes[bisect_left(self.with_holes, key)]
        self.growable.discard(number)

    def sources(self) -> Iterator[tuple[int, int, _SizeClass]]:
        """Yield (bytes taken, segment, self), the emptiest first, up to the fullest segment with a hole."""
        stop = bisect_left(self.all, self.with_holes[-1]) + 1 if self.with_holes else 0
        for i in range(stop):
            taken, number = self.all[i]
            yield taken * self.unit, number, self


class SegmentSpace:
    """Ranges of segment files, each file for ranges of one size: first a hole, else the end of a file.

    used_bytes, the sum of the file lengths, never exceeds budget_bytes. Changes of a file's length are
    two steps, so that the caller can make the system call in between: find, grow the file, take; and
    give_back, look at spare, shorten the file, cut. A file that could not be shortened stays counted. No
    operation looks at all files or ranges.
    """

    def __init__(self, budget_bytes: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self.segment_bytes = segment_bytes
        self.used_bytes = 0
        self.taken_bytes = 0
        self._segments: dict[int, _Segment] = {}
        self._classes: dict[int, _SizeClass] = {}
        self._uncut: dict[int, None] = {}
        """Segments whose files are longer than what their places take, in the order in which that began."""
        self._next = 0

    def sizes(self) -> dict[int, int]:
        """Return the length of every segment file in bytes."""
        return {number: segment.nbytes for number, segment in self._segments.items()}

    def size(self, number: int) -> int:
        """Return the length of a segment file in bytes; 0 if there is none."""
        return self._segments[number].nbytes if number in self._segments else 0

    @property
    def hole_bytes(self) -> int:
        """Bytes of the files in which no range lies."""
        return self.used_bytes - self.taken_bytes

    def uncut(self) -> list[int]:
        """Return the segments that can be shortened."""
        return list(self._uncut)

    def last(self, number: int) -> Range:
        """Return the last range of a segment that has one."""
        segment = self._segments[number]
        return Range(number, segment.used - segment.unit, segment.unit)

    def moves(self) -> Iterator[tuple[int, Range]]:
        """Yield (segment, hole) pairs: moving the segment's last range there shortens it and lengthens none.

        The emptiest segments come first, and the holes of the fullest; changes nothing.
        """
        for _, number, alike in heapq.merge(
            *(alike.sources() for alike in list(self._classes.values())), key=lambda source: source[:2]
        ):
            yield number, self._hole(alike)

    def adopt(self, number: int, taken: Sequence[Range]) -> None:
        """Add a segment that was there before, whose file ends with the last of its ranges.

        It may exceed the budget; then space has to be freed before the next find.

        Args:
            number: The segment's.
            taken: Disjoint ranges of one size, at least one, each at a multiple of that size.
        """
        segment = _Segment(taken[0].nbytes)
        slots = {place.offset // segment.unit for place in taken}
        segment.stop = max(slots) + 1
        for slot in range(segment.stop):
            if slot not in slots:
                segment.holes.add(slot)
        segment.nbytes = segment.used
        self.used_bytes += segment.nbytes
        self.taken_bytes += segment.taken * segment.unit
        self._segments[number] = segment
        self._file(number)
        self._next = max(self._next, number + 1)

    def find(self, nbytes: int) -> Range:
        """Return a free range for nbytes, rounded up to 4096; changes nothing.

        Raises:
            TierFull: The budget leaves no room.
        """
        nbytes = round_up(nbytes, PAGE)
        if nbytes < PAGE:
            raise ValueError("an empty range has no place")
        room = self.budget_bytes - self.used_bytes
        alike = self._classes.get(nbytes)
        if alike is not None and alike.with_holes:
            return self._hole(alike)
        for number in self._uncut:
            end = self._end(number, nbytes)
            if end is not None and end - self._segments[number].nbytes <= room:
                return Range(number, end - nbytes, nbytes)
        if nbytes > room:
            raise TierFull(
                f"the disk tier has no room for {nbytes} bytes, {room} of {self.budget_bytes} are left"
            )
        growable = None if alike is None else alike.growable.smallest()
        if growable is not None:
            return Range(growable, self._segments[growable].used, nbytes)
        return Range(self._next, 0, nbytes)

    def take(self, place: Range) -> None:
        """Occupy a range that find returned. The file, which must be as long as place.end by now, may be new.

        Raises:
            ValueError: The range is not free, or does not fit the budget.
        """
        segment = self._segments.get(place.segment) or _Segment(place.nbytes)
        slot, rest = divmod(place.offset, place.nbytes)
        alike = segment.unit == place.nbytes or not segment.stop
        if rest or not alike or not (slot == segment.stop or slot in segment.holes):
            raise ValueError(f"{place} is not free")
        growth = max(0, place.end - segment.nbytes)
        if self.used_bytes + growth > self.budget_bytes:
            raise ValueError(f"{place} does not fit the budget")
        self._segments[place.segment] = segment
        self._unfile(place.segment)
        segment.unit = place.nbytes
        segment.holes.discard(slot)
        segment.stop = max(segment.stop, slot + 1)
        segment.nbytes += growth
        self.used_bytes += growth
        self.taken_bytes += place.nbytes
        self._file(place.segment)
        self._next = max(self._next, place.segment + 1)

    def give_back(self, place: Range) -> None:
        """Free a range that was taken.

        Raises:
            ValueError: Part of it is free, or it lies in no segment; nothing has changed.
        """
        segment = self._segments.get(place.segment)
        if segment is None or place.end > segment.nbytes:
            raise ValueError(f"{place} lies in no segment")
        slot, rest = divmod(place.offset, segment.unit)
        if rest or segment.unit != place.nbytes or slot >= segment.stop or slot in segment.holes:
            raise ValueError(f"{place} is freed twice")
        self._unfile(place.segment)
        segment.holes.add(slot)
        while segment.stop and segment.stop - 1 in segment.holes:
            segment.stop -= 1
            segment.holes.discard(segment.stop)
        self.taken_bytes -= place.nbytes
        self._file(place.segment)

    def spare(self, number: int) -> int:
        """Return the length to which a segment can be shortened; 0 means that its file can be unlinked."""
        return self._segments[number].used

    def cut(self, number: int) -> None:
        """Note that the file was shortened to spare(number), or unlinked if that is 0."""
        segment = self._segments[number]
        self.used_bytes -= segment.nbytes - segment.used
        segment.nbytes = segment.used
        self._uncut.pop(number, None)
        if not segment.stop:
            del self._segments[number]

    def check_integrity(self, taken: list[Range]) -> None:
        """Check that free and taken ranges partition every file, and that the files fit the budget."""
        assert self.used_bytes <= self.budget_bytes, "the segments are larger than the budget"
        assert self.used_bytes == sum(s.nbytes for s in self._segments.values()), "used_bytes is wrong"
        assert self.taken_bytes == sum(place.nbytes for place in taken), "taken_bytes is wrong"
        slots: dict[int, list[int]] = {number: [] for number in self._segments}
        for place in taken:
            assert place.segment in self._segments, f"{place} lies in no segment"
            segment = self._segments[place.segment]
            assert place.nbytes == segment.unit, f"{place} has another size than its segment"
            assert place.offset % segment.unit == 0, f"{place} is not where a place begins"
            slots[place.segment].append(place.offset // segment.unit)
        for number, segment in self._segments.items():
            free = [slot for slot in range(segment.stop) if slot in segment.holes]
            assert sorted(slots[number] + free) == list(range(segment.stop)), (
                f"the places of segment {number} are inconsistent"
            )
            assert len(free) == len(segment.holes), f"segment {number} has holes beyond its end"
            assert segment.unit % PAGE == 0, f"segment {number} has unaligned ranges"
            assert segment.used <= segment.nbytes, f"segment {number} ends in a range"
            assert (segment.used < segment.nbytes) == (number in self._uncut), (
                f"segment {number} is miscounted"
            )
        filed = {number for alike in self._classes.values() for _, number in alike.all}
        assert filed == {n for n, s in self._segments.items() if s.stop}, "a segment is misfiled"

    def _hole(self, alike: _SizeClass) -> Range:
        """Return the first hole of the fullest segment that has one."""
        number = alike.with_holes[-1][1]
        slot = self._segments[number].holes.smallest()
        assert slot is not None, "it has a hole"
        return Range(number, slot * alike.unit, alike.unit)

    def _end(self, number: int, nbytes: int) -> int | None:
        """Return where a segment would end with one more range of this size at its end, if it takes one."""
        segment = self._segments[number]
        end = segment.used + nbytes
        alike = segment.unit == nbytes or not segment.stop
        return end if alike and end <= max(self.segment_bytes, segment.nbytes) else None

    def _unfile(self, number: int) -> None:
        segment = self._segments[number]
        if segment.stop:
            alike = self._classes[segment.unit]
            alike.remove(number, segment)
            if not alike.all:
                del self._classes[segment.unit]

    def _file(self, number: int) -> None:
        """Enter a segment, after a change, in the orders in which it is searched."""
        segment = self._segments[number]
        if segment.stop:
            alike = self._classes.setdefault(segment.unit, _SizeClass(segment.unit))
            growable = self._end(number, segment.unit) is not None
            alike.add(number, segment, growable=growable)
        if segment.used < segment.nbytes:
            self._uncut[number] = None
        else:
            self._uncut.pop(number, None)
