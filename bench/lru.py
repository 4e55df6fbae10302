"""Least recently used first: the policy that the one in use is compared with."""

from __future__ import annotations

from collections.abc import Iterator

from spilld.offload.prefix_cache.eviction_queue import CacheEntry, EvictionQueue

NEVER = 1 << 62


class Lru:
    """Runs that were used longest ago leave first."""

    def __init__(self) -> None:
        self._queue = EvictionQueue(chances=NEVER)

    def __iter__(self) -> Iterator[CacheEntry]:
        return iter(self._queue)

    def add(self, entry: CacheEntry, *, proven: bool) -> None:
        self._queue.append(entry)

    def hit(self, entry: CacheEntry) -> None:
        self._queue.remove(entry)
        self._queue.append(entry)

    def held(self, entry: CacheEntry) -> None:
        self._queue.held(entry)

    def released(self, entry: CacheEntry) -> None:
        self._queue.released(entry)

    def remove(self, entry: CacheEntry) -> None:
        self._queue.remove(entry)

    def take(self) -> CacheEntry | None:
        entry = self._queue.first()
        if entry is not None:
            self._queue.remove(entry)
        return entry
