"""The tiered store: records of all sequences, in the host slab and in runs on disk.

Sealed blocks are written to disk as soon as they fill a run, whether or not host memory is short: when it is,
their rows are free at once, and what was computed outlives the process.

One thread, the engine's, owns all state. The threads of the prefetcher and the spiller only move
bytes; what they move is held until they are done, so neither rows nor disk space are used again
under them.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spilld.offload.disk.files.extent import RunKey, RunPlace, extent_bytes
from spilld.offload.disk.index.index import Contents
from spilld.offload.disk.prefetch import Prefetcher, Read, Ticket
from spilld.offload.disk.tier import DiskTier
from spilld.offload.disk.writer import CLOSE_S, Spilled, Spiller
from spilld.offload.host.promotion import Promotion
from spilld.offload.host.residency import Holding, Spill
from spilld.offload.host.slab import HostSlab
from spilld.offload.maintenance.compaction import Compaction
from spilld.offload.maintenance.wear import WriteBudget
from spilld.offload.prefix_cache.run_cache import RunCache

from .errors import (
    BudgetTooSmall,
    ExtentCorrupt,
    TierFull,
    WriteFailed,
    WriteRefused,
)
from .host import residency
from .record import Layout, round_up
from .size import size
from .system import PAGE, Bytes
from .table import ABSENT, BlockTable, RunRef

log = logging.getLogger(__name__)

EXTENT_TARGET = 512 << 10
"""Bytes of an extent in a full run: reads of this size come near the disk's sequential rate."""

WRITE_DEADLINE_S = 60.0
"""How long growth waits for a spill to end before it gives up."""

RUN_STEP = 4
"""Runs are multiples of a cell."""

PROMOTION_MARGIN = 16
"""Block columns of host memory that stay free when runs are copied back from disk."""

REFUSALS = 3
"""How often growth tries again to spill where the kernel lacks something that passes."""

REFUSED_S = 0.05

WRITES_AHEAD = 2
"""Runs and tails that may wait for the disk before more are written that need not be."""

Planner = Callable[[Sequence[Holding], int, int], list[Spill]]


@dataclass(frozen=True)
class DiskPath:
    """The disk tier, what is cached there, and the threads that move bytes to it and from it."""

    tier: DiskTier
    cache: RunCache
    spiller: Spiller
    prefetch: Prefetcher
    compaction: Compaction | None = None
    wear: WriteBudget | None = None

    @property
    def moving(self) -> bool:
        """A run is on its way to another place on disk."""
        return self.compaction is not None and self.compaction.moving

    def admits(self, content: bytes, nbytes: int, *, again: bool = False) -> bool:
        """Whether a write that nobody waits for may begin, as WriteBudget.admits."""
        return self.wear is None or self.wear.admits(content, nbytes, again=again)

    def spend(self, place: RunPlace) -> None:
        """A run is going to be written."""
        if self.wear is not None:
            self.wear.spend(place.range.nbytes)

    def close(self) -> None:
        self.prefetch.close()
        self.spiller.close()
        if self.compaction is not None:
            self.compaction.close()
        self.tier.close()


