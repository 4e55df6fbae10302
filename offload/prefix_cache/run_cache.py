"""The prefix cache: which runs on disk are in use, can be found again, or are evicted when room is needed."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ParamSpec, TypeVar

from spilld.offload.block_table import RunRef
from spilld.offload.disk.files.extent import RunKey, RunPlace
from spilld.offload.disk.index.index_row import Contents
from spilld.offload.disk.tier import DiskTier
from spilld.offload.errors import IndexDamaged, TierFull
from spilld.offload.store_layout import StoreLayout

from .eviction import Eviction, Policy, S3Fifo

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class RunCache:
    """The disk tier as a cache of everything that was ever computed.

    A run that a sequence uses stays. An unused one may be evicted, after the runs that continue it: a
    chain is found from its start only. One thread calls everything.
    """

    def __init__(self, tier: DiskTier, extent_bytes: int, policy: Callable[[], Policy] = S3Fifo) -> None:
        """Enter all runs that the disk tier has.

        Args:
            tier: The disk tier.
            extent_bytes: Bytes of the largest extent that can be read; runs with larger ones, of other
                budgets, are not found.
            policy: The order of eviction.
        """
        self._tier = tier
        self._extent_bytes = extent_bytes
        self.evicted_runs = 0
        self.pinned_bytes = 0
        """Bytes of the runs that are here and pinned."""
        self._uses: Counter[RunKey] = Counter()
        self._pins: Counter[RunKey] = Counter()
        self._eviction = Eviction(policy)
        self._parents: dict[RunKey, list[RunKey]] = {}
        self._needs: Counter[RunKey] = Counter()
        """Why runs must stay, known or not: the number of uses, and of cached runs that continue the run."""
        for place in tier.runs():
            self.enter(place)

    def reserve(
        self, run: RunKey, *, first: int, count: int, chain: bytes, contents: Contents, layouts: StoreLayout
    ) -> RunPlace:
        """Reserve space for a run, evicting unused ones until it fits; see DiskTier.reserve."""
        while True:
            try:
                return self._tier.reserve(
                    run, first=first, count=count, chain_hash=chain, contents=contents, layouts=layouts
                )
            except TierFull:
                if not self._evict(self._tier.run_bytes(count, layouts)):
                    raise

    def enter(self, place: RunPlace) -> None:
        """Add a committed run, which is unused at first."""
        contents = self._tier.contents(place.run)
        self._eviction.insert(place.run, place.range.nbytes, contents.name)
        if self._needs[place.run]:
            self._eviction.hold(place.run)
        self._parents[place.run] = _or_nothing(self._tier.index.holders, contents.parent)
        for parent in self._parents[place.run]:
            self._need(parent)

    def find(self, hashes: Sequence[bytes], first: int) -> list[RunRef]:
        """Return the longest chain of blocks first, first + 1, ... that is here and can be read.

        Runs with extents of more than extent_bytes cannot be read. If the index fails, nothing is found.
        """
        found = _or_nothing(self._tier.index.chain, hashes, first)
        return list(itertools.takewhile(lambda ref: self._readable(ref.run), found))

    def checkpoints(self, anchor: bytes) -> list[tuple[RunKey, list[int]]]:
        """Return the checkpoints after a block that can be read; see Index.checkpoints."""
        self._tier.write_notes()  # else looking would write them, and find nothing where that fails
        found = _or_nothing(self._tier.index.checkpoints, anchor)
        return [(run, tokens) for run, tokens in found if self._readable(run)]

    def _readable(self, run: RunKey) -> bool:
        if run not in self._tier:
            return False
        identity = self._tier.locate(run).identity
        return identity.layers == len(self._tier.layouts) and identity.largest_extent <= self._extent_bytes

    def hold(self, runs: Iterable[RunKey]) -> None:
        """Keep runs from eviction until as many releases."""
        for run in runs:
            self._uses[run] += 1
            self._need(run)

    def acquire(self, runs: Sequence[RunKey]) -> None:
        """Hold runs that a request found here, and note their use for the policy.

        To be called once a request, with the start of the chain first.
        """
        self.hold(runs)
        for run in runs:
            self._eviction.hit(run)
        self._tier.touch(runs)

    def release(self, run: RunKey) -> None:
        """Undo a hold of a run."""
        self._uses[run] -= 1
        assert self._uses[run] >= 0, "a run is released more often than it was acquired"
        if not self._uses[run]:
            del self._uses[run]
        self._need_no_more(run)

    def pin(self, runs: Iterable[RunKey]) -> None:
        """Hold runs that are here until unpin, and count their bytes."""
        for run in runs:
            self.hold([run])
            self._pins[run] += 1
            if self._pins[run] == 1 and run in self._tier:
                self.pinned_bytes += self._tier.locate(run).range.nbytes

    def unpin(self, runs: Iterable[RunKey]) -> None:
        """Undo a call of `pin`."""
        for run in runs:
            self._pins[run] -= 1
            if not self._pins[run]:
                del self._pins[run]
                if run in self._tier:
                    self.pinned_bytes -= self._tier.locate(run).range.nbytes
            self.release(run)

    def prioritise(self, runs: Iterable[RunKey], priority: int) -> None:
        """Set the priority of runs: those of a higher one are evicted after all of a lower one; 0 at first.

        Unknown runs are ignored.
        """
        for run in runs:
            if run in self._parents:
                self._eviction.prioritise(run, priority)

    def supersede(self, *runs: RunKey) -> None:
        """Delete runs that others replace, unless they are held. Unknown runs are ignored."""
        self.discard(*(run for run in runs if run not in self._uses))

    def discard(self, *runs: RunKey) -> None:
        """Delete runs that are not what was written; unknown runs are ignored."""
        known = [run for run in dict.fromkeys(runs) if run in self._tier]
        self.pinned_bytes -= sum(self._tier.locate(run).range.nbytes for run in known if run in self._pins)
        self._tier.delete(*known)
        for run in known:
            self._eviction.remove(run)
            self._unlink(run)

    @property
    def cached_bytes(self) -> int:
        """Bytes of all runs, used or not."""
        return self._eviction.used_bytes

    def check_integrity(self, used: Mapping[RunKey, int]) -> None:
        """Check that the policy knows the tier's runs; `used`: how often sequences use each, beside pins."""
        self._eviction.check_integrity()
        assert len(self._eviction) == len(self._tier.runs()), "the policy knows other runs than the tier"
        assert dict(self._uses) == Counter(used) + self._pins, "a use of a run is lost, or one too many"
        pinned = sum(self._tier.locate(run).range.nbytes for run in self._pins if run in self._tier)
        assert self.pinned_bytes == pinned, "pinned_bytes is wrong"

    def _evict(self, nbytes: int) -> bool:
        """Free so many bytes, not always in one place; return False if nothing could be evicted."""
        victims: list[RunKey] = []
        while nbytes > 0 and (entry := self._eviction.take()) is not None:
            log.info("run %s is evicted", entry.key.hex())
            self._unlink(entry.key)
            victims.append(entry.key)
            nbytes -= entry.nbytes
        self._tier.delete(*victims)
        self.evicted_runs += len(victims)
        return bool(victims)

    def _unlink(self, run: RunKey) -> None:
        for parent in self._parents.pop(run):
            self._need_no_more(parent)

    def _need(self, run: RunKey) -> None:
        self._needs[run] += 1
        if self._needs[run] == 1 and run in self._eviction:
            self._eviction.hold(run)

    def _need_no_more(self, run: RunKey) -> None:
        self._needs[run] -= 1
        if not self._needs[run]:
            del self._needs[run]
            if run in self._eviction:
                self._eviction.release(run)


def _or_nothing(ask: Callable[P, list[T]], *args: P.args, **kwargs: P.kwargs) -> list[T]:
    try:
        return ask(*args, **kwargs)
    except (OSError, IndexDamaged) as error:
        log.error("the index cannot be read: %s", error)
        return []
