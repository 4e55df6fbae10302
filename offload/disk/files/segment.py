"""Space in segment files: where runs lie, and how long each file is. Bookkeeping only, no system calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from spilld.offload.errors import TierFull
from spilld.offload.record import round_up
from spilld.offload.system import PAGE

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
        return self.offset + self.nbytes


@dataclass
class _Segment:
    unit: int
    """Bytes of every range in it, while it has one: a hole fits the next range, whatever is evicted."""
    nbytes: int = 0
    free: list[tuple[int, int]] = field(default_factory=list)
    """(offset, end), ascending, neither empty nor touching one another."""

    @property
    def tail(self) -> int:
        """Where the free bytes at the end of the file begin; its length if there are none."""
        return self.free[-1][0] if self.free and self.free[-1][1] == self.nbytes else self.nbytes

    @property
    def taken(self) -> int:
        return self.nbytes - sum(end - offset for offset, end in self.free)

    def gap(self) -> int | None:
        """Where the first hole begins that has room for a range and lies before one."""
        tail, unit = self.tail, self.unit
        return next((offset for offset, end in self.free if end - offset >= unit and end <= tail), None)


class SegmentSpace:
    """Ranges of segment files, each file for ranges of one size: first a hole, else the end of a file.

    used_bytes, the sum of the file lengths, never exceeds budget_bytes. Changes of a file's length are
    two steps, so that the caller can let the system call come between: find, grow the file, take; and
    give_back, look at spare, shorten the file, cut. A file that could not be shortened stays counted.
    """

    def __init__(self, budget_bytes: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self.segment_bytes = segment_bytes
        self.used_bytes = 0
        self._segments: dict[int, _Segment] = {}
        self._next = 0

    def sizes(self) -> dict[int, int]:
        """Length of every segment file in bytes."""
        return {number: segment.nbytes for number, segment in self._segments.items()}

    @property
    def hole_bytes(self) -> int:
        """Bytes of the files in which no range lies."""
        return self.used_bytes - sum(segment.taken for segment in list(self._segments.values()))

    def moves(self) -> Iterator[tuple[int, Range]]:
        """(segment, hole): were its last range in this hole instead, the segment would be shorter and none
        longer. The emptiest segments come first, and the holes of the fullest; changes nothing."""
        used = [number for number, segment in self._segments.items() if segment.taken]
        emptiest = sorted(used, key=lambda number: (self._segments[number].taken, number))
        for i, number in enumerate(emptiest):
            unit = self._segments[number].unit
            for other in reversed(emptiest[i:]):
                segment = self._segments[other]
                if segment.unit == unit and (offset := segment.gap()) is not None:
                    yield number, Range(other, offset, unit)
                    break

    def adopt(self, number: int, taken: Sequence[Range]) -> None:
        """A segment that was there before: its file ends with the last of these disjoint ranges, of which
        there is at least one. It may exceed the budget, which must be mended before the next find."""
        segment = self._segments[number] = _Segment(taken[0].nbytes)
        at = 0
        for place in sorted(taken, key=lambda place: place.offset):
            if place.offset > at:
                segment.free.append((at, place.offset))
            at = place.end
        segment.nbytes = at
        self.used_bytes += at
        self._next = max(self._next, number + 1)

    def find(self, nbytes: int) -> Range:
        """A range for nbytes, rounded up to 4096; changes nothing. Raises TierFull."""
        nbytes = round_up(nbytes, PAGE)
        if nbytes < PAGE:
            raise ValueError("an empty range has no place")
        alike = [(n, s) for n, s in self._segments.items() if s.unit == nbytes or s.tail == 0]
        for number, segment in alike:
            for offset, end in segment.free:
                if end - offset >= nbytes:
                    return Range(number, offset, nbytes)
        room = self.budget_bytes - self.used_bytes
        for number, segment in alike:
            end = segment.tail + nbytes
            if end <= self.segment_bytes and end - segment.nbytes <= room:
                return Range(number, segment.tail, nbytes)
        if nbytes > room:
            raise TierFull(f"{nbytes} bytes asked of the disk tier, {room} of {self.budget_bytes} are left")
        return Range(self._next, 0, nbytes)

    def take(self, place: Range) -> None:
        """Occupy what find returned. The file, which must be as long as place.end by now, may be new."""
        segment = self._segments.setdefault(place.segment, _Segment(place.nbytes))
        if segment.tail == 0:
            segment.unit = place.nbytes
        self._next = max(self._next, place.segment + 1)
        if place.end > segment.nbytes:
            growth = place.end - segment.nbytes
            if self.used_bytes + growth > self.budget_bytes:
                raise ValueError(f"{place} does not fit the budget")
            self._release(segment, segment.nbytes, place.end)
            segment.nbytes = place.end
            self.used_bytes += growth
        for i, (offset, end) in enumerate(segment.free):
            if offset <= place.offset and place.end <= end:
                rest = [(offset, place.offset), (place.end, end)]
                segment.free[i : i + 1] = [(a, b) for a, b in rest if a < b]
                return
        raise ValueError(f"{place} is not free")

    def give_back(self, place: Range) -> None:
        """Free a range that was taken. Raises ValueError, changing nothing, if part of it is free."""
        segment = self._segments.get(place.segment)
        if segment is None or place.end > segment.nbytes:
            raise ValueError(f"{place} lies in no segment")
        if any(offset < place.end and place.offset < end for offset, end in segment.free):
            raise ValueError(f"{place} is freed twice")
        self._release(segment, place.offset, place.end)

    def spare(self, number: int) -> int:
        """The length to which a segment can be shortened; 0 means that its file can go."""
        return self._segments[number].tail

    def cut(self, number: int) -> None:
        """The file was shortened to spare(number), or unlinked if that is 0."""
        segment = self._segments[number]
        tail = segment.tail
        if tail < segment.nbytes:
            segment.free.pop()
            self.used_bytes -= segment.nbytes - tail
            segment.nbytes = tail
        if tail == 0:
            del self._segments[number]

    def check_integrity(self, taken: list[Range]) -> None:
        """Free and taken ranges partition every file, and the files fit the budget."""
        assert self.used_bytes <= self.budget_bytes, "the segments are larger than the budget"
        assert self.used_bytes == sum(s.nbytes for s in self._segments.values()), "used_bytes is wrong"
        for place in taken:
            assert place.segment in self._segments, f"{place} lies in no segment"
        for number, segment in self._segments.items():
            for (_, end), (offset, _) in zip(segment.free, segment.free[1:], strict=False):
                assert end < offset, f"holes of segment {number} are not coalesced"
            held = [(p.offset, p.end) for p in taken if p.segment == number]
            at = 0
            for offset, end in sorted(held + segment.free):
                assert offset == at, f"segment {number} has a gap or an overlap at {at}"
                assert offset < end, f"segment {number} has an empty range at {at}"
                assert offset % PAGE == 0, f"segment {number} has an unaligned range at {offset}"
                at = end
            assert at == segment.nbytes, f"segment {number} ends at {at}, not at {segment.nbytes}"

    @staticmethod
    def _release(segment: _Segment, offset: int, end: int) -> None:
        holes = sorted([*segment.free, (offset, end)])
        merged = holes[:1]
        for a, b in holes[1:]:
            if a == merged[-1][1]:
                merged[-1] = (merged[-1][0], b)
            else:
                merged.append((a, b))
        segment.free = merged
