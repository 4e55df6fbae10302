"""Attention where the CPU is the device: one parallel loop over decode rows, tiles over chunks of prompts.

Rows of one token go together through one loop (offload/kernels/attention/rows.py), over their KV windows and
their records in host memory. A chunk's queries see its KV window tile by tile, as cells are sealed on the
way, then records (offload/kernels/attention/partial.py). What comes from disk merges into either.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from spilld.cuda_ext.memory.cpu_windows import CpuKVWindows, element_view
from spilld.kv.attention_metadata import VisibleKV
from spilld.kv.attention_span import (
    SINKS,
    Sliding,
    exact_ranges,
    lowest_visible,
    sealed_before,
    segments,
    window_offset,
    window_offsets,
    window_ranges,
)
from spilld.kv.batch import Batch
from spilld.kv.geometry import Geometry, HeadSizes, LayerGeometry
from spilld.kv.sequence import KVSequence
from spilld.offload.kernels.attention.rows import DecodeRow, DecodeRows, RowAttention, WindowPlanes
from spilld.offload.kernels.codec.codec import Codec
from spilld.offload.record import BLOCK
from spilld.offload.store.store import Store

from .base import Attention, AttentionPlan
from .records import Floats, RecordAttention, alike
from .sink_logits import join_sink_logits
from .tile import additive_mask, attend_tile


class Tile(NamedTuple):
    """Queries of a chunk that lie in one cell, and what they see of their KV window.

    start is the position of the first; ranges are offsets in the window, oldest first; mask is as
    additive_mask returns it.
    """

    start: int
    queries: int
    ranges: tuple[slice, ...]
    mask: torch.Tensor


class CpuPlan(AttentionPlan):
    """A plan with the rows as their kernel takes them, and the chunks as tiles.

    Attributes:
        sealing: The items of one token before which blocks are sealed.
        scans: By sliding window, the batch's rows of one token.
        row_tokens: By sliding window, how many tokens each of them sees exactly.
    """

    def __init__(self, batch: Batch, geometry: Geometry, store: Store) -> None:
        super().__init__(batch, geometry, store, lambda *_: True)
        self._rooms = {
            sizes: torch.empty(batch.single, sizes.heads + 2 * sizes.kv_heads, sizes.head_dim)
            for sizes in (geometry.every_sizes if batch.single else ())
        }
        self._taken: torch.Tensor | None = None
        self._in_place: Floats | None = None
        self.sealing = [item for item in batch.items[: batch.single] if sealed_before(item.position)]
        self.scans: dict[Sliding, DecodeRows] = {}
        self.row_tokens: dict[Sliding, list[int]] = {}
        self._tiles: dict[tuple[VisibleKV, int], list[Tile]] = {}
        record_bytes = np.array(store.layouts.record_bytes)[:, None]
        for sliding_window, visible in self.visible.items() if batch.single else ():
            rows = [_row(seen, record_bytes) for seen in visible[: batch.single]]
            self.scans[sliding_window] = DecodeRows.of(rows)
            self.row_tokens[sliding_window] = [sum(b - a for a, b in row.ranges) for row in rows]

    def take(self, sizes: HeadSizes, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Floats:
        """Return the heads of the rows of one token side by side, where they lie if they lie like that.

        Args:
            sizes: Sizes of the layer's heads.
            q: [total, heads, head_dim] of the whole batch; the same tensors may hold those of every layer.
            k: [total, kv_heads, head_dim], likewise.
            v: [total, kv_heads, head_dim], likewise.

        Returns:
            [single, heads + 2 kv_heads, head_dim] float32: queries, keys, values; until the next call.
        """
        single = self.batch.single
        if q is not self._taken:
            self._taken, packed = q, _side_by_side(q, k, v)
            self._in_place = None if packed is None else packed[:single]
        if self._in_place is not None:
            return self._in_place
        found: Floats = torch.cat((q[:single], k[:single], v[:single]), dim=1, out=self._rooms[sizes]).numpy()
        return found

    def tiles(self, seen: VisibleKV, group: int) -> list[Tile]:
        """Return the tiles of a chunk, in the order of its tokens, for `group` query heads to a KV head."""
        if (seen, group) not in self._tiles:
            item = seen.item
            self._tiles[seen, group] = [
                _tile(start, stop, seen.sliding_window, group)
                for start, stop in segments(item.position, item.last + 1)
            ]
        return self._tiles[seen, group]


def _side_by_side(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Floats | None:
    """What q, k and v are the parts of: one array [total, heads + 2 kv_heads, head_dim] float32, or None."""
    rows, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    whole = (rows, heads + 2 * kv_heads, head_dim)
    strides = (whole[1] * head_dim, head_dim, 1)
    places = [(part.untyped_storage().data_ptr(), part.storage_offset()) for part in (q, k, v)]
    storage, first = places[0]
    wanted = [(storage, first + before * head_dim) for before in (0, heads, heads + kv_heads)]
    alike = all(part.dtype == torch.float32 and part.stride() == strides for part in (q, k, v))
    if not alike or places != wanted:
        return None
    found: Floats = q.as_strided(whole, strides).numpy()
    return found


def _row(seen: VisibleKV, record_bytes: NDArray[np.int64]) -> DecodeRow:
    """Return what a row sees. record_bytes: [layers, 1], of each layer."""
    item = seen.item
    return DecodeRow(
        window=item.sequence.window,
        offsets=window_offsets(item.position),
        ranges=window_ranges(item.position, seen.sliding_window),
        places=item.sequence.table.rows[:, seen.in_host] * record_bytes,
        positions=seen.in_host * BLOCK,
        low=int(seen.low[0]),
        high=int(seen.high[0]),
    )


def _tile(start: int, stop: int, sliding_window: Sliding, group: int) -> Tile:
    """Return the tile of queries at [start, stop), which see what the first does, and each other."""
    ranges = [slice(a, b) for a, b in window_ranges(start, sliding_window)]
    ranges[-1] = slice(ranges[-1].start, ranges[-1].stop + stop - start - 1)
    seen = [*exact_ranges(start, sliding_window), (start + 1, stop)]
    positions = torch.cat([torch.arange(a, b) for a, b in seen])
    own = torch.arange(start, stop)[:, None]
    lowest = torch.tensor([lowest_visible(position, sliding_window) for position in range(start, stop)])
    hidden = (positions > own) | (positions < lowest[:, None])
    return Tile(start, stop - start, tuple(ranges), additive_mask(hidden, group))


class CpuAttention(Attention):
    """Composes the partials of every tier where the CPU is the device."""

    def __init__(self, geometry: Geometry, store: Store, windows: CpuKVWindows) -> None:
        super().__init__(geometry, store)
        itemsize, shape = windows.shape.dtype.itemsize, windows.shape
        self._windows = windows.layers
        numbers = element_view(windows.numbers)
        self._planes = [
            WindowPlanes(numbers, shape.nbytes // itemsize, begin // itemsize, shape.tokens)
            for begin in shape.begins[:-1]
        ]
        self._token_bytes = [2 * layer.kv_heads * layer.head_dim * itemsize for layer in geometry.layers]
        self._codecs = alike(Codec, store.layouts)
        groups = [layer.heads // layer.kv_heads for layer in geometry.layers]
        self._rows = alike(RowAttention, store.layouts, groups)
        self._host = alike(lambda kernel: kernel.views(store.memory), self._rows)
        self._record_bytes = store.layouts.record_bytes
        self._records = RecordAttention(geometry, store)

    def plan(self, batch: Batch) -> CpuPlan:
        """See Attention.plan."""
        return CpuPlan(batch, self.geometry, self.store)

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
        assert isinstance(plan, CpuPlan)
        self.calls += 1
        shape, count = self.geometry.layers[layer], plan.batch.single
        visible = plan.visible[shape.sliding_window]
        out = np.empty((plan.batch.total, shape.heads, shape.head_dim), np.float32)
        lse = np.zeros((plan.batch.total, shape.heads), np.float32)
        if count:
            heads = plan.take(shape.sizes, q, k, v)
            self._attend_rows(layer, heads, visible[:count], plan, out[:count], lse[:count])
        for seen in visible[count:]:
            rows = seen.item.rows
            if seen.item.failure is None:
                with self._records.failing(plan, seen.item):
                    self._attend_chunk(layer, q[rows], k[rows], v[rows], seen, plan, out[rows], lse[rows])
        if sink_logits is not None:
            join_sink_logits(sink_logits, out, lse)
        for item in plan.batch.items:
            if item.failure is not None:
                out[item.rows] = 0
        return torch.from_numpy(out)

    def _attend_rows(
        self, layer: int, heads: Floats, visible: list[VisibleKV], plan: CpuPlan, out: Floats, lse: Floats
    ) -> None:
        """Attend from the items of one token, whose heads `plan.take` gave.

        Results of items that have failed are overwritten by the caller.
        """
        shape = self.geometry.layers[layer]
        for item in plan.sealing:
            self._seal_before(layer, item.position, item.sequence)
        scan, kind = plan.scans[shape.sliding_window], (shape.scaling, shape.softcap)
        planes, host = self._planes[layer], self._host[layer]
        self._rows[layer].attend(heads, planes, layer, scan, host, *kind, out, lse)
        tokens = plan.row_tokens[shape.sliding_window]
        for row, seen in enumerate(visible):
            item = seen.item
            item.read_bytes["device"] += tokens[row] * self._token_bytes[layer]
            item.read_bytes["host"] += len(seen.in_host) * self._record_bytes[layer]
            if item.failure is None and plan.reads_of(layer, item):
                one = slice(row, row + 1)
                with self._records.failing(plan, item):
                    queries = heads[one, : shape.heads]
                    self._records.merge(layer, queries, seen, plan, out[one], lse[one])

    def _attend_chunk(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        seen: VisibleKV,
        plan: CpuPlan,
        out: Floats,
        lse: Floats,
    ) -> None:
        """Attend from the rows of an item of many tokens."""
        shape, item = self.geometry.layers[layer], seen.item
        heads = (shape.kv_heads, shape.heads // shape.kv_heads)
        q = q.float()
        queries = q.reshape(item.count, *heads, shape.head_dim).permute(1, 2, 0, 3)
        sums = torch.from_numpy(out).view(item.count, *heads, shape.head_dim)
        sums_lse = torch.from_numpy(lse).view(item.count, *heads)
        for tile in plan.tiles(seen, heads[1]):
            first = tile.start - item.position
            rows = slice(first, first + tile.queries)
            self._append(layer, k[rows], v[rows], tile.start, item.sequence)
            exact, exact_lse = self._attend_window(layer, queries[:, :, rows], tile, item.sequence, shape)
            sums[rows], sums_lse[rows] = exact.permute(2, 0, 1, 3), exact_lse.permute(2, 0, 1)
            item.read_bytes["device"] += tile.mask.shape[1] * self._token_bytes[layer]
        self._records.merge(layer, q.numpy(), seen, plan, out, lse, in_host=seen.in_host)

    def _attend_window(
        self, layer: int, queries: torch.Tensor, tile: Tile, sequence: KVSequence, shape: LayerGeometry
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend over a tile, as attend_tile, with queries [kv_heads, group, tile.queries, head_dim]."""
        keys, values = (
            torch.cat([plane[:, part] for part in tile.ranges], dim=1).float()
            for plane in self._windows[layer][sequence.window]
        )
        return attend_tile(queries, keys, values, tile.mask, shape.scaling, shape.softcap)

    def _append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, position: int, sequence: KVSequence
    ) -> None:
        """Put K/V [n, kv_heads, head_dim] of tokens within one cell into the KV window.

        The cell whose half they take is sealed before.
        """
        at, count = window_offset(position), len(k)
        self._seal_before(layer, position, sequence)
        for plane, new in zip(self._windows[layer][sequence.window], (k, v), strict=True):
            numbers = new.transpose(0, 1)
            plane[:, at : at + count] = numbers
            if position < SINKS:
                sinks = min(SINKS - position, count)
                plane[:, position : position + sinks] = numbers[:, :sinks]

    def _seal_before(self, layer: int, position: int, sequence: KVSequence) -> None:
        """If a cell begins at `position`, seal the cell whose half of the window it takes, if any."""
        if not (blocks := sealed_before(position)):
            return
        first = window_offset(blocks.start * BLOCK)
        keys, values = self._windows[layer][sequence.window, :, :, first : first + len(blocks) * BLOCK]
        rows = sequence.table.rows[layer, blocks.start : blocks.stop]
        self._codecs[layer].seal(element_view(keys), element_view(values), self.store.records(layer), rows)
