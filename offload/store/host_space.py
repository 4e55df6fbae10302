"""Room in host memory for the blocks that a step seals: others are dropped or spilled, if need be."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from spilld.offload.block_table import BlockTable
from spilld.offload.disk.spiller import Spilled
from spilld.offload.errors import TierFull, WriteFailed
from spilld.offload.host.residency import Holding, Spill
from spilld.offload.host.slab import HostSlab
from spilld.offload.system import Rows

from .block_writer import BlockWriter
from .disk_backend import DiskBackend

WRITE_DEADLINE_S = 60.0
"""Seconds that growth waits for a spill to end before it gives up."""

REFUSALS = 3
"""How often growth tries again to spill after a shortage that may pass."""

REFUSED_S = 0.05

Planner = Callable[[Sequence[Holding], int, int], list[Spill]]


class HostSpace:
    """Allocates rows of the slab, and makes room by dropping copies and by spilling.

    Without a disk only what is free can be allocated.
    """

    def __init__(
        self,
        slab: HostSlab,
        tables: Sequence[BlockTable],
        run_blocks: int,
        disk: DiskBackend | None,
        writer: BlockWriter | None,
        planner: Planner,
        settle: Callable[[Sequence[Spilled]], None],
    ) -> None:
        """Compose it of the store's parts.

        Args:
            slab: The host memory.
            tables: The store's own list of its tables.
            run_blocks: Blocks of a full run.
            disk: None without a disk tier.
            writer: None without a disk tier.
            planner: Chooses what is spilled.
            settle: Takes in ended writes.
        """
        self._slab = slab
        self._tables = tables
        self._run_blocks = run_blocks
        self._disk = disk
        self._writer = writer
        self._planner = planner
        self._settle = settle

    def allocate(self, columns: int) -> Rows:
        """Take rows for so many blocks, int64 [layers, columns]. May wait for spills.

        Raises:
            TierFull: No spill can make room.
        """
        if self._slab.free_columns < columns:
            self._wait_for(columns)
        return self._slab.allocate(columns)

    def make(self, columns: int) -> None:
        """Begin to make room for at least `columns` block columns; never waits.

        Copies of what is on disk are dropped; then spills are begun that will leave so many columns free.
        """
        disk, writer = self._disk, self._writer
        if disk is None or writer is None:
            return
        self._drop_copies(writer, columns - self._slab.free_columns)
        short = columns - self._slab.free_columns - writer.columns_to_come
        if short <= 0 or disk.failure is not None:
            return
        holdings = [Holding(table.host_spans(), table.idle) for table in self._tables]
        for spill in self._planner(holdings, short, self._run_blocks):
            try:
                writer.spill(self._tables[spill.holding], spill.first, spill.count)
            except TierFull:
                return
            except WriteFailed as failure:
                disk.note(failure)
                return

    def relieve(self) -> None:
        """Give host memory back to the kernel, and begin to write one more run.

        What is given back are copies of what is on disk, and what was written since the last call.
        """
        self.make(self._slab.free_columns + self._run_blocks)
        self._slab.give_back()

    def _drop_copies(self, writer: BlockWriter, columns: int) -> None:
        """Free rows of blocks that are also on disk, whole runs, the oldest of idle sequences first."""
        if columns <= 0:
            return
        copied = [table for table in self._tables if table.copies]
        for table in sorted(copied, key=lambda table: (not table.idle, -table.host_blocks)):
            for ref in list(table.copies):
                if columns <= 0:
                    return
                columns -= writer.drop(table, ref)

    def _wait_for(self, columns: int) -> None:
        """Spill, and wait for it, until so many columns are free; raises TierFull."""
        before = 0 if self._disk is None else self._disk.refused
        while True:
            self.make(columns)
            if self._slab.free_columns >= columns:
                return
            if self._disk is None or self._writer is None:
                raise TierFull(f"host memory has no room for {columns} more blocks, none can be spilled")
            refused = self._disk.refused - before
            if refused > REFUSALS or not (self._writer.pending or refused):
                failure = self._disk.failure or (self._disk.refusal if refused else None)
                why = "" if failure is None else f": {failure}"
                raise TierFull(f"host memory has no room for {columns} more blocks, none can be spilled{why}")
            if self._writer.pending:
                self._wait_for_a_write(self._disk)
            else:
                time.sleep(REFUSED_S)

    def _wait_for_a_write(self, disk: DiskBackend) -> None:
        ended = disk.spiller.wait(WRITE_DEADLINE_S)
        if not ended:
            raise TierFull(f"no write to disk has ended within {WRITE_DEADLINE_S} s")
        self._settle(ended)
