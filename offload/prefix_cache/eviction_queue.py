"""A queue of cache entries that finds the next one to evict without passing those that must stay."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

SLACK = 64
"""Stale items that the heap may have in addition to as many as there are entries."""


@dataclass(eq=False)
class CacheEntry:
    """A cached run. uses: since its queue last examined it; held: it must not be evicted now."""

    key: bytes
    nbytes: int
    content: bytes
    priority: int
    uses: int = 0
    held: bool = False


class EvictionQueue:
    """Entries in the order in which they came.

    An entry is due if it is not held, or was used more than `chances` times, which its policy has to look at.
    Those that are not due keep their place, and `first` does not pass them: the due ones lie in a heap, from
    which entries that are no longer due are dropped when they are met.

    Attributes:
        nbytes: Sum of the entries' bytes.
        free: Number of entries that are not held.
    """

    def __init__(self, chances: int) -> None:
        self.nbytes = 0
        self.free = 0
        self.examined = 0
        """Items of the heap that were examined so far."""
        self._chances = chances
        self._next = 0
        self._entries: dict[bytes, CacheEntry] = {}
        self._places: dict[bytes, int] = {}
        self._heap: list[tuple[int, bytes]] = []
        self._queued: set[bytes] = set()
        """Keys whose current place is in the heap."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[CacheEntry]:
        return iter(self._entries.values())

    def __contains__(self, entry: CacheEntry) -> bool:
        return entry.key in self._entries

    def append(self, entry: CacheEntry) -> None:
        """Add an entry behind all others."""
        self._entries[entry.key] = entry
        self._places[entry.key] = self._next
        self._next += 1
        self.nbytes += entry.nbytes
        self.free += not entry.held
        self.reconsider(entry)

    def remove(self, entry: CacheEntry) -> None:
        """Remove an entry, wherever it is.

        Raises:
            KeyError: It is not in the queue.
        """
        del self._entries[entry.key], self._places[entry.key]
        self._queued.discard(entry.key)
        self.nbytes -= entry.nbytes
        self.free -= not entry.held

    def held(self, entry: CacheEntry) -> None:
        """Note that entry.held was set."""
        self.free -= 1

    def released(self, entry: CacheEntry) -> None:
        """Note that entry.held was cleared."""
        self.free += 1
        self.reconsider(entry)

    def reconsider(self, entry: CacheEntry) -> None:
        """Note that the entry may have become due."""
        if self._due(entry) and entry.key not in self._queued:
            self._queued.add(entry.key)
            heapq.heappush(self._heap, (self._places[entry.key], entry.key))
            if len(self._heap) > 2 * len(self._entries) + SLACK:
                self._heap = sorted((self._places[key], key) for key in self._queued)

    def first(self) -> CacheEntry | None:
        """Return the first entry that is due, or None."""
        while self._heap:
            self.examined += 1
            place, key = self._heap[0]
            current = self._places.get(key) == place
            if current and self._due(self._entries[key]):
                return self._entries[key]
            heapq.heappop(self._heap)
            if current:
                self._queued.discard(key)
        return None

    def _due(self, entry: CacheEntry) -> bool:
        return not entry.held or entry.uses > self._chances
