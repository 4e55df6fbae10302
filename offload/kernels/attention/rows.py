"""Attention of decode rows over their KV windows and host records: one parallel loop a layer.

A row is one query of one sequence. Its KV window is one part of the loop and every few blocks of its records
another; the parts merge exactly, in an order that depends on the number of blocks only: neither the other
rows nor the threads change a bit of a row's result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from spilld.offload.kernels.bits import f32_to_bf16_nearest
from spilld.offload.kernels.inline import inline_for
from spilld.offload.kernels.threads import check, spreading
from spilld.offload.record import BLOCK, Element, Layout

from .partial import (
    Partial,
    attend_blocks,
    kind_of,
    parts_of,
)
from .softmax import (
    finish,
    join,
    soften,
    start,
)
from .tiles import MAX_TILE, dot_rows, weigh_tile

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


class WindowPlanes(NamedTuple):
    """K and V of one layer in the KV windows of all sequences."""

    numbers: NDArray[Any]
    """The windows of all layers as one vector: float32, or bf16 bits."""
    stride: int
    """Numbers of a window."""
    begin: int
    """Where in a window the layer begins: `[2, kv_heads, tokens, head_dim]`."""
    tokens: int
    """Tokens of a window."""


class DecodeRow(NamedTuple):
    """What one query sees in the layers that share a sliding window."""

    window: int
    """The number of its KV window."""
    offsets: tuple[int, ...]
    """Where in the KV window its own token goes; one place or two."""
    ranges: Sequence[tuple[int, int]]
    """Offsets [start, stop) in the KV window of what it sees, including its own token."""
    places: Integers
    """Byte offsets of the records [layers, n], multiples of 64."""
    positions: Integers
    """The first token position of each record's block [n]."""
    low: int
    high: int
    """In records it sees the positions low <= t < high."""


class DecodeRows(NamedTuple):
    """The rows of a step as the kernel takes them: int64 arrays."""

    windows: Integers
    offsets: Integers
    """[rows, 2]"""
    ranges: Integers
    """[rows, most, 2]; padded with empty ranges."""
    places: Integers
    """[layers, n]: the blocks of all rows, row by row."""
    positions: Integers
    blocks: Integers
    """[rows + 1]: where in `positions` each row's begin."""
    low: Integers
    high: Integers
    parts: Integers
    """[rows + 1]: the number of each row's first part, which is its window."""
    rows: Integers
    """The row of each part."""

    @classmethod
    def of(cls, rows: Sequence[DecodeRow]) -> DecodeRows:
        """Pack rows, of which there is at least one, into arrays."""
        counts = [len(row.positions) for row in rows]
        parts = [1 + parts_of(count, 1) for count in counts]
        most = max(len(row.ranges) for row in rows)
        return cls(
            windows=np.array([row.window for row in rows]),
            offsets=np.array([(row.offsets[0], row.offsets[-1]) for row in rows]),
            ranges=np.array([[*row.ranges, *[(0, 0)] * (most - len(row.ranges))] for row in rows]),
            # Joined columns may be Fortran-ordered, for which numba would compile the kernel again.
            places=np.ascontiguousarray(np.concatenate([row.places for row in rows], axis=1)),
            positions=np.concatenate([row.positions for row in rows]),
            blocks=np.array([*accumulate(counts, initial=0)]),
            low=np.array([row.low for row in rows]),
            high=np.array([row.high for row in rows]),
            parts=np.array([*accumulate(parts, initial=0)]),
            rows=np.repeat(np.arange(len(rows)), parts),
        )


@njit(nogil=True, error_model="numpy", inline="always")
def _plane(planes: Any, window: Any, index: Any, head_dim: Any) -> Any:
    """Return one head's keys, or its values, in a window: [tokens * head_dim]."""
    size = planes.tokens * head_dim
    begin = window * planes.stride + planes.begin + index * size
    return planes.numbers[begin : begin + size]


