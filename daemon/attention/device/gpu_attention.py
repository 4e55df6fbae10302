"""Attention where a device has the KV windows and a copy of some blocks.

Kernels attend over the KV window, over records that stay on the device and over records that are fetched for
one call; meanwhile the CPU attends over the other records in host memory, where they lie, and over what comes
from disk. All are partials that merge exactly. Queries, K and V cross to host memory and results go back to
where torch has them: what crosses for a layer is little beside its weights. `cpu()` waits for torch's stream
and `Staging.settle` for ours, so neither stream need wait for the other.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from spilld.attention.base import Attention, AttentionPlan
from spilld.attention.records import Floats, RecordAttention
from spilld.attention.sink_logits import join_sink_logits
from spilld.cuda_ext.compile.variant import ROWS
from spilld.cuda_ext.device.base import (
    Copy,
    Device,
    DeviceEvent,
    Stream,
)
from spilld.cuda_ext.errors import LaunchFailed, OutOfMemory
from spilld.cuda_ext.flash import Flash
from spilld.cuda_ext.memory.cpu_windows import element_view
from spilld.cuda_ext.memory.record_pool import RecordPool
from spilld.cuda_ext.memory.staging import Staging
from spilld.cuda_ext.memory.windows import KVWindows, Numbers
from spilld.cuda_ext.ops import (
    Ops,
    Queries,
    Records,
    WindowRanges,
)
from spilld.cuda_ext.transfer_costs import Costs, to_fetch
from spilld.kv.attention_metadata import Blocks, VisibleKV
from spilld.kv.attention_span import (
    SINKS,
    sealed_before,
    sealed_by,
    segments,
    window_offset,
)
from spilld.kv.batch import Batch, BatchItem
from spilld.kv.geometry import Geometry
from spilld.kv.sequence import KVSequence
from spilld.offload.kernels.attention.partial import merge
from spilld.offload.record import BLOCK
from spilld.offload.store.store import Store

from .block_cache import PASSING, DeviceBlockCache, Slots

TRIES, PAUSE_S = 100, 0.05
"""How often, and after how many seconds, an event is requested again behind work that must end."""


class OnDevice(NamedTuple):
    """Stored blocks that lie on the device for a call, or are on their way, and their slots of the pool."""

    blocks: Blocks
    slots: Slots


class ItemCall(NamedTuple):
    """One layer's attention for one item."""

    layer: int
    seen: VisibleKV
    plan: AttentionPlan

    @property
    def item(self) -> BatchItem:
        """The batch item."""
        return self.seen.item


