"""Attention over quantised records in place, without unpacking them to memory.

A call splits its blocks into parts. Every part keeps running (maximum, sum of weights, weighted
values) per query row and the parts are merged exactly, in an order that depends on the number of blocks and
of queries only: neither threads nor load change a bit of the result.
Query rows (queries x heads of one KV head) go in tiles of up to MAX_TILE: a code is unpacked once for a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from spilld.offload.kernels.inline import inline_for
from spilld.offload.kernels.threads import check, spreading
from spilld.offload.record import (
    BLOCK,
    V4_GROUP,
    Element,
    Format,
    Layout,
    check_places,
)

from .softmax import (
    finish,
    hide,
    join,
    merge,
    multiply,
    read_scales,
    seen,
    soften,
    start,
    visibility,
)
from .tiles import (
    MAX_TILE,
    dot_tile,
    rotate_rows,
    weigh_tile,
    widen,
    widen4,
    widen_keys4,
)

__all__ = ["Partial", "merge"]

FEW_TILES = 2
"""With more tiles than this, keys and values are converted to float32 once for all of them."""

BLOCKS_PER_PART = 8
MAX_PARTS = 32
MAX_PART_ROWS = 2048
"""Rows of all parts of a KV head: their sums stay in the cache until they are joined."""

MAX_QUERIES = 64
"""Queries that scan the records together; their tiles stay in the cache meanwhile."""

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


class Partial:
    """Attention over records of one layout. Safe to call from one thread at a time.

    The first call with a new tile height (1 to MAX_TILE, from queries x heads / kv_heads) compiles for about
    3 s; the machine code is cached on disk.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._keys4, self._int4, self._exact = kind_of(layout)
        number: type[np.generic] = np.int8
        if self._exact:
            number = np.float32 if layout.element is Element.FLOAT32 else np.uint16
        self._k_type = np.dtype(np.uint8) if self._keys4 else np.dtype(number)
        self._v_type = np.dtype(np.uint8) if self._int4 else np.dtype(number)
        self._offsets = np.array(
            [
                layout.offset("k_codes") // self._k_type.itemsize,
                layout.offset("v_codes") // self._v_type.itemsize,
                layout.offset("k_scales") // (4 if self._keys4 else 2),
                layout.offset("v_scales") // (4 if self._int4 else 2),
            ],
            np.int64,
        )

    def views(self, memory: NDArray[np.uint8]) -> tuple[NDArray[Any], ...]:
        """Return views of the memory of records for `attend_blocks`.

        They are K codes, V codes, uint16, uint32, and the offsets of codes and scales in a record, each in
        units of its view.
        """
        kinds = (self._k_type, self._v_type, np.uint16, np.uint32)
        return (*(memory.view(kind) for kind in kinds), self._offsets)

    def attend(
        self,
        q: Floats,
        memory: NDArray[np.uint8],
        places: Integers,
        positions: Integers,
        low: Integers,
        high: Integers,
        scale: float,
        softcap: float,
        out: Floats,
        lse: Floats,
    ) -> None:
        """Attend over blocks of records and write out and lse.

        What a query does not see cannot change its result, even if it is NaN. Where nothing is visible, out
        is 0 and lse is -inf.

        Args:
            q: `[M, heads, head_dim] float32`. Query head h reads KV head h // (heads / kv_heads).
            memory: `[bytes] uint8`, C-contiguous, 64-byte aligned.
            places: `[n] int64`, the byte offset of each record, a multiple of 64, in any order.
            positions: `[n] int64`, the first token position of each record's block.
            low: `[M] int64`: query m sees position t iff low[m] <= t < high[m].
            high: `[M] int64`.
            scale: logit = scale * q.k.
            softcap: The logit becomes softcap * tanh(logit / softcap), unless softcap is 0.
            out: `[M, heads, head_dim] float32`, written.
            lse: `[M, heads] float32`, written.

        Raises:
            ValueError: Shapes disagree, or a place is not one of a record in the memory.
            MemoryError: A part of the call got no memory; out and lse are undefined.
        """
        kv_heads, head_dim = self.layout.kv_heads, self.layout.head_dim
        queries, heads = lse.shape
        group = heads // kv_heads
        if heads != group * kv_heads or q.shape != (queries, heads, head_dim) or out.shape != q.shape:
            raise ValueError(f"q {q.shape}, out {out.shape}, lse {lse.shape} do not fit {self.layout}")
        if places.shape != positions.shape or low.shape != (queries,) or high.shape != (queries,):
            raise ValueError(
                f"places {places.shape}, positions {positions.shape}, low {low.shape}, high {high.shape}"
            )
        check_places(memory, places, self.layout)
        if queries == 0:
            return
        if queries > MAX_QUERIES:
            for first in range(0, queries, MAX_QUERIES):
                these = slice(first, first + MAX_QUERIES)
                seen = (places, positions, low[these], high[these], scale, softcap)
                self.attend(q[these], memory, *seen, out[these], lse[these])
            return
        count = queries * group
        tiles = -(-count // MAX_TILE)
        tile = -(-count // tiles)
        if queries == 1 and tiles == 1:
            tiled = np.ascontiguousarray(q).reshape(kv_heads, group, head_dim)
        else:
            tiled = np.zeros((kv_heads, tiles * tile, head_dim), np.float32)
            by_head = tiled[:, :count].reshape(kv_heads, queries, group, head_dim)
            by_head[:] = q.reshape(queries, kv_heads, group, head_dim).transpose(1, 0, 2, 3)
        parts = max(1, parts_of(len(places), tiles * tile))
        sums = np.empty((parts, kv_heads, tiles * tile, head_dim), np.float32)
        tops = np.empty((parts, kv_heads, tiles * tile), np.float32)
        totals = np.empty_like(tops)
        attend = _kernel(self._keys4, self._int4, self._exact, head_dim, tile)
        records, factors = self.views(memory), (np.float32(scale), np.float32(softcap))
        check(attend(tiled, records, places, positions, low, high, *factors, group, sums, tops, totals))
        join(sums, tops, totals, out, lse)


def kind_of(layout: Layout) -> tuple[int, int, int]:
    """Whether keys have four bits, values have, numbers are exact: 0 or 1, as kernels capture them."""
    form = layout.format
    return int(form is Format.INT4), int(form in (Format.K8V4, Format.INT4)), int(form is Format.EXACT)


def parts_of(blocks: int, rows: int) -> int:
    """Return into how many parts a call with so many rows of a KV head splits so many blocks."""
    return min(MAX_PARTS, -(-blocks // BLOCKS_PER_PART), max(1, MAX_PART_ROWS // rows))


@cache
def _kernel(keys4: int, int4: int, exact: int, head_dim: int, tile: int) -> Callable[..., int]:
    """Return the parallel loop for one kind of record and one tile height.

    Only numbers are captured, because numba's on-disk cache is keyed by what a closure captures.
    """

    @njit(nogil=True, error_model="numpy", cache=True, no_cfunc_wrapper=True)
    def kernel(
        q: Any,
        records: Any,
        places: Any,
        positions: Any,
        low: Any,
        high: Any,
        scale: Any,
        softcap: Any,
        group: Any,
        sums: Any,
        tops: Any,
        totals: Any,
    ) -> Any:
        units = sums.shape[0] * sums.shape[1]
        return _spread(
            units,
            keys4,
            int4,
            exact,
            head_dim,
            tile,
            q,
            records,
            places,
            positions,
            low,
            high,
            scale,
            softcap,
            group,
            sums,
            tops,
            totals,
        )

    compiled: Callable[..., int] = kernel
    return compiled


@cache
def _unit(keys4: int, int4: int, exact: int, head_dim: int, tile: int) -> Any:
    """Return the function for one KV head over the blocks of one part."""

    @njit(nogil=True, error_model="numpy")
    def unit(
        number: Any,
        q: Any,
        records: Any,
        places: Any,
        positions: Any,
        low: Any,
        high: Any,
        scale: Any,
        softcap: Any,
        group: Any,
        sums: Any,
        tops: Any,
        totals: Any,
    ) -> None:
        parts, kv_heads = sums.shape[:2]
        part, head = number // kv_heads, number % kv_heads
        first, last = len(places) * part // parts, len(places) * (part + 1) // parts
        attend_blocks(
            keys4,
            int4,
            exact,
            head_dim,
            tile,
            q[head],
            records,
            head,
            places[first:last],
            positions[first:last],
            low,
            high,
            scale,
            softcap,
            group,
            sums[part, head],
            tops[part, head],
            totals[part, head],
        )

    return unit


_spread = spreading(_unit, literals=5)


@cache
def _blocks(keys4: int, int4: int, exact: int, head_dim: int, tile: int) -> Any:
    """Return the function for one KV head over some blocks.

    keys4, int4: whether keys, values have four bits.
    """

    @njit(nogil=True, error_model="numpy")
    def blocks(
        q: Any,
        records: Any,
        head: Any,
        places: Any,
        positions: Any,
        low: Any,
        high: Any,
        scale: Any,
        softcap: Any,
        group: Any,
        acc: Any,
        top: Any,
        total: Any,
    ) -> None:
        """Attend with the queries of one KV head over some blocks.

        q is float32 [rows, head_dim], rows a multiple of tile; records are as `views` gives them. Written are
        the weighted values, acc [rows, head_dim], the largest logit, top [rows], and the sum of weights,
        total [rows]. The rest is as in Partial.attend.
        """
        k_codes, v_codes, halves, words, offsets = records
        if keys4:
            rotated = np.empty_like(q)
            rotate_rows(q, rotated, head_dim)
            q = rotated
        k_stride = head_dim // 2 if keys4 else head_dim
        v_stride = head_dim // 2 if int4 else head_dim
        pairs = (head_dim + V4_GROUP - 1) // V4_GROUP if int4 else 1
        weights = np.empty((tile, BLOCK), np.float32)
        k_scale = np.empty(BLOCK, np.float32)
        v_scale = np.empty(BLOCK, np.float32)
        many = len(q) > FEW_TILES * tile
        keys = np.empty(head_dim * BLOCK, np.float32)
        values = np.empty(head_dim * BLOCK, np.float32)
        start(acc, top, total, k_scale, scale)
        for block in range(len(places)):
            some, whole = visibility(positions[block], low, high)
            if not some:
                continue
            place = places[block]
            k_at = place // k_codes.itemsize + offsets[0] + head * k_stride * BLOCK
            v_at = place // v_codes.itemsize + offsets[1] + head * v_stride * BLOCK
            k_scales_at = place // (4 if keys4 else 2) + offsets[2] + head * BLOCK * (pairs if keys4 else 1)
            v_scales_at = place // (4 if int4 else 2) + offsets[3] + head * BLOCK * pairs
            ahead = places[min(block + 1, len(places) - 1)] - place
            k_next, v_next = k_at + ahead // k_codes.itemsize, v_at + ahead // v_codes.itemsize
            if not exact and not keys4:
                read_scales(halves, k_scales_at, scale, k_scale)
                if not int4:
                    read_scales(halves, v_scales_at, np.float32(1), v_scale)
            if keys4:
                widen_keys4(k_codes, k_at, k_next, words, k_scales_at, keys, head_dim)
            elif many:
                widen(k_codes, k_at, k_next, keys)
            if int4:
                widen4(v_codes, v_at, v_next, words, v_scales_at, values, head_dim)
            elif many:
                widen(v_codes, v_at, v_next, values)
            for first in range(0, len(q), tile):
                if keys4 or many:
                    dot_tile(keys, 0, 0, q, first, weights, head_dim, tile)
                else:
                    dot_tile(k_codes, k_at, k_next, q, first, weights, head_dim, tile)
                finish(weights, k_scale, softcap)
                if not whole:
                    hide(weights, first, group, positions[block], low, high)
                soften(weights, first, top, total, acc)
                if not exact and not int4:
                    multiply(weights, v_scale)
                if whole:
                    if int4 or many:
                        weigh_tile(values, 0, 0, weights, 0, BLOCK, acc, first, head_dim, tile)
                    else:
                        weigh_tile(v_codes, v_at, v_next, weights, 0, BLOCK, acc, first, head_dim, tile)
                    continue
                # Weight 0 times NaN would be NaN: a row takes only the values that it sees.
                for i in range(tile):
                    row = first + i
                    m = min(row // group, len(low) - 1)
                    begin, end = seen(positions[block], low[m], high[m])
                    mine = weights[i : i + 1]
                    if int4 or many:
                        weigh_tile(values, 0, 0, mine, begin, end, acc, row, head_dim, 1)
                    else:
                        weigh_tile(v_codes, v_at, v_next, mine, begin, end, acc, row, head_dim, 1)

    return blocks


attend_blocks = inline_for(_blocks, literals=5)
