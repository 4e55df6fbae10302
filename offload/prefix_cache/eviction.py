"""Which cached runs leave the disk when it is over its quota. Pure: the caller holds and deletes the runs.

Across requests, unlike within one (residency.py), past use says something about the next, so an ordinary
policy decides. A key is a run's id, never used again; content is what a ghost is known by when it comes back
under a new id. Give the chain hash of the run's *first* block: it names all tokens up to there, and a run
that is computed again begins where the old one did, after ancestors that are still cached, but need not end
there (the chat has grown). If it begins elsewhere, it meets no ghost: a chance lost, never a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from copy import copy
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, Self

MayGo = Callable[[bytes], bool]
Evictable = Callable[[bytes, Set[bytes]], bool]
"""(key, going): may it go once going are gone? For a run: not leased, and going holds its cached children."""


@dataclass(frozen=True)
class Entry:
    nbytes: int
    content: bytes
    priority: int


class Policy(Protocol):
    """The order in which entries of one priority go. It holds their keys and looks up the rest."""

    def __iter__(self) -> Iterator[bytes]: ...
    def add(self, key: bytes, *, proven: bool) -> None:
        """A new entry; proven: it was here already, at another priority."""

    def hit(self, key: bytes) -> None: ...
    def remove(self, key: bytes) -> None: ...
    def take(self, may_go: MayGo) -> bytes:
        """Remove the first that may go; there must be one. All else changes as if it were the only one."""

    def trial(self) -> Self:
        """A copy to take from."""


class Lru:
    """Least recently used first."""

    def __init__(self, entries: Mapping[bytes, Entry]) -> None:
        self._order: dict[bytes, None] = {}

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._order)

    def add(self, key: bytes, *, proven: bool) -> None:
        self._order[key] = None

    def hit(self, key: bytes) -> None:
        self._order[key] = self._order.pop(key)

    def remove(self, key: bytes) -> None:
        del self._order[key]

    def take(self, may_go: MayGo) -> bytes:
        self.remove(key := next(filter(may_go, self._order)))
        return key

    def trial(self) -> Self:
        other = copy(self)
        other._order = self._order.copy()
        return other


class S3Fifo:
    """Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1.

    New entries join the small queue, a tenth of the bytes held (the quota, when it matters). They leave it as
    ghosts, of which there are as many as entries, unless they were used twice: those, and ghosts that come
    back, join the main queue, where each use, up to 3, is a second chance. What may not go keeps its place.
    """

    def __init__(self, entries: Mapping[bytes, Entry]) -> None:
        self._entries = entries
        self._small: dict[bytes, int] = {}  # key to frequency, oldest first
        self._main: dict[bytes, int] = {}
        self._ghosts: dict[bytes, bool] = {}  # contents, all True

    def __iter__(self) -> Iterator[bytes]:
        return chain(self._small, self._main)

    def add(self, key: bytes, *, proven: bool) -> None:
        known = self._ghosts.pop(self._entries[key].content, proven)
        (self._main if known else self._small)[key] = 0

    def hit(self, key: bytes) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(queue[key] + 1, 3)

    def remove(self, key: bytes) -> None:
        del (self._small if key in self._small else self._main)[key]

    def take(self, may_go: MayGo) -> bytes:
        small, held = (sum(self._entries[key].nbytes for key in keys) for keys in (self._small, self))
        due = 10 * small >= held
        if (due or not any(map(may_go, self._main))) and (key := self._take_small(may_go)) is not None:
            return key
        while True:
            for key in list(self._main):
                if self._main[key] > 0:
                    self._main[key] = self._main.pop(key) - 1
                elif may_go(key):
                    del self._main[key]
                    return key

    def trial(self) -> Self:
        other = copy(self)
        other._small, other._main, other._ghosts = self._small.copy(), self._main.copy(), self._ghosts.copy()
        return other

    def _take_small(self, may_go: MayGo) -> bytes | None:
        for key in list(self._small):
            if self._small[key] > 1:
                del self._small[key]
                self._main[key] = 0
            elif may_go(key):
                self._ghosts[self._entries[key].content] = True
                while len(self._ghosts) > len(self._small) + len(self._main):
                    del self._ghosts[next(iter(self._ghosts))]
                del self._small[key]
                return key
        return None


class Eviction:
    """All entries, and which go next: of the lowest priority that may, the first by the policy. Changes of an
    unknown key raise KeyError, and change nothing."""

    def __init__(self, policy: Callable[[Mapping[bytes, Entry]], Policy] = S3Fifo) -> None:
        self.used_bytes = 0
        self._policy = policy
        self._entries: dict[bytes, Entry] = {}
        self._levels: dict[int, Policy] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def insert(self, key: bytes, nbytes: int, content: bytes, priority: int = 0) -> None:
        """A new entry, not yet used again. Raises ValueError for a known key, or nbytes below 1."""
        if key in self._entries or nbytes < 1:
            raise ValueError(f"{key.hex()} is here already, or has no bytes: {nbytes}")
        self._add(key, Entry(nbytes, content, priority), proven=False)

    def hit(self, key: bytes) -> None:
        """A request used it. Once a request, for each run of its chain, the root first."""
        self._levels[self._entries[key].priority].hit(key)

    def prioritise(self, key: bytes, priority: int) -> None:
        """A change counts as a use."""
        entry = self._entries[key]
        if priority != entry.priority:
            self.remove(key)
            self._add(key, Entry(entry.nbytes, entry.content, priority), proven=True)

    def victims(self, needed_bytes: int, evictable: Evictable) -> list[bytes]:
        """Entries to evict, in this order, just enough of them for needed_bytes, or all that may go.

        Changes nothing: asked again, it says the same; asked again after evicted(the first), the rest.
        """
        going: dict[bytes, None] = {}
        trials = [level.trial() for _, level in sorted(self._levels.items())]

        def may_go(key: bytes) -> bool:
            return evictable(key, going.keys())

        while needed_bytes > 0 and (level := next((t for t in trials if any(map(may_go, t))), None)):
            key = level.take(may_go)
            going[key] = None
            needed_bytes -= self._entries[key].nbytes
        return list(going)

    def evicted(self, key: bytes) -> None:
        """It was deleted to make room. Its content may come back as a ghost."""
        self._levels[self._entries[key].priority].take(key.__eq__)
        self.used_bytes -= self._entries.pop(key).nbytes

    def remove(self, key: bytes) -> None:
        """Gone for another reason: deleted, corrupt, merged into a longer run."""
        self._levels[self._entries[key].priority].remove(key)
        self.used_bytes -= self._entries.pop(key).nbytes

    def check_integrity(self) -> None:
        """Each entry is in one queue of its priority, and used_bytes is their sum."""
        held = sorted((key, priority) for priority, level in self._levels.items() for key in level)
        assert held == sorted((key, entry.priority) for key, entry in self._entries.items()), "misplaced"
        assert self.used_bytes == sum(entry.nbytes for entry in self._entries.values()), "used_bytes is wrong"

    def _add(self, key: bytes, entry: Entry, *, proven: bool) -> None:
        self._entries[key] = entry
        self.used_bytes += entry.nbytes
        self._levels.setdefault(entry.priority, self._policy(self._entries)).add(key, proven=proven)
