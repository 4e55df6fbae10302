"""The disk tier with whole runs stored and read at once, which only tests do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from spilld.offload.disk.files.extent import RunKey
from spilld.offload.disk.index.index_row import Contents
from spilld.offload.disk.tier import NAMELESS, DiskTier
from spilld.offload.system import Bytes, SystemCalls, page_aligned

System = TypeVar("System", bound=SystemCalls)


class RunTier(DiskTier):
    def put(
        self,
        run: RunKey,
        first: int,
        chain_hash: bytes,
        records: Sequence[Bytes],
        contents: Contents = NAMELESS,
    ) -> None:
        """Store a run, uint8[count, record_bytes] for each layer, and wait until it is durable.

        Raises TierFull or WriteFailed; the run is then absent and all earlier runs are intact.
        """
        assert len(records) == len(self.layouts)
        rows = np.arange(len(records[0]), dtype=np.int64)
        place = self.reserve(run, first=first, count=len(rows), chain_hash=chain_hash, contents=contents)
        scratch = page_aligned(place.identity.largest_extent)
        try:
            for layer, layer_records in enumerate(records):
                self.io.write_extent(place, layer, layer_records, rows, scratch)
            self.io.sync(place)
            self.commit(place)
        except BaseException:
            self.abandon(place)
            raise

    def get(self, run: RunKey, layer: int) -> Bytes:
        """The records of one layer, uint8[count, record_bytes], in memory of their own. Raises ReadFailed."""
        place = self.locate(run)
        return self.io.read_extent(place, layer, page_aligned(place.identity.largest_extent))


def on_system(tier: DiskTier, system: System) -> System:
    """The tier makes these calls from now on."""
    tier.system = tier.io._system = tier._files._system = system
    return system
