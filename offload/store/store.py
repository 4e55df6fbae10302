"""The tiered store: records of all sequences, in the host slab and in runs on disk.

Sealed blocks are written to disk as soon as they fill a run, whether or not host memory is short: when it is,
their rows are free at once, and what was computed outlives the process.

One thread, the engine's, owns all state. The threads of the prefetcher and the spiller only move
bytes; rows and disk space are not used again before these threads have finished with them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from spilld.offload.block_table import ABSENT, BlockTable, RunRef
from spilld.offload.disk.files.extent import RunKey
from spilld.offload.disk.read_ticket import ExtentRead, Ticket
from spilld.offload.disk.spiller import CLOSE_S, Spilled
from spilld.offload.errors import TierFull, WriteFailed
from spilld.offload.host import residency
from spilld.offload.host.promotion import Promotion
from spilld.offload.host.slab import HostSlab
from spilld.offload.record import Layout, round_up
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import PAGE, Bytes

from .block_writer import BlockWriter
from .checkpoints import Checkpoints
from .disk_backend import DiskBackend
from .host_space import HostSpace, Planner

PROMOTION_MARGIN = 16
"""Block columns of host memory that stay free when runs are copied back from disk."""


class Store:
    """Block tables and the tiers their blocks lie in.

    Blocks are reserved before they are sealed, and the sum of all reservations never exceeds `capacity`. That
    counts full runs: where many short ones waste disk, growth may still end in TierFull, never in a hang.

    Attributes:
        layouts: Of the records.
        run_blocks: Blocks of a full run.
        promotes: Runs may be copied back from disk while host memory is free.
        importing_bytes: Bytes of runs that are being imported.
        checkpoints: Checkpoints of windows, from which sequences go on beside their sealed blocks.
    """

    def __init__(
        self,
        layouts: StoreLayout,
        slab: HostSlab,
        run_blocks: int,
        disk: DiskBackend | None = None,
        planner: Planner = residency.plan,
    ) -> None:
        self.layouts = layouts
        self.run_blocks = run_blocks
        self.promotes = True
        self.importing_bytes = 0
        self._slab = slab
        self._disk = disk
        self._tables: list[BlockTable] = []
        self._reserved = 0
        """Sum of the tables' reservations."""
        self._writer = None if disk is None else BlockWriter(disk, slab, layouts, run_blocks)
        self._room = HostSpace(
            slab, self._tables, run_blocks, disk, self._writer, planner, settle=self._settle
        )
        self.checkpoints = Checkpoints(disk, layouts.raw)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.layouts)

    @property
    def layout(self) -> Layout:
        """The layout of the records of every layer.

        Raises:
            ValueError: The layers differ.
        """
        return self.layouts.alike

    @property
    def disk(self) -> DiskBackend | None:
        """The disk backend, for exports and imports of runs; None without a disk tier."""
        return self._disk

    # Reservations.

    @property
    def capacity(self) -> int:
        """Blocks (in every layer) that host memory and disk hold, beside pinned runs and imports."""
        host = self._slab.n_columns
        if self._disk is None or self._disk.failure is not None:
            return host
        tier = self._disk.tier
        free = tier.budget_bytes - self._disk.cache.pinned_bytes - self.importing_bytes
        return host + max(0, free) // tier.run_bytes(self.run_blocks) * self.run_blocks

    @property
    def unreserved(self) -> int:
        """Blocks that may still be reserved."""
        return max(0, self.capacity - self._reserved)

    def open(self) -> BlockTable:
        """Return a table for a new sequence, with nothing reserved yet."""
        table = BlockTable(self.layers)
        self._tables.append(table)
        return table

    def reserve(self, table: BlockTable, blocks: int) -> None:
        """Let a table grow up to block number `blocks`.

        Raises:
            TierFull: There is no room for them; the reservation is unchanged then.
        """
        more = blocks - table.reserved
        if more > self.unreserved:
            raise TierFull(f"{more} more blocks do not fit beside what is reserved; {self.unreserved} do")
        table.reach(blocks)
        table.reserved = blocks
        self._reserved += more

    def forget(self, table: BlockTable) -> None:
        """Forget a sequence; rows and runs that are being moved are freed when that has ended."""
        self._tables.remove(table)
        self._reserved -= table.reserved
        self._empty(table)

    def reset(self, table: BlockTable, *, damaged: bool = False) -> None:
        """Forget all blocks of a sequence that is to be computed again; its reservation stays.

        From now on the sequence adopts nothing that was stored before.

        Args:
            table: The sequence's.
            damaged: One of its runs was not what was written, so none of them is trusted any more, for any
                sequence.
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
        self._slab.free(table.rows[:, table.rows[0] >= 0])
        for ref in table.runs:
            self._need_disk().cache.release(ref.run)
        table.clear()

    # Growth.

    def grow(self, table: BlockTable, hashes: Sequence[bytes]) -> None:
        """Take rows in every layer for the next blocks, one chain hash each (block 0 has a hash and no row).

        The step that asks for them seals them; they are not spilled before the settle that follows it.
        May wait for spills.

        Args:
            table: The sequence's.
            hashes: The chain hashes of the next blocks.

        Raises:
            TierFull: No spill can make room; the table is then as before.
            ValueError: A block was not reserved.
        """
        start, stop = table.stop, len(table.chain) + len(hashes)
        if stop > table.reserved + 1:
            raise ValueError(f"block {stop - 1} was not reserved, only {table.reserved} are")
        if stop > start:
            table.rows[:, start:stop] = self._room.allocate(stop - start)
        table.chain.extend(hashes)

    def make_room(self, columns: int) -> None:
        """Begin to make room for at least `columns` block columns; never waits.

        Copies of what is on disk are dropped; then spills are begun that will leave so many columns free.
        """
        self._room.make(columns)

    def relieve(self) -> None:
        """Give host memory back to the kernel, and begin to write one more run.

        What is given back are copies of what is on disk, and what was written since the last call.
        """
        self._room.relieve()

    def spill(self, table: BlockTable, first: int, count: int, *, keep: bool = False) -> None:
        """Begin to write blocks [first, first + count) as one run.

        What is on disk already, computed by another request, is not written again.

        Args:
            table: The sequence's.
            first: The first block.
            count: How many blocks there are.
            keep: Whether the rows stay once the run is durable; otherwise they are freed then.

        Raises:
            TierFull: The disk tier has no room for what is to be written.
            WriteFailed: The files cannot be made or grown.
        """
        assert self._writer is not None, "there is no disk tier"
        self._writer.spill(table, first, count, keep=keep)

    def write_behind(self) -> None:
        """Begin to write a full run that lies in host memory only, if the disk has little else to do."""
        if self._writer is not None:
            self._writer.write_behind(self._tables)

    def save(self, table: BlockTable) -> None:
        """Begin to write every sealed block of a sequence that lies in host memory only."""
        if self._writer is not None:
            self._writer.save(table)

    def holds(self, table: BlockTable) -> bool:
        """Return whether all sealed blocks of a sequence are on disk, or being written to it."""
        return self._disk is not None and not table.host_spans()

    def settle(self) -> None:
        """Take in what has ended; to be called between steps, when all blocks are sealed.

        Durable runs give up their rows, failed ones keep them. While nothing is being written, runs on disk
        move together.
        """
        for table in self._tables:
            table.sealed = table.stop
        if self._disk is not None:
            self._settle(self._disk.spiller.finished())
            self._disk.compact()
            self._disk.tier.write_notes()

    def _settle(self, spilled: Sequence[Spilled]) -> None:
        if self._disk is None or self._writer is None:
            return
        self._disk.take_in(spilled)
        superseded: list[RunKey] = []
        for ended in spilled:
            if ended.run in self._writer.pending:
                self._writer.settle(ended)
            elif (old := self.checkpoints.settle(ended)) is not None:
                superseded.append(old)
        if superseded:
            self._disk.cache.supersede(*superseded)

    @property
    def spill_failure(self) -> WriteFailed | None:
        """Why nothing more is written to disk; None while it is."""
        return None if self._disk is None else self._disk.failure

    # Blocks that were computed before.

    def find(self, hashes: Sequence[bytes]) -> list[RunRef]:
        """Return where blocks 1, 2, ... of a chain lie on disk, as far as they do without a gap.

        Args:
            hashes: The chain hashes of blocks 0, 1, ...
        """
        return [] if self._disk is None else self._disk.cache.find(hashes[1:], 1)

    def attach(self, table: BlockTable, refs: Sequence[RunRef], hashes: Sequence[bytes]) -> None:
        """Make stored blocks those of an empty table.

        Args:
            table: The sequence's.
            refs: The stored blocks, as `find` returned them.
            hashes: The chain hashes of block 0 and of each of them.
        """
        self._need_disk().cache.acquire([ref.run for ref in refs])
        table.reach(len(hashes) - 1)
        table.add_runs(refs)
        table.chain.extend(hashes)
        table.sealed = table.stop

    def pin(self, runs: Sequence[RunKey]) -> None:
        """Keep runs that were found until `unpin`, whatever room is needed."""
        self._need_disk().cache.pin(runs)

    def unpin(self, runs: Sequence[RunKey]) -> None:
        """Undo a call of `pin`."""
        self._need_disk().cache.unpin(runs)

    def prioritise(self, runs: Sequence[RunKey], priority: int) -> None:
        """Set the priority of runs: those of a lower one are evicted first, whatever was used last."""
        if self._disk is not None:
            self._disk.cache.prioritise(runs, priority)

    # Scans.

    def records(self, layer: int) -> Bytes:
        """Return the host slab as uint8 [rows, record_bytes] of a layer: not all rows are that layer's."""
        return self._slab.records[layer]

    @property
    def memory(self) -> Bytes:
        """The host slab as bytes; a row lies at row * record_bytes of its layer."""
        return self._slab.memory

    def pin_memory(self, register: Callable[[int, int], None]) -> None:
        """Have a device register the host slab: calls `register` with its address and bytes, whole pages."""
        register(self.memory.ctypes.data, round_up(self.memory.nbytes, PAGE))
        self._slab.pinned = True

    def runs_to_read(self, table: BlockTable, visible: range) -> list[RunRef]:
        """Return the runs of which a scan of the visible blocks needs an extent, the oldest first."""
        return table.runs_to_read(visible)

    def submit(self, reads: Sequence[ExtentRead]) -> list[Ticket]:
        """Begin reading ahead, in the order in which the records will be asked for."""
        return self._disk.prefetch.submit(reads) if self._disk is not None else []

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """Forget reads; see Prefetcher.cancel."""
        if self._disk is not None:
            self._disk.prefetch.cancel(tickets)

    @property
    def staging_batch(self) -> int:
        """Extents that may be in use at once while the other half of the ring goes on being filled."""
        return max(1, self._need_disk().prefetch.buffers // 2)

    @contextmanager
    def staged(self, tickets: Sequence[Ticket]) -> Iterator[tuple[Bytes, list[int]]]:
        """Wait for reads and give their memory while the context lasts.

        All tickets are released in any case.

        Yields:
            The staging memory and, per ticket, the byte offset of the extent's first record in it.

        Raises:
            ReadFailed: One of the reads failed.
        """
        disk, prefetch = self._need_disk(), self._need_disk().prefetch
        try:
            for ticket in tickets:
                disk.loaded(ticket)
            yield prefetch.memory, [prefetch.offset(ticket) for ticket in tickets]
        except BaseException:
            prefetch.cancel(tickets)
            raise
        for ticket in tickets:
            prefetch.release(ticket)

    def promotion(self, table: BlockTable, runs: Iterable[RunRef]) -> Promotion:
        """Begin to copy runs back into host memory, if more is free there than growth and spills want.

        One of the runs that lie on disk only is chosen, or several short ones. The promotion has to be ended
        before anything else is asked of the store.
        """
        spare = self._slab.free_columns - 2 * self.run_blocks - PROMOTION_MARGIN
        columns = min(spare, self.run_blocks) if self.promotes else 0
        return Promotion(self._slab, table, runs, columns)

    # Statistics.

    @property
    def host_budget_bytes(self) -> int:
        """Bytes of records that host memory holds."""
        return self._slab.budget_bytes

    @property
    def column_bytes(self) -> int:
        """Bytes of one block in every layer."""
        return self.layouts.column_bytes

    def usage(self, table: BlockTable) -> dict[str, int]:
        """Return the record bytes of a sequence by the tier that serves them."""
        return {
            "host": table.host_blocks * self.column_bytes,
            "disk": table.disk_blocks * self.column_bytes,
        }

    @property
    def writing(self) -> bool:
        """Whether runs or checkpoints are being written to disk, or moved there."""
        return self._pending or (self._disk is not None and self._disk.moving)

    @property
    def _pending(self) -> bool:
        return bool(self.checkpoints.pending) or (self._writer is not None and bool(self._writer.pending))

    def stats(self) -> dict[str, object]:
        """Return capacity and use of the tiers in bytes, and what moved between them."""
        values: dict[str, object] = {
            "host_used_bytes": self._slab.used_bytes,
            "host_budget_bytes": self._slab.budget_bytes,
            "reserved_blocks": self._reserved,
            "capacity_blocks": self.capacity,
        }
        return values if self._disk is None else values | self._disk.stats()

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
        """Seconds that attention has waited for reads so far."""
        return 0.0 if self._disk is None else self._disk.prefetch.stats.stall_seconds

    def check_integrity(self, tables: Sequence[BlockTable]) -> None:
        """Check that these are all tables, and that every row belongs to one block or to one write."""
        assert {id(table) for table in tables} == {id(table) for table in self._tables}, "a table is lost"
        assert self._reserved == sum(table.reserved for table in self._tables), "a reservation is lost"
        self._slab.check_integrity()
        pending = [] if self._writer is None else list(self._writer.pending.values())
        in_tables = [table.rows[:, table.rows[0] >= 0] for table in self._tables]
        orphans = [write.rows for write in pending if write.ref not in write.table.leaving]
        rows = np.concatenate([np.empty((self.layers, 0), np.int64), *in_tables, *orphans], axis=1)
        places = rows * np.array(self.layouts.record_bytes)[:, None]
        assert len(np.unique(places)) == places.size, "two blocks share a row"
        used = self._slab.used_bytes // self.column_bytes
        assert used == rows.shape[1], f"{used} columns are taken, {rows.shape[1]} are known"
        for table in self._tables:
            table.check_integrity()
        if self._disk is not None:
            self._disk.tier.check_integrity()
            uses = Counter(ref.run for table in self._tables for ref in table.runs)
            self._disk.cache.check_integrity(uses)

    def close(self) -> None:
        """Finish the writes that were begun, unless the disk takes longer than CLOSE_S, and stop."""
        if self._disk is not None:
            give_up = time.monotonic() + CLOSE_S
            while self._pending and (left := give_up - time.monotonic()) > 0:
                self._settle(self._disk.spiller.wait(left))
            self._disk.close()

    def _need_disk(self) -> DiskBackend:
        assert self._disk is not None, "there is no disk tier"
        return self._disk
