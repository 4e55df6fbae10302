"""The tiered store: records of all sequences, in the host slab and in runs on disk.

One thread, the engine's, owns all state. The threads of the prefetcher and the spiller only move
bytes; what they move is held until they are done, so neither rows nor disk space are used again
under them.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import residency
from .disk import DiskTier
from .errors import BudgetTooSmall, TierFull, WriteFailed
from .extent import RunKey, extent_bytes
from .host import HostSlab
from .prefetch import Prefetcher, Read, Ticket
from .record import Layout, round_up
from .residency import Holding, Spill
from .spill import Spilled, Spiller
from .system import Bytes
from .table import ABSENT, BlockTable, RunRef

log = logging.getLogger(__name__)

EXTENT_TARGET = 512 << 10
"""Bytes of an extent in a full run: reads of this size come near the disk's sequential rate."""

WRITE_DEADLINE_S = 60.0
"""How long growth waits for a spill to end before it gives up."""

RUN_STEP = 4
"""Runs are multiples of a cell."""

Planner = Callable[[Sequence[Holding], int, int], list[Spill]]


@dataclass(frozen=True)
class DiskPath:
    """The disk tier with the threads that move bytes to it and from it."""

    tier: DiskTier
    spiller: Spiller
    prefetch: Prefetcher

    def close(self) -> None:
        self.prefetch.close()
        self.spiller.close()
        self.tier.close()


@dataclass(frozen=True)
class Outgoing:
    """A run that is being written: its rows stay as they are until the write has ended."""

    table: BlockTable
    ref: RunRef
    rows: npt.NDArray[np.int64]


