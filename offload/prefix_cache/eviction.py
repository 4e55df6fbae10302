"""Chooses which cached runs leave the disk when it is over its quota. Pure: the caller deletes the runs.

Across requests, unlike within one (residency.py), past use says something about the next, so an ordinary
policy decides. A key is a run's id, never used again; content is what a ghost is known by when it comes back
under a new id. Give the chain hash of the run's *first* block: it names all tokens up to there, and a run
that is computed again begins where the old one did, after ancestors that are still cached, but need not end
there (the chat has grown). If it begins elsewhere, it meets no ghost, which is never wrong but loses a hit.

No operation looks at entries that have no part in it: the work for a victim does not grow with the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Protocol

from .eviction_queue import CacheEntry, EvictionQueue


class Policy(Protocol):
    """The order in which entries of one priority are evicted."""

    def __iter__(self) -> Iterator[CacheEntry]: ...
    def add(self, entry: CacheEntry, *, proven: bool) -> None:
        """Add a new entry; proven: it was here already, at another priority."""

    def hit(self, entry: CacheEntry) -> None:
        """Note that an entry was used."""

    def held(self, entry: CacheEntry) -> None:
        """Note that entry.held was set: it must not be evicted."""

    def released(self, entry: CacheEntry) -> None:
        """Note that entry.held was cleared: it may be evicted again."""

    def remove(self, entry: CacheEntry) -> None:
        """Remove an entry."""

    def take(self) -> CacheEntry | None:
        """Remove and return the first entry that is not held; None, changing nothing, if all are."""


class S3Fifo:
    """The policy of Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1.

    New entries join the small queue, a tenth of the bytes held (the quota, when it matters). They leave it as
    ghosts, of which there are as many as entries, unless they were used twice: those, and ghosts that come
    back, join the main queue, where each use, up to 3, is a second chance. A held entry keeps its place.
    """

    def __init__(self) -> None:
        self._small = EvictionQueue(chances=1)
        self._main = EvictionQueue(chances=0)
        self._ghosts: dict[bytes, bool] = {}  # contents, all True

    def __iter__(self) -> Iterator[CacheEntry]:
        return chain(self._small, self._main)

    def add(self, entry: CacheEntry, *, proven: bool) -> None:
        """See Policy.add."""
        entry.uses = 0
        known = self._ghosts.pop(entry.content, proven)
        (self._main if known else self._small).append(entry)

    def hit(self, entry: CacheEntry) -> None:
        """See Policy.hit."""
        entry.uses = min(entry.uses + 1, 3)
        self._queue(entry).reconsider(entry)

    def held(self, entry: CacheEntry) -> None:
        """See Policy.held."""
        self._queue(entry).held(entry)

    def released(self, entry: CacheEntry) -> None:
        """See Policy.released."""
        self._queue(entry).released(entry)

    def remove(self, entry: CacheEntry) -> None:
        """See Policy.remove."""
        self._queue(entry).remove(entry)

    def take(self) -> CacheEntry | None:
        """See Policy.take."""
        if not (self._small.free or self._main.free):
            return None
        due = 10 * self._small.nbytes >= self._small.nbytes + self._main.nbytes
        if (due or not self._main.free) and (entry := self._take_small()) is not None:
            return entry
        while True:
            entry = self._main.first()
            assert entry is not None, "some entry is not held"
            self._main.remove(entry)
            if not entry.uses:
                return entry
            entry.uses -= 1
            self._main.append(entry)

    def _take_small(self) -> CacheEntry | None:
        while (entry := self._small.first()) is not None:
            self._small.remove(entry)
            if entry.uses <= 1:
                self._remember(entry.content)
                return entry
            entry.uses = 0
            self._main.append(entry)
        return None

    def _remember(self, content: bytes) -> None:
        """Remember the content of an evicted entry as a ghost."""
        self._ghosts[content] = True
        while len(self._ghosts) > len(self._small) + len(self._main) + 1:
            del self._ghosts[next(iter(self._ghosts))]

    def _queue(self, entry: CacheEntry) -> EvictionQueue:
        return self._small if entry in self._small else self._main


class Eviction:
    """All entries, and which is evicted next: the policy's first that is not held, of the lowest priority.

    Changes of an unknown key raise KeyError, and change nothing.
    """

    def __init__(self, policy: Callable[[], Policy] = S3Fifo) -> None:
        self.used_bytes = 0
        self._policy = policy
        self._entries: dict[bytes, CacheEntry] = {}
        self._levels: dict[int, Policy] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def insert(self, key: bytes, nbytes: int, content: bytes, priority: int = 0) -> None:
        """Add an entry that was not used again yet and is not held.

        Raises:
            ValueError: The key is known, or nbytes is below 1.
        """
        if key in self._entries or nbytes < 1:
            raise ValueError(f"{key.hex()} is here already, or has no bytes: {nbytes}")
        self._add(CacheEntry(key, nbytes, content, priority), proven=False)

    def hit(self, key: bytes) -> None:
        """Note that a request used an entry; once a request, for each run of its chain, the root first."""
        entry = self._entries[key]
        self._levels[entry.priority].hit(entry)

    def hold(self, key: bytes) -> None:
        """Keep an entry from eviction until release; it keeps its place meanwhile."""
        entry = self._entries[key]
        if not entry.held:
            entry.held = True
            self._levels[entry.priority].held(entry)

    def release(self, key: bytes) -> None:
        """Let an entry be evicted again."""
        entry = self._entries[key]
        if entry.held:
            entry.held = False
            self._levels[entry.priority].released(entry)

    def prioritise(self, key: bytes, priority: int) -> None:
        """Set the priority of an entry; a change counts as a use."""
        entry = self._entries[key]
        if priority != entry.priority:
            self.remove(key)
            entry.priority = priority
            self._add(entry, proven=True)

    def take(self) -> CacheEntry | None:
        """Remove and return the entry to evict, or None if all are held; its content may become a ghost."""
        for _, level in sorted(self._levels.items()):
            if (entry := level.take()) is not None:
                self.used_bytes -= self._entries.pop(entry.key).nbytes
                return entry
        return None

    def remove(self, key: bytes) -> None:
        """Remove an entry for another reason: deleted, corrupt, merged into a longer run."""
        entry = self._entries.pop(key)
        self._levels[entry.priority].remove(entry)
        self.used_bytes -= entry.nbytes

    def check_integrity(self) -> None:
        """Check that each entry is in one queue of its priority, and that used_bytes is their sum."""
        queued = sorted((entry.key, priority) for priority, level in self._levels.items() for entry in level)
        assert queued == sorted((key, entry.priority) for key, entry in self._entries.items()), "misplaced"
        assert self.used_bytes == sum(entry.nbytes for entry in self._entries.values()), "used_bytes is wrong"

    def _add(self, entry: CacheEntry, *, proven: bool) -> None:
        self._entries[entry.key] = entry
        self.used_bytes += entry.nbytes
        if entry.priority not in self._levels:
            self._levels[entry.priority] = self._policy()
        self._levels[entry.priority].add(entry, proven=proven)