class RowAttention:
    """The kernel for records of one layout and `group` query heads to a KV head."""

    def __init__(self, layout: Layout, group: int) -> None:
        tiles = -(-group // MAX_TILE)
        tile = -(-group // tiles)
        self._kv_heads, self._head_dim, self._height = layout.kv_heads, layout.head_dim, tiles * tile
        self._partial = Partial(layout)
        self._kernel = _kernel(
            *kind_of(layout),
            int(layout.element is Element.FLOAT32),
            layout.head_dim,
            tile,
        )
        self._queries, self._sums, self._tops, self._totals = self._workspace(1, 1)

    def views(self, memory: NDArray[np.uint8]) -> tuple[NDArray[Any], ...]:
        """Return views of the memory of records, as `attend` takes them."""
        return self._partial.views(memory)

    def attend(
        self,
        heads: Floats,
        planes: WindowPlanes,
        layer: int,
        scan: DecodeRows,
        records: tuple[NDArray[Any], ...],
        scale: float,
        softcap: float,
        out: Floats,
        lse: Floats,
    ) -> None:
        """Write each row's K and V to its KV window, attend over what it sees, and write out and lse.

        Arguments are not checked.

        Args:
            heads: `[rows, heads + 2 kv_heads, head_dim] float32`, query, key and value heads of the rows.
            planes: The layer in the KV windows.
            layer: The layer, of the places of records.
            scan: The rows.
            records: As `views` gives them.
            scale: As in Partial.attend.
            softcap: As in Partial.attend.
            out: `[rows, heads, head_dim] float32`.
            lse: `[rows, heads] float32`.

        Raises:
            MemoryError: A part of the call got no memory; out and lse are undefined.
        """
        rows, parts = len(scan.windows), len(scan.rows)
        if rows > len(self._queries) or parts > len(self._sums):
            self._queries, self._sums, self._tops, self._totals = self._workspace(rows, parts)
        factors = (np.float32(scale), np.float32(softcap))
        room = (self._queries, self._sums, self._tops, self._totals)
        check(self._kernel(heads, planes, layer, scan, records, *factors, *room, out, lse))

    def _workspace(self, rows: int, parts: int) -> tuple[Floats, Floats, Floats, Floats]:
        """Allocate tiles of queries, and the sums, maxima and totals of the parts."""
        shape = (self._kv_heads, self._height)
        queries = np.zeros((rows, *shape, self._head_dim), np.float32)
        sums = np.zeros((parts, *shape, self._head_dim), np.float32)
        return queries, sums, np.zeros((parts, *shape), np.float32), np.zeros((parts, *shape), np.float32)


@cache
def _kernel(keys4: int, int4: int, exact: int, wide: int, head_dim: int, tile: int) -> Callable[..., int]:
    """Return the kernel for one kind of record. Only numbers are captured, as in partial.py."""

    @njit(nogil=True, error_model="numpy", cache=True, no_cfunc_wrapper=True)
    def kernel(
        heads: Any,
        planes: Any,
        layer: Any,
        scan: Any,
        records: Any,
        scale: Any,
        softcap: Any,
        queries: Any,
        sums: Any,
        tops: Any,
        totals: Any,
        out: Any,
        lse: Any,
    ) -> Any:
        kv_heads = queries.shape[1]
        group = out.shape[1] // kv_heads
        for row in range(len(scan.windows)):
            for head in range(kv_heads):
                for i in range(group):
                    for d in range(head_dim):
                        queries[row, head, i, d] = heads[row, head * group + i, d]
                for which in range(2):
                    plane = _plane(planes, scan.windows[row], which * kv_heads + head, head_dim)
                    new = heads[row, (group + which) * kv_heads + head]
                    for i in range(2):
                        for d in range(head_dim):
                            number = new[d] if wide else f32_to_bf16_nearest(new[d])
                            plane[scan.offsets[row, i] * head_dim + d] = number
        failed = _spread(
            len(scan.rows) * kv_heads,
            keys4,
            int4,
            exact,
            head_dim,
            tile,
            planes,
            layer,
            scan,
            records,
            scale,
            softcap,
            group,
            queries,
            sums,
            tops,
            totals,
        )
        for row in range(len(scan.windows)):
            a, b = scan.parts[row], scan.parts[row + 1]
            join(sums[a:b], tops[a:b], totals[a:b], out[row : row + 1], lse[row : row + 1])

        return failed

    compiled: Callable[..., int] = kernel
    return compiled


@cache
def _unit(keys4: int, int4: int, exact: int, head_dim: int, tile: int) -> Any:
    """Return the function for one KV head over one part: a row's KV window, or some of its blocks."""

    @njit(nogil=True, error_model="numpy")
    def unit(
        number: Any,
        planes: Any,
        layer: Any,
        scan: Any,
        records: Any,
        scale: Any,
        softcap: Any,
        group: Any,
        queries: Any,
        sums: Any,
        tops: Any,
        totals: Any,
    ) -> None:
        kv_heads = queries.shape[1]
        part, head = number // kv_heads, number % kv_heads
        row = scan.rows[part]
        q, acc, top, total = queries[row, head], sums[part, head], tops[part, head], totals[part, head]
        index, parts = part - scan.parts[row] - 1, scan.parts[row + 1] - scan.parts[row] - 1
        if index < 0:
            keys = _plane(planes, scan.windows[row], head, head_dim)
            values = _plane(planes, scan.windows[row], kv_heads + head, head_dim)
            attend_window(head_dim, tile, q, keys, values, scan.ranges[row], scale, softcap, acc, top, total)
        else:
            begin, count = scan.blocks[row], scan.blocks[row + 1] - scan.blocks[row]
            first, last = begin + count * index // parts, begin + count * (index + 1) // parts
            attend_blocks(
                keys4,
                int4,
                exact,
                head_dim,
                tile,
                q,
                records,
                head,
                scan.places[layer, first:last],
                scan.positions[first:last],
                scan.low[row : row + 1],
                scan.high[row : row + 1],
                scale,
                softcap,
                group,
                acc,
                top,
                total,
            )

    return unit


_spread = spreading(_unit, literals=5)


@cache
def _window(head_dim: int, tile: int) -> Any:
    @njit(nogil=True, error_model="numpy")
    def window(
        q: Any,
        keys: Any,
        values: Any,
        ranges: Any,
        scale: Any,
        softcap: Any,
        acc: Any,
        top: Any,
        total: Any,
    ) -> None:
        """Attend as attend_blocks does, over a KV window: token-major keys, values [tokens * head_dim]."""
        weights = np.empty((tile, BLOCK), np.float32)
        k_scale = np.empty(BLOCK, np.float32)
        start(acc, top, total, k_scale, scale)
        for r in range(len(ranges)):
            for offset in range(ranges[r, 0], ranges[r, 1], BLOCK):
                count, at = min(BLOCK, ranges[r, 1] - offset), offset * head_dim
                for first in range(0, len(q), tile):
                    dot_rows(keys, at, count, q, first, weights, head_dim, tile)
                    finish(weights, k_scale, softcap)
                    for i in range(tile):
                        for t in range(count, BLOCK):
                            weights[i, t] = -np.inf
                    soften(weights, first, top, total, acc)
                    weigh_tile(values, at, at, weights, 0, count, acc, first, head_dim, tile)

    return window


attend_window = inline_for(_window, literals=2)