@dataclass(frozen=True)
class Outgoing:
    """A run that is being written: its rows stay as they are until the write has ended.

    keep: afterwards too, as the copy that is read.
    """

    table: BlockTable
    ref: RunRef
    rows: npt.NDArray[np.int64]
    keep: bool


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
            f"the host budget holds {size(host_rows * layout.record_bytes)} of records; "
            f"this model, format and chunk size need at least {size(needed, least=True)}"
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
        self._refused = 0
        """Runs that were not written for want of something that passes, and why the last was not."""
        self._refusal: WriteRefused | None = None
        self.promotes = True
        """Runs may be copied back from disk while host memory is free."""
        self.arriving_bytes = 0
        self._slab = slab
        self._disk = disk
        self._planner = planner
        self._tables: list[BlockTable] = []
        self._promised = 0
        """Sum over the tables."""
        self._outgoing: dict[RunKey, Outgoing] = {}
        self._tails: dict[RunKey, tuple[Bytes, RunKey | None]] = {}

    # Promises.

    @property
    def capacity(self) -> int:
        """Blocks (in every layer) that host memory and disk hold together, beside what is pinned."""
        host = self._slab.budget_bytes // self.layout.record_bytes // self.layers
        if self._disk is None or self.spill_failure is not None:
            return host
        run_bytes = self.layers * extent_bytes(self.layout, self.run_blocks)
        free = self._disk.tier.budget_bytes - self._disk.cache.pinned_bytes - self.arriving_bytes
        return host + max(0, free) // run_bytes * self.run_blocks

    @property
    def unpromised(self) -> int:
        """Blocks that may still be promised."""
        return max(0, self.capacity - self._promised)

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
        self._promised += more

    def forget(self, table: BlockTable) -> None:
        """Forget a sequence; rows and runs that are being moved are freed when that has ended."""
        self._tables.remove(table)
        self._promised -= table.promised
        self._empty(table)

    def reset(self, table: BlockTable, *, damaged: bool = False) -> None:
        """Forget all blocks of a sequence that is to be computed again; its promise stays.

        damaged: one of its runs was not what was written, so none of them is trusted any more, for anybody.
        From now on the sequence adopts nothing that was stored before.
        """
        runs = [ref.run for ref in table.runs]
        self._empty(table)
        table.chain.clear()
        table.adopts = False
        if damaged and runs:
            self._need_disk().cache.discard(*runs)

    def _empty(self, table: BlockTable) -> None:
        for ref in table.leaving:
            table.rows[:, ref.columns] = ABSENT  # freed when their write has ended
        self._slab.free(table.rows[table.rows >= 0])
        for ref in table.runs:
            self._need_disk().cache.release(ref.run)
        table.clear()

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
        before = self._refused
        while self._slab.free_slots < columns * self.layers:
            self.make_room(columns)
            if self._slab.free_slots >= columns * self.layers:
                break
            refused = self._refused - before
            if refused > REFUSALS or not (self._outgoing or refused):
                failure = self.spill_failure or (self._refusal if refused else None)
                why = "" if failure is None else f": {failure}"
                raise TierFull(f"host memory has no room for {columns} more blocks, none can be spilled{why}")
            if not self._outgoing:
                time.sleep(REFUSED_S)
                continue
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
        """Give up copies of what is on disk, then begin the spills that will leave at least `columns` block
        columns free. Never waits."""
        self._drop_copies(columns - self._slab.free_slots // self.layers)
        going = sum(outgoing.ref.count for outgoing in self._outgoing.values() if not outgoing.keep)
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

    def relieve(self) -> None:
        """Give host memory back to the kernel: copies of what is on disk, and what was written since the last
        call. Begin to write one more run."""
        self.make_room(self._slab.free_slots // self.layers + self.run_blocks)
        self._slab.give_back()

    def _drop_copies(self, columns: int) -> None:
        """Free rows of blocks that are also on disk, whole runs, the oldest of idle sequences first."""
        if columns <= 0:
            return
        copied = [table for table in self._tables if table.copies]
        for table in sorted(copied, key=lambda table: (not table.idle, -table.host_blocks)):
            for ref in list(table.copies):
                if columns <= 0:
                    return
                columns -= self._drop(table, ref)

    def _drop(self, table: BlockTable, ref: RunRef) -> int:
        table.copies.pop(ref, None)
        rows = table.rows[:, ref.columns]
        copies = rows[0] >= 0
        self._slab.free(rows[:, copies].ravel())
        rows[:] = ABSENT
        return int(copies.sum())

    def spill(self, table: BlockTable, first: int, count: int, *, keep: bool = False) -> None:
        """Begin to write blocks [first, first + count) as one run; their rows are freed once it is durable,
        unless `keep`. What is on disk already, computed by another request, is not written again.

        Raises TierFull or WriteFailed when the disk tier has no room for what is to be written.
        """
        disk = self._need_disk()
        for known in disk.cache.find(table.chain[first : first + count], first) if table.adopts else ():
            self._adopt(table, RunRef(known.run, known.base, first, known.count), keep=keep)
            first, count = first + known.count, count - known.count
        if count:
            self._write(table, first, count, keep=keep)

    def _adopt(self, table: BlockTable, ref: RunRef, *, keep: bool) -> None:
        self._need_disk().cache.acquire([ref.run])
        table.add_runs([ref])
        if not keep:
            self._drop(table, ref)

    def _write(self, table: BlockTable, first: int, count: int, *, keep: bool) -> None:
        run = RunKey(uuid.uuid4().bytes)
        disk, end = self._need_disk(), first + count
        contents = Contents(table.chain[first - 1], tuple(table.chain[first:end]))
        place = disk.cache.reserve(
            run, first=first, count=count, chain=table.chain[end - 1], contents=contents, layout=self.layout
        )
        ref = RunRef(run, first, first, count)
        rows = table.rows[:, first:end].copy()
        table.begin_write(ref)
        self._outgoing[run] = Outgoing(table, ref, rows, keep)
        disk.spend(place)
        disk.spiller.submit(place, self._slab.records, rows)

    def write_behind(self) -> None:
        """Begin to write a full run that lies in host memory only, if the disk has little else to do."""
        if self._disk is None or self.spill_failure is not None or self._disk.spiller.pending >= WRITES_AHEAD:
            return
        for table in self._tables:
            for span in table.host_spans():
                for first in range(span.start, span.stop - self.run_blocks + 1, self.run_blocks):
                    if self._try_to_keep(table, first, self.run_blocks):
                        return

    def save(self, table: BlockTable) -> None:
        """Begin to write every sealed block of a sequence that lies in host memory only."""
        if self._disk is not None and self.spill_failure is None:
            for span in table.host_spans():
                for first in range(span.start, span.stop, self.run_blocks):
                    self._try_to_keep(table, first, min(self.run_blocks, span.stop - first))

    def holds(self, table: BlockTable) -> bool:
        """Whether all sealed blocks of a sequence are on disk, or on their way there."""
        return self._disk is not None and not table.host_spans()

    def _try_to_keep(self, table: BlockTable, first: int, count: int) -> bool:
        """A write that nobody waits for: without room it is left. False if the write budget refuses it."""
        disk, again = self._need_disk(), first < table.offered
        table.offered = max(table.offered, first + count)
        if not disk.admits(table.chain[first], disk.tier.run_bytes(count, self.layout), again=again):
            return False
        try:
            self.spill(table, first, count, keep=True)
        except TierFull as full:
            log.info("blocks are not saved: %s", full)
        except WriteFailed as failure:
            self._give_up_spilling(failure)
        return True

    def settle(self) -> None:
        """Between steps: all blocks are sealed now, and some writes may have ended.

        Durable runs give up their rows, failed ones keep them. While nothing is being written, runs on disk
        move together.
        """
        for table in self._tables:
            table.sealed = table.stop
        if self._disk is not None:
            self._settle(self._disk.spiller.finished())
            if self._disk.compaction is not None:
                idle = self.spill_failure is None and not self._disk.spiller.pending
                self._disk.compaction.step(begin=idle)
            self._disk.tier.write_notes()

    def _settle(self, spilled: Sequence[Spilled]) -> None:
        superseded: list[RunKey] = []
        for ended in spilled:
            if ended.error is not None:
                self._give_up_spilling(ended.error)
            else:
                self._need_disk().cache.enter(self._need_disk().tier.locate(ended.run))
            if ended.run in self._tails:
                _, instead_of = self._tails.pop(ended.run)
                if ended.ok and instead_of is not None:
                    superseded.append(instead_of)
            else:
                self._settle_run(self._outgoing.pop(ended.run), ended.ok)
        if superseded:
            self._need_disk().cache.supersede(*superseded)

    def _settle_run(self, outgoing: Outgoing, durable: bool) -> None:
        table, ref = outgoing.table, outgoing.ref
        wanted = table.end_write(ref)
        if durable and wanted:
            self._need_disk().cache.hold([ref.run])
            if not outgoing.keep:
                table.rows[:, ref.columns] = ABSENT
            table.add_runs([ref])
            if outgoing.keep:
                return
        if durable or not wanted:
            self._slab.free(outgoing.rows.ravel())

    def _give_up_spilling(self, failure: WriteFailed) -> None:
        """Degrade to no disk tier: what is on disk stays readable, nothing more goes there. Only this run has
        failed where the disk has not."""
        if isinstance(failure, WriteRefused):
            self._refused, self._refusal = self._refused + 1, failure
            return
        log.error("the disk tier takes no more runs: %s", failure)
        self.spill_failure = failure

    # What was computed before.

    def find(self, hashes: Sequence[bytes]) -> list[RunRef]:
        """Where blocks 1, 2, ... of a chain lie on disk, as far as they do without a gap. hashes: of blocks
        0, 1, ..."""
        if self._disk is None:
            return []
        found = self._disk.cache.find(hashes[1:], 1)
        return [RunRef(stretch.run, stretch.base, stretch.first, stretch.count) for stretch in found]

    def attach(self, table: BlockTable, refs: Sequence[RunRef], hashes: Sequence[bytes]) -> None:
        """Make stored blocks those of an empty table; hashes: of block 0 and of each of them."""
        self._need_disk().cache.acquire([ref.run for ref in refs])
        table.reach(len(hashes) - 1)
        table.add_runs(refs)
        table.chain.extend(hashes)
        table.sealed = table.stop

    def pin(self, runs: Sequence[RunKey]) -> None:
        """Keep runs that were found until unpin, whatever room is needed."""
        self._need_disk().cache.pin(runs)

    def unpin(self, runs: Sequence[RunKey]) -> None:
        self._need_disk().cache.unpin(runs)

    def prioritise(self, runs: Sequence[RunKey], priority: int) -> None:
        """Runs of a lower priority are evicted first, whatever was used last."""
        if self._disk is not None:
            self._disk.cache.prioritise(runs, priority)

    def tails(self, anchor: bytes) -> list[tuple[RunKey, list[int]]]:
        """Tails after a block: (run, the tokens that follow the block), the newest first."""
        return [] if self._disk is None else self._disk.cache.tails(anchor)

    @property
    def tail_layout(self) -> Layout:
        """How a tail's numbers lie: [64, 2, kv_heads, head_dim], tokens' K and V in the compute dtype."""
        return self.layout.raw

    def save_tail(
        self,
        anchor: bytes,
        tokens: Sequence[int],
        first: int,
        numbers: Bytes,
        instead_of: RunKey | None = None,
    ) -> RunKey | None:
        """Begin to write the exact numbers of a sequence's window; None if the disk has no room, or the write
        budget refuses them.

        numbers: uint8[layers, blocks, bytes of tail_layout], the store's from now on. tokens follow the
        block `anchor`. instead_of: a tail that goes once this one is durable.
        """
        if self._disk is None or self.spill_failure is not None:
            return None
        layers, count, width = numbers.shape
        if not self._disk.admits(b"tail" + anchor, self._disk.tier.run_bytes(count, self.tail_layout)):
            return None
        run = RunKey(uuid.uuid4().bytes)
        contents = Contents(anchor, tokens=tuple(tokens))
        try:
            place = self._disk.cache.reserve(
                run, first=first, count=count, chain=anchor, contents=contents, layout=self.tail_layout
            )
        except TierFull as full:
            log.info("a tail is not saved: %s", full)
            return None
        except WriteFailed as failure:
            self._give_up_spilling(failure)
            return None
        self._tails[run] = numbers, instead_of
        self._disk.spend(place)
        rows = np.arange(layers * count).reshape(layers, count)
        self._disk.spiller.submit(place, numbers.reshape(-1, width), rows)
        return run

    def saving(self, run: RunKey) -> bool:
        """Whether a tail is on its way to disk, and all that was written before it perhaps, too."""
        return run in self._tails

    def read_tail(self, run: RunKey) -> Iterator[Bytes]:
        """Its numbers, uint8[blocks, bytes of tail_layout] for each layer, each valid until the next.

        Nothing else may be under way. Raises ReadFailed.
        """
        for ticket in (tickets := self.submit([Read(run, layer) for layer in range(self.layers)])):
            try:
                yield self._loaded(ticket)
            except BaseException:
                self.cancel(tickets)
                raise
            self._need_disk().prefetch.release(ticket)
        self._need_disk().cache.acquire([run])
        self._need_disk().cache.release(run)

    def _loaded(self, ticket: Ticket) -> Bytes:
        try:
            return self._need_disk().prefetch.wait(ticket)
        except ExtentCorrupt:
            self._need_disk().cache.discard(ticket.read.run)
            raise

    # Scans.

    @property
    def records(self) -> Bytes:
        """The host slab: uint8[rows, record_bytes]."""
        return self._slab.records

    def pin_memory(self, register: Callable[[int, int], None]) -> None:
        """Have a device register the host slab: it is given the address and the bytes, whole pages."""
        register(self.records.ctypes.data, round_up(self.records.nbytes, PAGE))
        self._slab.pinned = True

    @property
    def memory(self) -> Bytes:
        """The host slab as bytes; a row lies at row * record_bytes."""
        return self._slab.records.reshape(-1)

    def runs_to_read(self, table: BlockTable, visible: range) -> list[RunRef]:
        """The runs of which a scan of the visible blocks needs an extent, oldest first."""
        return table.runs_to_read(visible)

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
                self._loaded(ticket)
            yield prefetch.memory, [prefetch.offset(ticket) for ticket in tickets]
        except BaseException:
            prefetch.cancel(tickets)
            raise
        for ticket in tickets:
            prefetch.release(ticket)

    def promotion(self, table: BlockTable, runs: Iterable[RunRef]) -> Promotion:
        """Of one of these runs of a sequence that lies on disk only, or several short ones, if host memory is
        free beyond what growth and spills want. To be ended before anything else is asked of the store."""
        spare = self._slab.free_slots // self.layers - 2 * self.run_blocks - PROMOTION_MARGIN
        columns = min(spare, self.run_blocks) if self.promotes else 0
        return Promotion(self._slab, self.layers, table, runs, columns)

    # Accounts.

    @property
    def host_budget_bytes(self) -> int:
        """Records that host memory holds."""
        return self._slab.budget_bytes

    @property
    def column_bytes(self) -> int:
        """Bytes of one block in every layer."""
        return self.layers * self.layout.record_bytes

    def usage(self, table: BlockTable) -> dict[str, int]:
        """Record bytes of a sequence by the tier that serves them."""
        return {
            "host": table.host_blocks * self.column_bytes,
            "disk": table.disk_blocks * self.column_bytes,
        }

    @property
    def writing(self) -> bool:
        """Runs or tails are on their way to disk, or to another place there."""
        return bool(self._outgoing or self._tails) or (self._disk is not None and self._disk.moving)

    def stats(self) -> dict[str, object]:
        """Capacity and use of the tiers in bytes, and what moved between them."""
        values: dict[str, object] = {
            "host_used_bytes": self._slab.used_bytes,
            "host_budget_bytes": self._slab.budget_bytes,
            "promised_blocks": self._promised,
            "capacity_blocks": self.capacity,
        }
        if self._disk is not None:
            tier, spiller, prefetch = self._disk.tier, self._disk.spiller, self._disk.prefetch
            compaction = self._disk.compaction
            values |= {
                "disk_used_bytes": tier.used_bytes,
                "disk_index_bytes": tier.index.nbytes,
                "disk_budget_bytes": tier.budget_bytes,
                "disk_hole_bytes": tier.hole_bytes,
                "disk_direct": tier.direct,
                "disk_cached_bytes": self._disk.cache.cached_bytes,
                "disk_failure": str(self.spill_failure or ""),
                "disk_written_bytes": self.disk_written_bytes,
                "disk_failed_writes": spiller.failures,
                "disk_evicted_runs": self._disk.cache.evicted_runs,
                "disk_moved_bytes": compaction.bytes_moved if compaction else 0,
                "staging_bytes": prefetch.staging_bytes
                + spiller.scratch_bytes
                + (compaction.scratch_bytes if compaction else 0),
                **{f"prefetch_{name}": value for name, value in vars(prefetch.stats).items()},
            }
            if (wear := self._disk.wear) is not None:
                values |= {
                    "disk_write_budget_bytes": wear.daily_bytes,
                    "disk_write_left_bytes": wear.left_bytes,
                    "disk_writes_refused": wear.refused,
                }
        return values

    @property
    def disk_read_bytes(self) -> int:
        """Bytes that the prefetcher has read so far."""
        return 0 if self._disk is None else self._disk.prefetch.stats.bytes_read

    @property
    def disk_written_bytes(self) -> int:
        """Bytes that spills and saves have written so far."""
        return 0 if self._disk is None else self._disk.spiller.bytes_written

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
            uses = Counter(ref.run for table in self._tables for ref in table.runs)
            self._disk.cache.check_integrity(uses)
        assert self._promised == sum(table.promised for table in self._tables), "a promise is lost"

    def close(self) -> None:
        """Finish the writes that were begun, unless the disk takes longer than CLOSE_S, and stop."""
        if self._disk is not None:
            give_up = time.monotonic() + CLOSE_S
            while (self._outgoing or self._tails) and (left := give_up - time.monotonic()) > 0:
                self._settle(self._disk.spiller.wait(left))
            self._disk.close()

    @property
    def disk(self) -> DiskPath | None:
        """Where runs lie, for those that come from elsewhere or go there."""
        return self._disk

    def _need_disk(self) -> DiskPath:
        assert self._disk is not None, "there is no disk tier"
        return self._disk
