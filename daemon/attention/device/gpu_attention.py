"""Attention where a device has the windows and the hottest records.

Kernels attend over the window, over hot records and over such as are fetched for one call; meanwhile the CPU
attends over the other records in host memory, where they lie, and over what comes from disk. All are partials
that merge exactly. Queries, K and V cross to host memory and results go back to where torch has them: what
crosses for a layer is little beside its weights. `cpu()` waits for torch's stream and `Landing.settle` for
ours, so neither stream need wait for the other.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from spilld.attention.base import Scans
from spilld.attention.records import Floats, StoredAttention
from spilld.cuda_ext.choice import Costs, to_fetch
from spilld.cuda_ext.compile.variant import ROWS
from spilld.cuda_ext.device.base import (
    Copy,
    Device,
    Event,
    Stream,
)
from spilld.cuda_ext.errors import LaunchFailed, OutOfMemory
from spilld.cuda_ext.flash import Flash
from spilld.cuda_ext.memory.cpu_windows import element_view
from spilld.cuda_ext.memory.record_pool import RecordPool
from spilld.cuda_ext.memory.staging import Landing
from spilld.cuda_ext.memory.windows import Numbers, Windows
from spilld.cuda_ext.ops import (
    Ops,
    Queries,
    Ranges,
    Records,
)
from spilld.kv.batch import Blocks, Call, Slice
from spilld.kv.sequence import Sequence
from spilld.kv.visibility import (
    BLOCKS_PER_CELL,
    CELL,
    SINKS,
    sealed_by,
    segments,
    slot,
    stored_blocks,
)
from spilld.offload.kernels.attention.partial import merge
from spilld.offload.record import BLOCK, Layout
from spilld.offload.store import Store

from .block_cache import PASSING, HotBlocks, Slots

TRIES, PAUSE_S = 100, 0.05
"""For an event behind what must be over."""


class Held(NamedTuple):
    """Stored blocks that lie on the device for a call, or are on their way, and their slots."""

    blocks: Blocks
    slots: Slots


class DeviceAttention:
    """Composes the partials of every tier where a device has the first."""

    def __init__(
        self,
        device: Device[Any],
        ops: Ops,
        windows: Windows,
        pool: RecordPool,
        landing: Landing,
        store: Store,
        costs: Costs,
        flash: Flash | None,
    ) -> None:
        """The store's records lie in memory that the device has registered. flash: what prompts take.

        Raises ValueError if the pool is too small.
        """
        self._device, self._ops, self._flash = device, ops, flash
        self._windows, self._landing = windows, landing
        self._pool, self._hot = pool, HotBlocks(pool, windows.shape.layers)
        self._store, self._stored, self._costs = store, StoredAttention(store), costs
        self._sealed: list[Event] = []
        """Behind records on their way to host memory."""
        self.calls = 0

    @property
    def layout(self) -> Layout:
        return self._store.layout

    @property
    def device_bytes(self) -> int:
        return self._pool.budget_bytes + self._working_bytes

    @property
    def device_used_bytes(self) -> int:
        return self._pool.used_bytes + self._working_bytes

    @property
    def _working_bytes(self) -> int:
        """Taken as long as the daemon runs."""
        return self._landing.nbytes + (self._flash.nbytes if self._flash else 0)

    def reads(self, part: Slice, layer: int, blocks: Blocks) -> bool:
        return bool((self._hot.slots(part.sequence, layer, blocks) < 0).any())

    def forget(self, sequence: Sequence) -> None:
        self._hot.drop(sequence)

    def check_integrity(self, sequences: Many[Sequence]) -> None:
        self._pool.check_integrity()
        self._hot.check_integrity(sequences)

    def close(self) -> None:
        self._device.close()

    def scans(self, slices: Many[Slice], windows: Many[int | None]) -> Scans:
        return {}

    def attend_rows(self, heads: Floats, scans: Scans, calls: Many[Call], out: Floats, lse: Floats) -> None:
        kv_heads = self._windows.shape.kv_heads
        for row, call in enumerate(calls):
            q, k, v = torch.split(torch.from_numpy(heads[row, :, None]), [out.shape[1], kv_heads, kv_heads])
            out[row] = self.attend(q, k, v, call)[0]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        part = call.part
        self.calls += 1
        if part.failure is None:
            with self._stored.failing(part):
                try:
                    return self._attend(q.cpu(), k.cpu(), v.cpu(), call).to(q.device)
                except Exception:
                    self._settle_surely()  # what work still uses may soon be another's
                    raise
        return torch.zeros(part.count, q.shape[0], q.shape[2], device=q.device)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Cell by cell, as cells are sealed on the way; the CPU's share while the device has the last."""
        part = call.part
        queries = q.transpose(0, 1).float().contiguous().numpy()
        keys, values = (element_view(x.to(self._windows.shape.dtype).contiguous()) for x in (k, v))
        out, lse = np.zeros_like(queries), np.full(queries.shape[:2], -np.inf, np.float32)
        here = part.in_host(call.window)
        with self._passing(call, here) as passing:
            for start, stop in segments(part.position, part.last + 1):
                these = slice(start - part.position, stop - part.position)
                self._seal_before(start, call)
                held = self._held(call, passing)
                found = self._launch(queries[these], keys[:, these], values[:, these], call, start, held)
                if stop > part.last:
                    self._settle()
                    rest = here[~np.isin(here, held.blocks)]
                    self._stored.merge(queries, call, rest, held.blocks, out, lse)
                self._landing.settle()
                merge(out[these], lse[these], *found)
        return torch.from_numpy(out)

    def _launch(
        self, q: Floats, k: Numbers, v: Numbers, call: Call, start: int, held: Held
    ) -> tuple[Floats, Floats]:
        """Queries of one cell, the first at position `start`, over their window, which takes their K and V,
        and the held records: out and lse, there once landing has settled."""
        part, ops, landing, shape = call.part, self._ops, self._landing, self._windows.shape
        window, planes = part.sequence.window, self._windows.address(part.sequence.window, call.layer)
        count = len(q)
        low, high = (x[start - part.position :][:count] for x in part.bounds(call.window))
        ranges = part.ranges(start, start + count, call.window)
        seen = (held.blocks * BLOCK < high.max()) & ((held.blocks + 1) * BLOCK > low.min())
        places, positions = held.slots[seen] * self._pool.record_bytes, held.blocks[seen] * BLOCK
        tokens, blocks = int(np.diff(ranges[-1]).sum()), len(places)
        part.read_bytes["device"] += tokens * shape.layer_bytes // shape.slots
        part.read_bytes["device"] += blocks * self._pool.record_bytes
        flash = self._flash if blocks and self._is_prompt(call, count) else None
        tiles, others = ops.parts(ops.tiles, count), 1 if flash else ops.parts(blocks, count)
        with (
            landing.turn(),
            self._windows.arena.use(Stream.COMPUTE, writes=[window]),
            self._pool.use(Stream.COMPUTE, reads=held.slots.tolist()),
        ):
            at = landing.bring(q, k, v, ranges, low, high, places, positions)
            self._device.copy(Stream.COMPUTE, list(self._appends(planes, at[1:3], start, count)))
            queries = Queries(at[0], count)
            partial = ops.room(landing, tiles + others, count)
            exact, stored = ops.split(partial, tiles, count)
            ops.attend_window(
                exact, queries, planes, Ranges(at[3], ranges.shape[1]), call.scale, call.softcap
            )
            if blocks:
                rotated = ops.rotate(landing.room(q.shape), queries) if ops.rotates else queries
                records = Records(self._pool.address(0), at[6], at[7], blocks)
                if flash:
                    flash.attend(stored, rotated, records, call.scale)
                else:
                    ops.attend_records(stored, rotated, records, at[4], at[5], call.scale, call.softcap)
            out, lse = landing.room(q.shape), landing.room(q.shape[:2])
            ops.merge(out, lse, partial, queries)
            return landing.fetch(out, q.shape), landing.fetch(lse, q.shape[:2])

    @staticmethod
    def _is_prompt(call: Call, queries: int) -> bool:
        """More queries than a kernel of ours has at a time, and each sees all of a record that one sees."""
        return queries > ROWS and call.window is None and not call.softcap

    def _appends(self, planes: int, sources: Many[int], start: int, count: int) -> Iterator[Copy]:
        """K and V of tokens within one cell, [kv_heads, count, head_dim] each, into the window."""
        shape = self._windows.shape
        token = shape.head_dim * shape.dtype.itemsize
        for which, source in enumerate(sources):
            for head in range(shape.kv_heads):
                row = planes + (which * shape.kv_heads + head) * shape.slots * token
                mine = source + head * count * token
                yield Copy(row + slot(start) * token, mine, count * token)
                if start < SINKS:
                    yield Copy(row + start * token, mine, min(SINKS - start, count) * token)

    def _seal_before(self, start: int, call: Call) -> None:
        """If a cell begins at `start`, pack the one whose half of the window it takes, if there is one, into
        records: for host memory, and to stay here as long as there is room."""
        if start % CELL or start < 2 * CELL:
            return
        sequence, cell = call.part.sequence, start // CELL - 2
        blocks = np.arange(max(1, cell * BLOCKS_PER_CELL), (cell + 1) * BLOCKS_PER_CELL)
        with self._taken(len(blocks)) as slots:
            places, firsts = (
                slots * self._pool.record_bytes,
                np.array([slot(b * BLOCK) for b in blocks.tolist()]),
            )
            with (
                self._landing.turn(),
                self._windows.arena.use(Stream.COMPUTE, reads=[sequence.window]),
                self._pool.use(Stream.COMPUTE, writes=slots.tolist()),
            ):
                places_at, firsts_at = self._landing.bring(places, firsts)
                planes = self._windows.address(sequence.window, call.layer)
                self._ops.seal(self._pool.address(0), places_at, planes, firsts_at, len(blocks))
            rows = self._host(call, blocks)
            self._sealed.append(self._pool.drain(slots.tolist(), rows))
            staying = self._staying(len(blocks), call)
            self._hot.keep(sequence, call.layer, blocks[:staying], slots[:staying])
            slots[:staying] = -1

    @contextmanager
    def _passing(self, call: Call, here: Blocks) -> Iterator[Held]:
        """Fetch as many cold records as that is sooner than attending to them where they lie; as many as
        there is room for stay, those it gives only as long as the scope lasts."""
        part = call.part
        sealed = here[here < sealed_by(part.position - 1)] if part.position else here[:0]
        cold = sealed[self._hot.slots(part.sequence, call.layer, sealed) < 0]
        room = max(0, self._hot.room) + PASSING
        rates = self._costs.rates(part.count, flash=self._is_prompt(call, part.count))
        fetched = cold[: to_fetch(len(cold), self._pool.record_bytes, rates, room)]
        with self._taken(len(fetched)) as slots:
            try:
                self._pool.fill(slots.tolist(), self._host(call, fetched))
            except OutOfMemory:
                yield Held(fetched[:0], slots[:0])  # the CPU attends to them
                return
            part.read_bytes["host"] += len(fetched) * self._pool.record_bytes
            staying = self._staying(len(fetched), call)
            self._hot.keep(part.sequence, call.layer, fetched[:staying], slots[:staying])
            passing = Held(fetched[staying:], slots[staying:].copy())
            slots[:staying] = -1
            yield passing

    def _staying(self, taken: int, call: Call) -> int:
        """How many of so many slots that were taken are kept. What slides out of sight is not worth one."""
        return 0 if call.window is not None else min(taken, max(0, taken + self._hot.room))

    @contextmanager
    def _taken(self, count: int) -> Iterator[Slots]:
        """Slots of the pool for as long as the scope lasts, but for those that it overwrites by -1."""
        slots = np.array(self._pool.take(count), np.int64)
        try:
            yield slots
        finally:
            self._pool.give_back(slots[slots >= 0].tolist())

    def _held(self, call: Call, passing: Held) -> Held:
        """What is visible to the call and lies on the device, wherever else it lies."""
        part = call.part
        stored = stored_blocks(part.position, part.last, call.window)
        visible = np.arange(stored.start, stored.stop)
        slots = self._hot.slots(part.sequence, call.layer, visible)
        hot = slots >= 0
        blocks = np.concatenate([visible[hot], passing.blocks])
        return Held(blocks, np.concatenate([slots[hot], passing.slots]))

    def _host(self, call: Call, blocks: Blocks) -> list[int]:
        """Addresses of a layer's records in host memory."""
        rows = call.part.sequence.table.rows[call.layer, blocks]
        addresses: list[int] = (self._store.records.ctypes.data + rows * self._pool.record_bytes).tolist()
        return addresses

    def _settle(self) -> None:
        """Have all records in host memory that are on their way there. Raises OutOfMemory."""
        while self._sealed:
            self._sealed[-1].synchronise()
            self._sealed.pop()

    def _settle_surely(self) -> None:
        """Have all work of a call done, on every stream. Raises LaunchFailed if that is not to be had."""
        for _ in range(TRIES):
            with contextlib.suppress(OutOfMemory):
                self._pool.settle()
                self._sealed.clear()  # it was work on the pool
                self._landing.settle()
                return
            time.sleep(PAUSE_S)
        raise LaunchFailed("the device has had no memory for an event for too long; restart the daemon")
