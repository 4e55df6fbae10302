"""Attention of rows over windows and records, against float64 softmax over the numbers that each row sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spilld.offload.kernels import threads
from spilld.offload.kernels.attention.rows import DecodeRow, DecodeRows, RowAttention, WindowPlanes
from spilld.offload.record import (
    BLOCK,
    Element,
    Format,
    Layout,
)

from ..offload import reference

F32 = NDArray[np.float32]
LAYERS = 2
LAYER = 1
TOKENS = 3 * BLOCK
SEEN = {  # blocks of records, offsets in the KV window
    "window only": (0, [(0, 1)]),
    "several parts": (40, [(0, 64), (100, 150)]),
    "one block": (1, [(64, 192)]),
    "uneven ranges": (0, [(0, 64), (70, 71), (80, 80), (101, 163)]),
    "any order": (0, [(7, 20), (0, 3)]),
    "a part of a block": (3, [(7, 30)]),
}


def bf16(numbers: F32) -> NDArray[np.uint16]:
    words = numbers.view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)


def widened(numbers: NDArray[Any]) -> F32:
    return numbers if numbers.dtype == np.float32 else (numbers.astype(np.uint32) << 16).view(np.float32)


@dataclass
class Rows:
    """One row for each case of SEEN; what no row may read is NaN."""

    layout: Layout
    group: int
    softcap: float = 0.0
    size: float = 1.0
    rows: list[DecodeRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(5)
        layout, count = self.layout, sum(blocks for blocks, _ in SEEN.values())
        self.heads = self.some(len(SEEN), (self.group + 2) * layout.kv_heads, layout.head_dim)
        self.heads[:, : self.group * layout.kv_heads] *= self.size
        shape = (len(SEEN) + 1, LAYERS, 2, layout.kv_heads, TOKENS, layout.head_dim)
        self.planes = self.elements(np.full(shape, np.nan, np.float32))
        memory = np.full((LAYERS * count + 2) * layout.record_bytes, 0xFF, np.uint8)
        start = -memory.ctypes.data % 64
        self.records = memory[start:][: (LAYERS * count + 1) * layout.record_bytes]
        free = self.rng.permutation(LAYERS * count + 1)
        for number, (blocks, ranges) in enumerate(SEEN.values()):
            mine, free = free[: LAYERS * blocks].reshape(LAYERS, blocks), free[LAYERS * blocks :]
            k, v = (
                self.elements(self.some(layout.kv_heads, blocks * BLOCK, layout.head_dim)) for _ in range(2)
            )
            if blocks:
                reference.seal(layout, k, v, self.records.reshape(-1, layout.record_bytes), mine[LAYER])
            for first, last in ranges:
                some = self.some(2, layout.kv_heads, last - first, layout.head_dim)
                self.planes[number + 1, LAYER, :, :, first:last] = self.elements(some)
            own = ranges[-1][1] - 1
            positions = BLOCK * (1 + np.arange(blocks, dtype=np.int64))
            high = BLOCK * (1 + blocks) - (20 if number == len(SEEN) - 1 else 0)
            places = mine.astype(np.int64) * layout.record_bytes
            self.rows.append(DecodeRow(number + 1, (own,), ranges, places, positions, BLOCK, high))

    def some(self, *shape: int) -> F32:
        return self.rng.standard_normal(shape, np.float32)

    def elements(self, numbers: F32) -> Any:
        return numbers if self.layout.element is Element.FLOAT32 else bf16(numbers)

    def attend(self, chosen: slice = slice(None)) -> tuple[F32, F32]:
        heads = np.ascontiguousarray(self.heads[chosen])
        out = np.full(
            (len(heads), self.group * self.layout.kv_heads, self.layout.head_dim), np.nan, np.float32
        )
        lse = np.full(out.shape[:2], np.nan, np.float32)
        attention, numbers = RowAttention(self.layout, self.group), self.planes.reshape(-1)
        attention.attend(
            heads,
            WindowPlanes(numbers, self.planes[0].size, LAYER * self.planes[0, 0].size, TOKENS),
            LAYER,
            DecodeRows.of(self.rows[chosen]),
            attention.views(self.records),
            self.layout.head_dim**-0.5,
            self.softcap,
            out,
            lse,
        )
        return out, lse

    def oracle(self, number: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """After `attend`, which writes the row's own token to its window."""
        layout, row, heads = self.layout, self.rows[number], self.heads[number]
        window = widened(self.planes[row.window, LAYER])
        parts = [window[:, :, first:last] for first, last in row.ranges]
        for place, position in zip(row.places[LAYER], row.positions, strict=True):
            record = self.records[place : place + layout.record_bytes]
            parts.append(np.stack(reference.values(layout, record))[:, :, : row.high - position])
        k, v = np.concatenate(parts, axis=2).astype(np.float64)
        queries = heads[: self.group * layout.kv_heads].reshape(layout.kv_heads, self.group, -1)
        logits = queries.astype(np.float64) @ k.transpose(0, 2, 1) * layout.head_dim**-0.5
        if self.softcap:
            logits = self.softcap * np.tanh(logits / self.softcap)
        top = logits.max(-1)
        lse = top + np.log(np.exp(logits - top[..., None]).sum(-1))
        out = np.exp(logits - lse[..., None]) @ v
        return out.reshape(-1, layout.head_dim), lse.reshape(-1)


