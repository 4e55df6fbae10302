"""Runs that are copied out of the store while the engine goes on."""

from __future__ import annotations

from collections.abc import Sequence

from spilld.offload.disk.files.extent import RunKey
from spilld.offload.errors import ExtentMissing
from spilld.offload.store.store import Store
from spilld.offload.system import PAGE, Bytes, page_aligned


class ExportedRuns:
    """Runs that are being copied: pinned, and their bytes leased, until `end`.

    The owner thread makes and ends it; one I/O thread reads in between.
    """

    def __init__(self, store: Store, runs: Sequence[RunKey]) -> None:
        """Pin the runs and lease their bytes.

        Raises:
            ExtentMissing: One of them is not on disk; nothing is pinned or leased then.
        """
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
        """On the I/O thread: read one layer of a run.

        Returns:
            Verified records, `[count, record_bytes] uint8`, valid until the next read.

        Raises:
            ReadFailed: The extent could not be read, or is not what was written.
        """
        return self._disk.tier.io.read_extent(self._places[run], layer, self._buffer)

    def end(self, damaged: RunKey | None = None) -> None:
        """Release the runs.

        Args:
            damaged: A run that is not what was written, which must not be found again.
        """
        self._store.unpin(list(self._places))
        for place in self._places.values():
            self._disk.tier.release(place)
        if damaged is not None:
            self._disk.cache.discard(damaged)
