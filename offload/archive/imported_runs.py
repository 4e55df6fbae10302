"""Runs that are copied into the store while the engine goes on."""

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
    """A run that is to be imported; chain: the hash that its extents' headers contain."""

    first: int
    count: int
    chain: bytes
    contents: Contents
    layouts: StoreLayout


class ImportedRuns:
    """Runs that are imported under new keys: either all of them come to exist, or none.

    The owner thread makes and ends it; one I/O thread writes in between.
    """

    def __init__(self, store: Store, parts: Sequence[ImportedRun]) -> None:
        """Reserve room for all runs. On an error only other runs may have been evicted.

        Raises:
            ExtentMissing: There is no disk tier.
            TierFull: There is no room beside what is reserved for requests.
            WriteFailed: The disk tier takes no more runs, or a file cannot be made or grown.
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
        """On the I/O thread: write one layer of a run, `[count, record_bytes] uint8`.

        Raises:
            WriteFailed: The extent could not be written.
        """
        rows = np.arange(place.identity.count, dtype=np.int64)
        self._disk.tier.io.write_extent(place, layer, records, rows, self._scratch)

    def sync(self) -> None:
        """On the I/O thread, after all writes: make them durable.

        Raises:
            WriteFailed: They may not be durable.
        """
        for place in self.places:
            self._disk.tier.io.sync(place)

    def commit(self) -> None:
        """Make all runs exist.

        Raises:
            WriteFailed: The index does not take them; none of them exists then.
        """
        try:
            self._disk.tier.commit(*self.places)
        except WriteFailed:
            self.abandon()
            raise
        for place in self.places:
            self._disk.cache.enter(place)
        self._end()

    def abandon(self) -> None:
        """Give up all runs: none of them will exist."""
        for place in self.places:
            if self._disk.tier.awaits(place):
                self._disk.tier.abandon(place)
        self._end()

    def _end(self) -> None:
        self._store.importing_bytes -= self._bytes
        for place in self.places:
            self._disk.tier.release(place)
