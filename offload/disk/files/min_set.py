"""A set of integers whose smallest member is found without a search."""

from __future__ import annotations

import heapq

SLACK = 64
"""Stale items that the heap may have in addition to as many as there are members."""


class MinSet:
    """A set with a heap; discarded numbers stay in the heap until they are met, or most of it is stale."""

    def __init__(self) -> None:
        self._members: set[int] = set()
        self._heap: list[int] = []

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, number: int) -> bool:
        return number in self._members

    def add(self, number: int) -> None:
        """Add a number; one that is a member already stays one."""
        if number in self._members:
            return
        self._members.add(number)
        heapq.heappush(self._heap, number)
        if len(self._heap) > 2 * len(self._members) + SLACK:
            self._heap = sorted(self._members)

    def discard(self, number: int) -> None:
        """Remove a number, if it is a member."""
        self._members.discard(number)

    def smallest(self) -> int | None:
        """Return the smallest member, or None if there is none."""
        while self._heap and self._heap[0] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None