@pytest.mark.parametrize(
    ("form", "element", "head_dim", "kv_heads", "group", "softcap"),
    [
        (Format.K8V4, Element.BFLOAT16, 64, 3, 3, 0.0),
        (Format.INT4, Element.BFLOAT16, 64, 3, 3, 0.0),
        (Format.INT8, Element.FLOAT32, 80, 2, 4, 0.0),
        (Format.EXACT, Element.FLOAT32, 64, 1, 7, 2.0),
        (Format.EXACT, Element.BFLOAT16, 256, 1, 1, 0.0),
        (Format.EXACT, Element.FLOAT32, 16, 2, 1, 0.0),
        (Format.EXACT, Element.FLOAT32, 96, 1, 2, 0.0),
    ],
)
def test_every_row_sees_its_own(
    form: Format, element: Element, head_dim: int, kv_heads: int, group: int, softcap: float
) -> None:
    check(Rows(Layout(form, element, kv_heads, head_dim), group, softcap), 3e-6)


@pytest.mark.parametrize("softcap", [50.0, 0.25])
def test_softcap(softcap: float) -> None:
    check(Rows(Layout(Format.EXACT, Element.FLOAT32, 1, 64), 3, softcap, size=30), 1e-5)


def test_huge_logits() -> None:
    check(Rows(Layout(Format.EXACT, Element.FLOAT32, 1, 64), 3, size=1e5), 1e-5)


def check(rows: Rows, tolerance: float) -> None:
    out, lse = rows.attend()
    kv_heads, head_dim = rows.layout.kv_heads, rows.layout.head_dim
    for number, row in enumerate(rows.rows):
        new = rows.heads[number, rows.group * kv_heads :].reshape(2, kv_heads, head_dim)
        stored = rows.planes[row.window, LAYER, :, :, row.offsets[0]]
        np.testing.assert_array_equal(stored, rows.elements(new), err_msg="its own token is in its window")
        want_out, want_lse = rows.oracle(number)
        np.testing.assert_allclose(lse[number], want_lse, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(out[number], want_out, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("ranges", [[(5, 5)], [(9, 3)]])
def test_nothing_visible(ranges: list[tuple[int, int]]) -> None:
    rows = Rows(Layout(Format.EXACT, Element.FLOAT32, 1, 64), 3)
    rows.rows = [rows.rows[0]._replace(ranges=ranges)]
    out, lse = rows.attend(slice(0, 1))
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_a_row_does_not_depend_on_others_nor_on_threads() -> None:
    rows = Rows(Layout(Format.K8V4, Element.BFLOAT16, 3, 64), 3)
    threads.use(2)
    together = rows.attend()
    threads.use(1)
    alone = [rows.attend(slice(i, i + 1)) for i in range(len(SEEN))]
    for found, parts in zip(together, zip(*alone, strict=True), strict=True):
        np.testing.assert_array_equal(found, np.concatenate(parts))


def test_a_number_that_is_not_one_shows() -> None:
    rows = Rows(Layout(Format.INT8, Element.FLOAT32, 1, 80), 4)
    rows.planes[1, LAYER, 0, 0, 0, 3] = 0  # the only token of the first row, which the row's own token takes
    rows.heads[0, -2] = np.nan
    out, lse = rows.attend()
    assert np.isnan(out[0]).all()
    assert np.isnan(lse[0]).all()
    assert np.isfinite(out[1:]).all()


def test_the_kernel_is_compiled_for_one_kind_of_arrays() -> None:
    """Else a request waits for the compiler, and its memory stays."""
    table, blocks = np.arange(12, dtype=np.int64).reshape(3, 4), np.array([0, 2])
    row = DecodeRow(0, (0,), [(0, 1)], table[:, blocks], blocks * BLOCK, 0, 4 * BLOCK)
    for rows in ([row], [row, row]):
        scan = DecodeRows.of(rows)
        assert all(array.flags.c_contiguous and array.dtype == np.int64 for array in scan)
        np.testing.assert_array_equal(scan.places[:, :2], table[:, blocks])
