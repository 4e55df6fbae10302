"""Runs that leave the store as copies while the engine goes on."""

from __future__ import annotations

from collections.abc import Sequence

from spilld.offload.disk.files.extent import RunKey
from spilld.offload.errors import ExtentMissing
from spilld.offload.store.store import Store
from spilld.offload.system import PAGE, Bytes, page_aligned


class ExportedRuns:
    """Runs that are copied: pinned, and their bytes held, until `end`.

    The owner thread makes and ends it; one I/O thread reads in between.
    """

    def __init__(self, store: Store, runs: Sequence[RunKey]) -> None:
        """Raises ExtentMissing; nothing is held then."""
        if store.disk is None:
            raise ExtentMissing("there is no disk tier")
        self._store = store
        self._disk = store.disk
        self._places = {run: self._disk.tier.locate(run) for run in runs}
        for place in self._places.values():
            self._disk.tier.hold(place)
        store.pin(list(self._places))
        largest = max((place.identity.largest_extent for place in self._places.values()), default=PAGE)
        self._buffer = page_aligned(largest)

    def read(self, run: RunKey, layer: int) -> Bytes:
        """On the I/O thread: verified records, uint8 [count, record_bytes], valid until the next.

        Raises ReadFailed.
        """
        return self._disk.tier.io.read_extent(self._places[run], layer, self._buffer)

    def end(self, damaged: RunKey | None = None) -> None:
        """damaged: a run that is not what was written, which nobody shall find again."""
        self._store.unpin(list(self._places))
        for place in self._places.values():
            self._disk.tier.release(place)
        if damaged is not None:
            self._disk.cache.discard(damaged)
