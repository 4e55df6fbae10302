"""The disk tier with what uses it: prefix cache, I/O threads, compaction and the write budget."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spilld.offload.disk.files.extent import RunKey
from spilld.offload.disk.index.index_row import Contents
from spilld.offload.disk.prefetch import Prefetcher
from spilld.offload.disk.read_ticket import Ticket
from spilld.offload.disk.spiller import Spilled, Spiller
from spilld.offload.disk.tier import DiskTier
from spilld.offload.errors import ExtentCorrupt, WriteFailed, WriteRefused
from spilld.offload.maintenance.compaction import Compaction
from spilld.offload.maintenance.wear import WriteBudget
from spilld.offload.prefix_cache.run_cache import RunCache
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import Bytes, Rows

log = logging.getLogger(__name__)


@dataclass
class DiskBackend:
    """All that a store with a disk has beyond host memory. One owner thread calls every method.

    Attributes:
        failure: Why nothing more is written; what is on disk stays readable.
        refused: Number of runs that were not written because of a shortage that may pass.
        refusal: Why the last of them was not written.
    """

    tier: DiskTier
    cache: RunCache
    spiller: Spiller
    prefetch: Prefetcher
    compaction: Compaction | None = None
    wear: WriteBudget | None = None
    failure: WriteFailed | None = None
    refused: int = 0
    refusal: WriteRefused | None = None

    @property
    def moving(self) -> bool:
        """Whether a run is being moved to another place on disk."""
        return self.compaction is not None and self.compaction.moving

    def admits(self, content: bytes, nbytes: int, *, again: bool = False) -> bool:
        """Return whether a write that nothing waits for may begin; see WriteBudget.admits."""
        return self.wear is None or self.wear.admits(content, nbytes, again=again)

    def write(
        self,
        contents: Contents,
        first: int,
        chain: bytes,
        layouts: StoreLayout,
        records: Sequence[Bytes],
        rows: Rows,
    ) -> RunKey:
        """Begin to write a run under a new key; unused runs are evicted where it needs room.

        Args:
            contents: What it is found by once it is durable.
            first: Its first block.
            chain: The chain hash that its extents' headers contain.
            layouts: Of its records.
            records: Of each layer uint8 [any, record_bytes].
            rows: int64 [layers, count], of the records. They stay as they are until the write has ended.

        Raises:
            TierFull: There is no room.
            WriteFailed: The files cannot be made or grown. On either error nothing was begun.
        """
        run = RunKey(uuid.uuid4().bytes)
        place = self.cache.reserve(
            run, first=first, count=rows.shape[1], chain=chain, contents=contents, layouts=layouts
        )
        if self.wear is not None:
            self.wear.spend(place.range.nbytes)
        self.spiller.submit(place, records, rows)
        return run

    def take_in(self, spilled: Iterable[Spilled]) -> None:
        """Let runs that were written be found, and note why others were not written."""
        for ended in spilled:
            if ended.error is not None:
                self.note(ended.error)
            else:
                self.cache.enter(self.tier.locate(ended.run))

    def note(self, failure: WriteFailed) -> None:
        """Note that a run was not written.

        Unless only this run has failed, and not the disk, nothing more is written to disk from now on; what
        is there stays readable.
        """
        if isinstance(failure, WriteRefused):
            self.refused, self.refusal = self.refused + 1, failure
            return
        log.error("nothing more is written to the disk tier: %s", failure)
        self.failure = failure

    def loaded(self, ticket: Ticket) -> Bytes:
        """Wait for a read, see Prefetcher.wait; a run that is not what was written is not found again."""
        try:
            return self.prefetch.wait(ticket)
        except ExtentCorrupt:
            self.cache.discard(ticket.read.run)
            raise

    def compact(self) -> None:
        """Finish a move that has ended; begin one while nothing is being written."""
        if self.compaction is not None:
            self.compaction.step(begin=self.failure is None and not self.spiller.pending)

    def stats(self) -> dict[str, object]:
        """Return what the disk holds and has moved, for Store.stats."""
        moved, scratch = 0, self.spiller.scratch_bytes
        if self.compaction is not None:
            moved, scratch = self.compaction.bytes_moved, scratch + self.compaction.scratch_bytes
        values: dict[str, object] = {
            "disk_used_bytes": self.tier.used_bytes,
            "disk_index_bytes": self.tier.index.nbytes,
            "disk_budget_bytes": self.tier.budget_bytes,
            "disk_hole_bytes": self.tier.hole_bytes,
            "disk_direct": self.tier.direct,
            "disk_cached_bytes": self.cache.cached_bytes,
            "disk_failure": str(self.failure or ""),
            "disk_written_bytes": self.spiller.bytes_written,
            "disk_failed_writes": self.spiller.failures,
            "disk_evicted_runs": self.cache.evicted_runs,
            "disk_moved_bytes": moved,
            "staging_bytes": self.prefetch.staging_bytes + scratch,
            **{f"prefetch_{name}": value for name, value in vars(self.prefetch.stats).items()},
        }
        if self.wear is not None:
            values |= {
                "disk_write_budget_bytes": self.wear.daily_bytes,
                "disk_write_left_bytes": self.wear.left_bytes,
                "disk_writes_refused": self.wear.refused,
            }
        return values

    def close(self) -> None:
        """Stop all threads and close the disk tier."""
        self.prefetch.close()
        self.spiller.close()
        if self.compaction is not None:
            self.compaction.close()
        self.tier.close()