def run_length(layout: Layout, layers: int, host_rows: int, step_columns: int) -> int:
    """Blocks in a full run: extents of EXTENT_TARGET bytes, or what host memory can spare.

    While one run is being written, host memory must still take another run and what a step seals
    (step_columns blocks in every layer). Raises BudgetTooSmall with the bytes needed.
    """
    columns = host_rows // layers
    spare = (columns - step_columns) // 2 // RUN_STEP * RUN_STEP
    if spare < RUN_STEP:
        needed = (step_columns + 2 * RUN_STEP) * layers * layout.record_bytes
        raise BudgetTooSmall(
            f"the host budget holds {host_rows * layout.record_bytes} bytes of records; "
            f"this model, format and chunk size need at least {needed}"
        )
    return min(spare, round_up(-(-EXTENT_TARGET // layout.record_bytes), RUN_STEP))


class Store:
    """Block tables and the tiers their blocks lie in.

    Blocks are promised before they are sealed, and the sum of all promises never exceeds `capacity`. That
    counts full runs: where many short ones waste disk, growth may still end in TierFull, never in a hang.
    """

    def __init__(
        self,
        layout: Layout,
        layers: int,
        slab: HostSlab,
        run_blocks: int,
        disk: DiskPath | None = None,
        planner: Planner = residency.plan,
    ) -> None:
        self.layout = layout
        self.layers = layers
        self.run_blocks = run_blocks
        self.spill_failure: WriteFailed | None = None
        self._slab = slab
        self._disk = disk
        self._planner = planner
        self._tables: list[BlockTable] = []
        self._outgoing: dict[RunKey, Outgoing] = {}

    # Promises.

    @property
    def capacity(self) -> int:
        """Blocks (in every layer) that host memory and disk hold together."""
        host = self._slab.budget_bytes // self.layout.record_bytes // self.layers
        if self._disk is None or self.spill_failure is not None:
            return host
        run_bytes = self.layers * extent_bytes(self.layout, self.run_blocks)
        return host + self._disk.tier.budget_bytes // run_bytes * self.run_blocks

    @property
    def unpromised(self) -> int:
        """Blocks that may still be promised."""
        return max(0, self.capacity - sum(table.promised for table in self._tables))

    def open(self) -> BlockTable:
        """A table for a new sequence, with nothing promised yet."""
        table = BlockTable(self.layers)
        self._tables.append(table)
        return table

    def promise(self, table: BlockTable, blocks: int) -> None:
        """Let a table grow up to block number `blocks`. On TierFull its promise is what it was."""
        more = blocks - table.promised
        if more > self.unpromised:
            raise TierFull(f"{more} more blocks do not fit beside what is promised; {self.unpromised} do")
        table.reach(blocks)
        table.promised = blocks

    def forget(self, table: BlockTable) -> None:
        """Forget a sequence; rows and runs that are being moved are freed when that has ended."""
        self._tables.remove(table)
        self._empty(table)

    def reset(self, table: BlockTable) -> None:
        """Forget all blocks of a sequence that is to be computed again; its promise stays."""
        self._empty(table)
        table.chain.clear()

    def _empty(self, table: BlockTable) -> None:
        for ref in table.leaving:
            table.rows[:, ref.first : ref.first + ref.count] = ABSENT  # freed when their write has ended
        self._slab.free(table.rows[table.rows >= 0])
        table.rows[:] = ABSENT
        table.sealed = 1
        for ref in table.runs:
            self._need_disk().tier.delete(ref.run)
        table.runs.clear()
        table.leaving.clear()

    # Growth.

    def grow(self, table: BlockTable, hashes: Sequence[bytes]) -> None:
        """Rows in every layer for the next blocks, one chain hash each (block 0 has a hash and no row).

        The step that asks for them seals them; they are not spilled before the settle that follows it.
        May wait for spills. Raises TierFull when no spill can make room; the table is then as before.
        """
        start, stop = table.stop, len(table.chain) + len(hashes)
        columns = max(0, stop - start)
        if stop > table.promised + 1:
            raise ValueError(f"block {stop - 1} was not promised, only {table.promised} are")
        while self._slab.free_slots < columns * self.layers:
            self.make_room(columns)
            if not self._outgoing:
                raise TierFull(f"host memory has no room for {columns} more blocks and none can be spilled")
            ended = self._need_disk().spiller.wait(WRITE_DEADLINE_S)
            if not ended:
                raise TierFull(f"no write to disk has ended within {WRITE_DEADLINE_S} s")
            self._settle(ended)
        if columns:
            table.rows[:, start:stop] = self._slab.allocate(columns * self.layers).reshape(
                self.layers, columns
            )
        table.chain.extend(hashes)

    def make_room(self, columns: int) -> None:
        """Begin the spills that will leave at least `columns` block columns free. Never waits."""
        going = sum(outgoing.ref.count for outgoing in self._outgoing.values())
        short = columns - self._slab.free_slots // self.layers - going
        if short <= 0 or self._disk is None or self.spill_failure is not None:
            return
        holdings = [Holding(table.host_spans(), table.idle) for table in self._tables]
        for spill in self._planner(holdings, short, self.run_blocks):
            try:
                self.spill(self._tables[spill.holding], spill.first, spill.count)
            except TierFull:
                return
            except WriteFailed as failure:
                self._give_up_spilling(failure)
                return

    def spill(self, table: BlockTable, first: int, count: int) -> None:
        """Begin to write blocks [first, first + count) as one run; their rows are freed once it is durable.

        Raises TierFull or WriteFailed when the disk tier has no room; nothing has changed then.
        """
        run = RunKey(uuid.uuid4().bytes)
        disk, end = self._need_disk(), first + count
        place = disk.tier.reserve(run, first=first, count=count, chain_hash=table.chain[end - 1])
        ref = RunRef(run, first, count)
        rows = table.rows[:, first:end].copy()
        table.leaving.append(ref)
        self._outgoing[run] = Outgoing(table, ref, rows)
        disk.spiller.submit(place, self._slab.records, rows)

    def settle(self) -> None:
        """Between steps: all blocks are sealed now, and some writes may have ended.

        Durable runs give up their rows, failed ones keep them.
        """
        for table in self._tables:
            table.sealed = table.stop
        if self._disk is not None:
            self._settle(self._disk.spiller.finished())

    def _settle(self, spilled: Sequence[Spilled]) -> None:
        for ended in spilled:
            outgoing = self._outgoing.pop(ended.run)
            table, ref = outgoing.table, outgoing.ref
            wanted = ref in table.leaving
            if wanted:
                table.leaving.remove(ref)
            if ended.error is not None:
                self._give_up_spilling(ended.error)
            elif wanted:
                table.runs.append(ref)
                table.rows[:, ref.first : ref.first + ref.count] = ABSENT
            else:
                self._need_disk().tier.delete(ref.run)
            if ended.error is None or not wanted:
                self._slab.free(outgoing.rows.ravel())

    def _give_up_spilling(self, failure: WriteFailed) -> None:
        """Degrade to no disk tier: what is on disk stays readable, nothing more goes there."""
        log.error("the disk tier takes no more runs: %s", failure)
        self.spill_failure = failure

    # Scans.

    @property
    def records(self) -> Bytes:
        """The host slab: uint8[rows, record_bytes]."""
        return self._slab.records

    @property
    def memory(self) -> Bytes:
        """The host slab as bytes; a row lies at row * record_bytes."""
        return self._slab.records.reshape(-1)

    def runs_to_read(self, table: BlockTable, visible: range) -> list[RunRef]:
        """The runs of which a scan of the visible blocks needs an extent, oldest first."""
        return [ref for ref in table.runs if len(table.extent_blocks(ref, visible))]

    def submit(self, reads: Sequence[Read]) -> list[Ticket]:
        """Begin reading ahead, in the order in which the records will be asked for."""
        return self._disk.prefetch.submit(reads) if self._disk is not None else []

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        if self._disk is not None:
            self._disk.prefetch.cancel(tickets)

    @property
    def staging_batch(self) -> int:
        """Extents that may be held at once while the other half of the ring goes on being filled."""
        return max(1, self._need_disk().prefetch.buffers // 2)

    @contextmanager
    def staged(self, tickets: Sequence[Ticket]) -> Iterator[tuple[Bytes, list[int]]]:
        """Memory and, per ticket, the byte offset of the extent's first record, while the context lasts.

        Raises ReadFailed if one of them did not come; all are given back in any case.
        """
        prefetch = self._need_disk().prefetch
        try:
            for ticket in tickets:
                prefetch.wait(ticket)
            yield prefetch.memory, [prefetch.offset(ticket) for ticket in tickets]
        except BaseException:
            prefetch.cancel(tickets)
            raise
        for ticket in tickets:
            prefetch.release(ticket)

    # Accounts.

    def usage(self, table: BlockTable) -> dict[str, int]:
        """Record bytes of a sequence by the tier that serves them."""
        column = self.layers * self.layout.record_bytes
        return {"host": table.host_blocks * column, "disk": table.disk_blocks * column}

    def stats(self) -> dict[str, object]:
        """Capacity and use of the tiers in bytes, and what moved between them."""
        values: dict[str, object] = {
            "host_used_bytes": self._slab.used_bytes,
            "host_budget_bytes": self._slab.budget_bytes,
            "promised_blocks": sum(table.promised for table in self._tables),
            "capacity_blocks": self.capacity,
        }
        if self._disk is not None:
            tier, spiller, prefetch = self._disk.tier, self._disk.spiller, self._disk.prefetch
            values |= {
                "disk_used_bytes": tier.used_bytes,
                "disk_budget_bytes": tier.budget_bytes,
                "disk_direct": tier.direct,
                "disk_failure": str(self.spill_failure or ""),
                "disk_written_bytes": spiller.bytes_written,
                "staging_bytes": prefetch.staging_bytes + spiller.scratch_bytes,
                **{f"prefetch_{name}": value for name, value in vars(prefetch.stats).items()},
            }
        return values

    @property
    def disk_read_bytes(self) -> int:
        """Bytes that the prefetcher has read so far."""
        return 0 if self._disk is None else self._disk.prefetch.stats.bytes_read

    @property
    def stall_seconds(self) -> float:
        """How long attention has waited for reads so far."""
        return 0.0 if self._disk is None else self._disk.prefetch.stats.stall_seconds

    def check_integrity(self, tables: Sequence[BlockTable]) -> None:
        """These are all tables; every row belongs to one block of one table or to one write."""
        assert {id(table) for table in tables} == {id(table) for table in self._tables}, "a table is lost"
        self._slab.check_integrity()
        held = [table.rows[table.rows >= 0] for table in self._tables]
        orphans = [o.rows.ravel() for o in self._outgoing.values() if o.ref not in o.table.leaving]
        rows = np.concatenate([np.empty(0, np.int64), *held, *orphans])
        assert len(np.unique(rows)) == len(rows), "two blocks share a row"
        used = self._slab.used_bytes // self.layout.record_bytes
        assert used == len(rows), f"{used} rows are taken, {len(rows)} are known"
        for table in self._tables:
            table.check_integrity()
        if self._disk is not None:
            self._disk.tier.check_integrity()
            assert all(ref.run in self._disk.tier for table in self._tables for ref in table.runs)

    def close(self) -> None:
        """Stop moving bytes; the disk tier forgets its runs."""
        if self._disk is not None:
            self._disk.close()

    def _need_disk(self) -> DiskPath:
        assert self._disk is not None, "there is no disk tier"
        return self._disk
