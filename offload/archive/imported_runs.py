"""Runs that come into the store from elsewhere while the engine goes on."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spilld.offload.disk.files.extent import RunKey, RunPlace
from spilld.offload.disk.index.index_row import Contents
from spilld.offload.errors import ExtentMissing, TierFull, WriteFailed
from spilld.offload.store.store import Store
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import PAGE, Bytes, page_aligned


@dataclass(frozen=True)
class ImportedRun:
    """A run to come; chain: the hash that its extents say."""

    first: int
    count: int
    chain: bytes
    contents: Contents
    layouts: StoreLayout


class ImportedRuns:
    """Runs that come from elsewhere, under new keys: all of them come to exist, or none.

    The owner thread makes and ends it; one I/O thread writes in between.
    """

    def __init__(self, store: Store, parts: Sequence[ImportedRun]) -> None:
        """Reserve room for all. Raises TierFull or WriteFailed; nothing has changed then, but that other
        runs may have been evicted.
        """
        if store.disk is None:
            raise ExtentMissing("there is no disk tier")
        self._store = store
        self._disk = store.disk
        self.places: list[RunPlace] = []
        self._bytes = sum(self._disk.tier.run_bytes(part.count, part.layouts) for part in parts)
        self._respect_reservations()
        store.importing_bytes += self._bytes
        try:
            for part in parts:
                self.places.append(self._reserve(part))
        except BaseException:
            self.abandon()
            raise
        largest = max((place.identity.largest_extent for place in self.places), default=PAGE)
        self._scratch = page_aligned(largest)

    def _respect_reservations(self) -> None:
        store = self._store
        if store.spill_failure is not None:
            raise store.spill_failure
        full = self._disk.tier.run_bytes(store.run_blocks)
        if -(-self._bytes // full) * store.run_blocks > store.unreserved:
            raise TierFull(f"{self._bytes} bytes do not fit beside what is reserved for requests")

    def _reserve(self, part: ImportedRun) -> RunPlace:
        place = self._disk.cache.reserve(
            RunKey(uuid.uuid4().bytes),
            first=part.first,
            count=part.count,
            chain=part.chain,
            contents=part.contents,
            layouts=part.layouts,
        )
        self._disk.tier.hold(place)
        return place

    def write(self, place: RunPlace, layer: int, records: Bytes) -> None:
        """On the I/O thread: one layer, uint8[count, record_bytes]. Raises WriteFailed."""
        rows = np.arange(place.identity.count, dtype=np.int64)
        self._disk.tier.io.write_extent(place, layer, records, rows, self._scratch)

    def sync(self) -> None:
        """On the I/O thread, after all writes. Raises WriteFailed."""
        for place in self.places:
            self._disk.tier.io.sync(place)

    def commit(self) -> None:
        """They exist from now on. Raises WriteFailed; then none does."""
        try:
            self._disk.tier.commit(*self.places)
        except WriteFailed:
            self.abandon()
            raise
        for place in self.places:
            self._disk.cache.enter(place)
        self._end()

    def abandon(self) -> None:
        """None of them will exist."""
        for place in self.places:
            if self._disk.tier.awaits(place):
                self._disk.tier.abandon(place)
        self._end()

    def _end(self) -> None:
        self._store.importing_bytes -= self._bytes
        for place in self.places:
            self._disk.tier.release(place)
