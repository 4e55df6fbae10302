"""Writes of blocks from host memory to disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from spilld.offload.block_table import ABSENT, BlockTable, RunRef
from spilld.offload.disk.files.extent import RunKey
from spilld.offload.disk.index.index_row import Contents
from spilld.offload.disk.spiller import Spilled
from spilld.offload.errors import TierFull, WriteFailed
from spilld.offload.host.slab import HostSlab
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import Rows

from .disk_backend import DiskBackend

log = logging.getLogger(__name__)

WRITES_AHEAD = 2
"""Runs and checkpoints that may wait for the disk while optional writes are still begun."""


@dataclass(frozen=True)
class PendingWrite:
    """A run that is being written: its rows stay as they are until the write has ended.

    keep: the rows stay afterwards, too, as a copy that is read from host memory.
    """

    table: BlockTable
    ref: RunRef
    rows: Rows
    keep: bool


class BlockWriter:
    """Writes runs of sealed blocks; their rows are freed, or kept as copies, once a run is durable."""

    def __init__(self, disk: DiskBackend, slab: HostSlab, layouts: StoreLayout, run_blocks: int) -> None:
        self.pending: dict[RunKey, PendingWrite] = {}
        self._disk = disk
        self._slab = slab
        self._layouts = layouts
        self._run_blocks = run_blocks

    @property
    def columns_to_come(self) -> int:
        """Number of block columns that will be free once what is being written is durable."""
        return sum(write.ref.count for write in self.pending.values() if not write.keep)

    def spill(self, table: BlockTable, first: int, count: int, *, keep: bool = False) -> None:
        """Begin to write blocks as one run; see Store.spill."""
        cache = self._disk.cache
        for known in cache.find(table.chain[first : first + count], first) if table.adopts else ():
            cache.acquire([known.run])
            table.add_runs([known])
            if not keep:
                self.drop(table, known)
            first, count = first + known.count, count - known.count
        if count:
            self._write(table, first, count, keep=keep)

    def drop(self, table: BlockTable, ref: RunRef) -> int:
        """Free the rows of blocks that are also on disk and return how many columns that were."""
        table.copies.pop(ref, None)
        rows = table.rows[:, ref.columns]
        copies = rows[0] >= 0
        self._slab.free(rows[:, copies])
        rows[:] = ABSENT
        return int(copies.sum())

    def write_behind(self, tables: Iterable[BlockTable]) -> None:
        """Begin to write a full run that lies in host memory only, if the disk has little else to do."""
        if self._disk.failure is not None or self._disk.spiller.pending >= WRITES_AHEAD:
            return
        for table in tables:
            for span in table.host_spans():
                for first in range(span.start, span.stop - self._run_blocks + 1, self._run_blocks):
                    if self._try_to_keep(table, first, self._run_blocks):
                        return

    def save(self, table: BlockTable) -> None:
        """Begin to write every sealed block of a sequence that lies in host memory only."""
        if self._disk.failure is None:
            for span in table.host_spans():
                for first in range(span.start, span.stop, self._run_blocks):
                    self._try_to_keep(table, first, min(self._run_blocks, span.stop - first))

    def settle(self, ended: Spilled) -> None:
        """Finish a pending write: a durable run gives up its rows, a failed one keeps them."""
        write = self.pending.pop(ended.run)
        table, ref = write.table, write.ref
        wanted = table.end_write(ref)
        if ended.ok and wanted:
            self._disk.cache.hold([ref.run])
            if not write.keep:
                table.rows[:, ref.columns] = ABSENT
            table.add_runs([ref])
        if not wanted or (ended.ok and not write.keep):
            self._slab.free(write.rows)

    def _write(self, table: BlockTable, first: int, count: int, *, keep: bool) -> None:
        end = first + count
        contents = Contents(table.chain[first - 1], tuple(table.chain[first:end]))
        rows = table.rows[:, first:end].copy()
        run = self._disk.write(contents, first, table.chain[end - 1], self._layouts, self._slab.records, rows)
        ref = RunRef(run, first, first, count)
        table.begin_write(ref)
        self.pending[run] = PendingWrite(table, ref, rows, keep)

    def _try_to_keep(self, table: BlockTable, first: int, count: int) -> bool:
        """Begin a write that nothing waits for, if there is room; False if the budget refuses it."""
        again = first < table.offered
        table.offered = max(table.offered, first + count)
        if not self._disk.admits(table.chain[first], self._disk.tier.run_bytes(count), again=again):
            return False
        try:
            self.spill(table, first, count, keep=True)
        except TierFull as full:
            log.info("blocks are not saved: %s", full)
        except WriteFailed as failure:
            self._disk.note(failure)
        return True
