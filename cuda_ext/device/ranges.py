"""Bookkeeping of address ranges in use: disjoint ranges, each known by its start."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator


class AddressRanges:
    """Disjoint ranges [start, start + nbytes)."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._bytes: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(start, nbytes), the lowest first."""
        return ((start, self._bytes[start]) for start in self._starts)

    @property
    def nbytes(self) -> int:
        """Sum of the ranges' bytes."""
        return sum(self._bytes.values())

    def add(self, start: int, nbytes: int) -> None:
        """Add a range.

        Raises:
            ValueError: It is empty or overlaps another.
        """
        if nbytes < 1 or self.touched(start, nbytes):
            raise ValueError(f"{nbytes} bytes at {start:#x} are empty, or belong to a range already")
        self._starts.insert(bisect_right(self._starts, start), start)
        self._bytes[start] = nbytes

    def remove(self, start: int) -> int:
        """Remove the range that starts there and return its bytes.

        Raises:
            ValueError: No range starts there.
        """
        if start not in self._bytes:
            raise ValueError(f"nothing begins at {start:#x}")
        self._starts.remove(start)
        return self._bytes.pop(start)

    def size(self, start: int) -> int | None:
        """Return the bytes of the range that starts there, or None."""
        return self._bytes.get(start)

    def holder(self, address: int, nbytes: int) -> int | None:
        """Return the start of the one range that contains all of these bytes, or None."""
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        start = self._starts[at]
        return start if address + nbytes <= start + self._bytes[start] else None

    def touched(self, address: int, nbytes: int) -> list[int]:
        """Return the starts of the ranges that contain some of these bytes."""
        first = max(0, bisect_right(self._starts, address) - 1)
        found = []
        for start in self._starts[first:]:
            if start >= address + nbytes:
                break
            if start + self._bytes[start] > address:
                found.append(start)
        return found