class DeviceAttention(Attention):
    """Composes the partials of every tier where a device has the first."""

    def __init__(
        self,
        geometry: Geometry,
        store: Store,
        device: Device[Any],
        ops: Ops,
        windows: KVWindows,
        pool: RecordPool,
        staging: Staging,
        costs: Costs,
        flash: Flash | None,
    ) -> None:
        """Compose attention of its parts.

        Args:
            geometry: Sizes of the model.
            store: Its records lie in memory that the device has registered.
            device: Has the windows and the pool.
            ops: Kernels of the device.
            windows: KV windows on the device.
            pool: Device memory for copies of records.
            staging: Staging memory for what crosses between host and device.
            costs: What attending to a record costs.
            flash: What prompts use in place of our kernels; None for our kernels.

        Raises:
            ValueError: The pool is too small.
        """
        super().__init__(geometry, store)
        self._device, self._ops, self._flash = device, ops, flash
        self._windows, self._staging = windows, staging
        self._pool, self._cached = pool, DeviceBlockCache(pool, len(geometry.layers))
        self._records, self._costs = RecordAttention(geometry, store), costs
        self._sealed: list[DeviceEvent] = []
        """Events behind records that are on their way to host memory."""

    def plan(self, batch: Batch) -> AttentionPlan:
        """See Attention.plan."""
        return AttentionPlan(batch, self.geometry, self.store, self._reads)

    def _reads(self, item: BatchItem, layer: int, blocks: Blocks) -> bool:
        """Return whether some of the blocks are needed from disk: those of which the device has no copy."""
        return bool((self._cached.slots(item.sequence, layer, blocks) < 0).any())

    @property
    def device_bytes(self) -> int:
        """See Attention.device_bytes."""
        return self._pool.budget_bytes + self._working_bytes

    @property
    def device_used_bytes(self) -> int:
        """See Attention.device_used_bytes."""
        return self._pool.used_bytes + self._working_bytes

    @property
    def _working_bytes(self) -> int:
        """Bytes of working memory, taken as long as the daemon runs."""
        return self._staging.nbytes + (self._flash.nbytes if self._flash else 0)

    def forget(self, sequence: KVSequence) -> None:
        """See Attention.forget."""
        self._cached.drop(sequence)

    def check_integrity(self, sequences: Sequence[KVSequence]) -> None:
        """See Attention.check_integrity."""
        self._pool.check_integrity()
        self._cached.check_integrity(sequences)

    def close(self) -> None:
        """Close the device; KV windows are gone, too."""
        self._device.close()

    def forward(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: AttentionPlan,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See Attention.forward."""
        self.calls += 1
        here = q.cpu(), k.cpu(), v.cpu()
        out, lse = np.zeros(q.shape, np.float32), np.zeros(q.shape[:2], np.float32)
        for seen in plan.visible[self.geometry.layers[layer].sliding_window]:
            item = seen.item
            if item.failure is None:
                with self._records.failing(plan, item):
                    rows = [x[item.rows] for x in here]
                    found = self._attend(ItemCall(layer, seen, plan), *rows)
                    out[item.rows], lse[item.rows] = found
        if sink_logits is not None:
            join_sink_logits(sink_logits, out, lse)
        return torch.from_numpy(out).to(q.device)

    def _attend(
        self, call: ItemCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[Floats, Floats]:
        """Attend from the rows of one item; the output and its log-sum-exp."""
        queries = q.float().contiguous().numpy()
        keys, values = (
            element_view(x.transpose(0, 1).to(self._windows.shape.dtype).contiguous()) for x in (k, v)
        )
        try:
            return self._attend_cells(queries, keys, values, call)
        except Exception:
            self._settle_surely()  # memory that work still uses may soon be reused
            raise

    def _attend_cells(
        self, queries: Floats, keys: Numbers, values: Numbers, call: ItemCall
    ) -> tuple[Floats, Floats]:
        """Attend cell by cell, as cells are sealed on the way; the CPU works during the last cell."""
        item, in_host = call.item, call.seen.in_host
        out, lse = np.zeros_like(queries), np.full(queries.shape[:2], -np.inf, np.float32)
        with self._passing(call) as passing:
            for start, stop in segments(item.position, item.last + 1):
                these = slice(start - item.position, stop - item.position)
                self._seal_before(start, call)
                there = self._on_device(call, passing)
                found = self._launch(queries[these], keys[:, these], values[:, these], call, start, there)
                if stop > item.last:
                    self._settle()
                    rest = in_host[~np.isin(in_host, there.blocks)]
                    to = (call.seen, call.plan, out, lse)
                    self._records.merge(call.layer, queries, *to, in_host=rest, but=there.blocks)
                self._staging.settle()
                merge(out[these], lse[these], *found)
        return out, lse

    def _launch(
        self, q: Floats, k: Numbers, v: Numbers, call: ItemCall, start: int, there: OnDevice
    ) -> tuple[Floats, Floats]:
        """Launch attention of one cell's queries over their KV window and the records on the device.

        The first query is at position `start`. The window takes the queries' K and V.

        Returns:
            out and lse, valid once staging has settled.
        """
        item, ops, staging, shape = call.item, self._ops, self._staging, self._windows.shape
        window, planes = item.sequence.window, self._windows.address(item.sequence.window, call.layer)
        count, geometry = len(q), self.geometry.layers[call.layer]
        low, high = (x[start - item.position :][:count] for x in (call.seen.low, call.seen.high))
        ranges = call.seen.window_ranges(start, start + count)
        some = (there.blocks * BLOCK < high.max()) & ((there.blocks + 1) * BLOCK > low.min())
        places, positions = there.slots[some] * self._pool.record_bytes, there.blocks[some] * BLOCK
        tokens, blocks = int(np.diff(ranges[-1]).sum()), len(places)
        item.read_bytes["device"] += tokens * shape.layer_bytes // shape.tokens
        item.read_bytes["device"] += blocks * self._pool.record_bytes
        flash = self._flash if blocks and self._is_prompt(call, count) else None
        tiles, others = ops.parts(ops.tiles, count), 1 if flash else ops.parts(blocks, count)
        with (
            staging.turn(),
            self._windows.arena.use(Stream.COMPUTE, writes=[window]),
            self._pool.use(Stream.COMPUTE, reads=there.slots.tolist()),
        ):
            at = staging.bring(q, k, v, ranges, low, high, places, positions)
            self._device.copy(Stream.COMPUTE, list(self._appends(planes, at[1:3], start, count)))
            queries = Queries(at[0], count)
            partial = ops.room(staging, tiles + others, count)
            exact, stored = ops.split(partial, tiles, count)
            factors = (geometry.scaling, geometry.softcap)
            ops.attend_window(exact, queries, planes, WindowRanges(at[3], ranges.shape[1]), *factors)
            if blocks:
                rotated = ops.rotate(staging.room(q.shape), queries) if ops.rotates else queries
                records = Records(self._pool.address(0), at[6], at[7], blocks)
                if flash:
                    flash.attend(stored, rotated, records, geometry.scaling)
                else:
                    ops.attend_records(stored, rotated, records, at[4], at[5], *factors)
            out, lse = staging.room(q.shape), staging.room(q.shape[:2])
            ops.merge(out, lse, partial, queries)
            return staging.fetch(out, q.shape), staging.fetch(lse, q.shape[:2])

    def _is_prompt(self, call: ItemCall, queries: int) -> bool:
        """Return whether flash attention can be used.

        It can for more queries than our kernels take at a time, each of which sees all of a record that one
        sees.
        """
        geometry = self.geometry.layers[call.layer]
        return queries > ROWS and geometry.sliding_window is None and not geometry.softcap

    def _appends(self, planes: int, sources: Sequence[int], start: int, count: int) -> Iterator[Copy]:
        """Yield the copies of K and V of tokens within one cell into the window.

        Each of the sources is [kv_heads, count, head_dim].
        """
        shape = self._windows.shape
        token = shape.head_dim * shape.dtype.itemsize
        for which, source in enumerate(sources):
            for head in range(shape.kv_heads):
                row = planes + (which * shape.kv_heads + head) * shape.tokens * token
                mine = source + head * count * token
                yield Copy(row + window_offset(start) * token, mine, count * token)
                if start < SINKS:
                    yield Copy(row + start * token, mine, min(SINKS - start, count) * token)

    def _seal_before(self, start: int, call: ItemCall) -> None:
        """If a cell begins at `start`, seal the cell whose half of the window it takes, if any.

        Its records go to host memory, and stay on the device as long as there is room.
        """
        if not (sealed := sealed_before(start)):
            return
        sequence, blocks = call.item.sequence, np.arange(sealed.start, sealed.stop)
        with self._taken(len(blocks)) as slots:
            places, firsts = (
                slots * self._pool.record_bytes,
                np.array([window_offset(b * BLOCK) for b in blocks.tolist()]),
            )
            with (
                self._staging.turn(),
                self._windows.arena.use(Stream.COMPUTE, reads=[sequence.window]),
                self._pool.use(Stream.COMPUTE, writes=slots.tolist()),
            ):
                places_at, firsts_at = self._staging.bring(places, firsts)
                planes = self._windows.address(sequence.window, call.layer)
                self._ops.seal(self._pool.address(0), places_at, planes, firsts_at, len(blocks))
            rows = self._host(call, blocks)
            self._sealed.append(self._pool.drain(slots.tolist(), rows))
            staying = self._staying(len(blocks), call)
            self._cached.keep(sequence, call.layer, blocks[:staying], slots[:staying])
            slots[:staying] = -1

    @contextmanager
    def _passing(self, call: ItemCall) -> Iterator[OnDevice]:
        """Fetch as many uncached records as is faster than attending to them in host memory.

        As many as there is room for are kept; the others are yielded, and valid within the context.
        """
        item, here = call.item, call.seen.in_host
        sealed = here[here < sealed_by(item.position - 1)] if item.position else here[:0]
        uncached = sealed[self._cached.slots(item.sequence, call.layer, sealed) < 0]
        room = max(0, self._cached.room) + PASSING
        rates = self._costs.rates(item.count, flash=self._is_prompt(call, item.count))
        fetched = uncached[: to_fetch(len(uncached), self._pool.record_bytes, rates, room)]
        with self._taken(len(fetched)) as slots:
            try:
                self._pool.fill(slots.tolist(), self._host(call, fetched))
            except OutOfMemory:
                yield OnDevice(fetched[:0], slots[:0])  # the CPU attends to them
                return
            item.read_bytes["host"] += len(fetched) * self._pool.record_bytes
            staying = self._staying(len(fetched), call)
            self._cached.keep(item.sequence, call.layer, fetched[:staying], slots[:staying])
            passing = OnDevice(fetched[staying:], slots[staying:].copy())
            slots[:staying] = -1
            yield passing

    def _staying(self, taken: int, call: ItemCall) -> int:
        """Return how many of `taken` slots are kept: none where a sliding window hides the blocks soon."""
        return 0 if call.seen.sliding_window is not None else min(taken, max(0, taken + self._cached.room))

    @contextmanager
    def _taken(self, count: int) -> Iterator[Slots]:
        """Take slots of the pool within the context; those that it overwrites by -1 stay taken."""
        slots = np.array(self._pool.take(count), np.int64)
        try:
            yield slots
        finally:
            self._pool.give_back(slots[slots >= 0].tolist())

    def _on_device(self, call: ItemCall, passing: OnDevice) -> OnDevice:
        """Return what is visible to the call and lies on the device, wherever else it lies."""
        visible = np.arange(call.seen.stored.start, call.seen.stored.stop)
        slots = self._cached.slots(call.item.sequence, call.layer, visible)
        cached = slots >= 0
        blocks = np.concatenate([visible[cached], passing.blocks])
        return OnDevice(blocks, np.concatenate([slots[cached], passing.slots]))

    def _host(self, call: ItemCall, blocks: Blocks) -> list[int]:
        """Return addresses of a layer's records in host memory."""
        rows = call.item.sequence.table.rows[call.layer, blocks]
        addresses: list[int] = (self.store.memory.ctypes.data + rows * self._pool.record_bytes).tolist()
        return addresses

    def _settle(self) -> None:
        """Wait for all records that are on their way to host memory; raise OutOfMemory if that fails."""
        while self._sealed:
            self._sealed[-1].synchronise()
            self._sealed.pop()

    def _settle_surely(self) -> None:
        """Wait for all work of a call, on every stream; raise LaunchFailed if that fails too often."""
        for _ in range(TRIES):
            with contextlib.suppress(OutOfMemory):
                self._pool.settle()
                self._sealed.clear()  # it was work on the pool
                self._staging.settle()
                return
            time.sleep(PAUSE_S)
        raise LaunchFailed("the device has had no memory for an event for too long; restart the daemon")
