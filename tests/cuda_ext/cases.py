"""The matrix: every kernel, what it is compiled with, and checks of what it computes against numpy.

test_matrix.py runs it over the kernels as they are, emulated, and test_matrix_gpu.py on a GPU; mutants.py
runs it over each with a bug, which must fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from spilld.cuda_ext.compile import variant
from spilld.cuda_ext.compile.variant import BLOCK, Variant
from spilld.offload.record import Format, Layout

from ..offload import reference
from .emulator import Order, Staging
from .kernels import (
    Launches,
    Records,
    Way,
    Window,
    assert_close,
    frozen,
    merged,
    window_variant,
)
from .numbers import Number, integers, layout_of, narrow, number_of, seal, stored, widen

CLOSE = 2e-5
"""Absolute, of outputs of size 1: tensor cores get numbers of 16 bits, the sums are float32."""

F32, BF16, F16 = Number.FLOAT32, Number.BFLOAT16, Number.FLOAT16
WAYS = (
    Way(Order.RANDOM, Staging.RANDOM, 1),
    Way(Order.ASCENDING, Staging.LATE),
    Way(Order.DESCENDING, Staging.EAGER),
)


@dataclass(frozen=True)
class Case:
    """One check of one compiled kernel; it raises where the kernel is wrong."""

    name: str
    variant: Variant
    check: Callable[[Launches], None]
    always: bool
    """In every run of the suite; others only in the slow one."""


def cases() -> Iterator[Case]:
    yield from _records()
    yield from _windows()
    yield from _seals()
    yield from _opened()
    yield from _others()


# What a kernel is compiled with: the first of each pair always, the second in the slow suite.
QUANTISED = (Format.INT8, Format.K8V4, Format.INT4)
RECORDS = (
    [
        *[(form, BF16, 80) for form in QUANTISED],
        *[(Format.K8V4, BF16, 128), (Format.INT4, BF16, 64), (Format.INT4, BF16, 256)],
        *[(Format.EXACT, number, 64) for number in Number],
    ],
    [
        *[(Format.INT8, BF16, dim) for dim in (64, 96, 128, 256)],
        *[(Format.K8V4, BF16, dim) for dim in (64, 96, 256)],
        *[(Format.INT4, BF16, dim) for dim in (96, 128)],
        *[(Format.EXACT, number, dim) for number in Number for dim in (80, 96, 128, 256)],
    ],
)
WINDOWS = (
    [(BF16, 64), (BF16, 80), (F32, 64)],
    [
        *[(BF16, dim) for dim in (96, 128, 256)],
        *[(number, dim) for number in (F32, F16) for dim in (80, 96, 128, 256)],
    ],
)
SEALS = (
    [
        *[(Format.INT8, BF16, 64), (Format.K8V4, BF16, 80), (Format.INT4, BF16, 80), (Format.INT4, F32, 96)],
        *[(Format.EXACT, number, 64) for number in (F32, F16)],
    ],
    [
        *[(form, BF16, dim) for form in (Format.INT8, Format.K8V4) for dim in (96, 128, 256)],
        *[(Format.INT4, BF16, dim) for dim in (64, 128, 256)],
        *[
            (Format.INT8, F32, 80),
            (Format.K8V4, F32, 64),
            *[(form, F16, 64) for form in QUANTISED],
            (Format.EXACT, BF16, 64),
            *[(Format.EXACT, number, 256) for number in Number],
        ],
    ],
)

OPENED = (
    [(Format.INT8, BF16, 64), (Format.K8V4, BF16, 80), (Format.INT4, BF16, 80), (Format.INT4, F32, 96)]
    + [(Format.EXACT, number, 64) for number in (BF16, F32)],
    [
        *[(form, BF16, dim) for form in QUANTISED for dim in (128, 256)],
        *[(form, F16, 64) for form in (Format.EXACT, *QUANTISED)],
        *[(Format.EXACT, number, dim) for number in Number for dim in (80, 256)],
    ],
)


def _records() -> Iterator[Case]:
    for always, kinds in zip((True, False), RECORDS, strict=True):
        for form, number, dim in kinds:
            layout = layout_of(form, number, dim)
            made = variant.attend_records(integers(layout))
            for check in RECORD_CHECKS:
                name = f"attend_records-{form}-{number}-{dim}-{check.__name__}"
                yield Case(name, made, partial(check, layout), always)


def plain(layout: Layout, kernel: Launches) -> None:
    """In every order and landing, and in any split, the numbers of the softmax; every plane is read once."""
    records = Records(layout, blocks=5, queries=3, group=2)
    for way, per_part in zip(WAYS, (2, 5, 3), strict=True):
        out = records.attend(kernel, per_part, way)
        assert kernel.copied_bytes in (None, 5 * layout.record_bytes)
        assert_close(merged(*out, records.group), records.oracle(), CLOSE)


def many_rows(layout: Layout, kernel: Launches) -> None:
    """15 queries of 3 heads each, in three tiles of rows, the last not full; softcap; blocks in any order."""
    records = Records(layout, blocks=3, queries=15, group=3)
    records.softcap, records.scale = 3.0, 0.5
    shuffle = np.array([2, 0, 1])
    records.places, records.positions = records.places[shuffle].copy(), records.positions[shuffle].copy()
    records.rows = records.rows[shuffle]
    out = records.attend(kernel, 3, WAYS[0])
    assert_close(merged(*out, records.group), records.oracle(), CLOSE)


def bounds(layout: Layout, kernel: Launches) -> None:
    """Every query has bounds of its own, among them none, one token, and the edges of blocks."""
    records = Records(layout, blocks=4, queries=10, group=1)
    records.low = np.array([64, 65, 127, 128, 191, 0, 150, 319, 400, 200], np.int64)
    records.high = np.array([320, 319, 128, 192, 193, 64, 150, 320, 500, 230], np.int64)
    out, lse = records.attend(kernel, 1, WAYS[0])
    wanted = records.oracle()
    assert_close(merged(out, lse, records.group), wanted, CLOSE)
    assert np.isneginf(lse).any()
    assert not out[np.isneginf(lse)].any()
    assert np.isneginf(wanted[1]).any(), "some query sees nothing"


def unseen_nan(layout: Layout, kernel: Launches) -> None:
    """NaN where no query looks, or not this one, changes nothing; who looks at it becomes NaN."""
    records = Records(layout, blocks=3, queries=4, group=4)
    records.low = np.array([70, 70, 80, 80], np.int64)
    records.high = np.array([200, 170, 170, 171], np.int64)
    for numbers in (records.k, records.v):
        numbers[:, :3] = np.nan
        numbers[:, 140:] = np.inf
    records.v[1, 75 - 64, 2] = np.nan
    records.v[0, 170 - 64, 1] = np.nan
    records.seal()
    for way in WAYS:
        out, lse = merged(*records.attend(kernel, 2, way), records.group)
        assert not np.isfinite(out[0]).all(axis=-1).any()
        assert np.isnan(out[1, 4:]).any(axis=-1).all(), "the second KV head has it"
        assert np.isnan(out[3, :4]).any(axis=-1).all()
        wanted = records.oracle()
        for m, h in ((1, slice(4)), (2, slice(8)), (3, slice(4, 8))):
            assert_close((out[m, h], lse[m, h]), (wanted[0][m, h], wanted[1][m, h]), CLOSE)


def seen_nan(layout: Layout, kernel: Launches) -> None:
    """What every row sees and is infinite or NaN stays in its channels, or in those of its scale."""
    records = Records(layout, blocks=1, queries=3, group=2)
    records.v[0, 9, 1], records.v[1, 62, 4] = np.nan, -np.inf
    records.seal()
    with np.errstate(invalid="ignore"):
        wanted = records.oracle()
    out, lse = merged(*records.attend(kernel, 1, WAYS[0]), records.group)
    np.testing.assert_array_equal(np.isfinite(out), np.isfinite(wanted[0]))
    there = np.isfinite(wanted[0])
    assert_close((out[there], lse), (wanted[0][there], wanted[1]), CLOSE)


def one_query(layout: Layout, kernel: Launches) -> None:
    """A decode step: one query, 4 heads a KV head, large numbers, and parts that see, and read, nothing."""
    records = Records(layout, blocks=6, queries=1, group=4)
    records.q *= 8
    records.low[0], records.high[0] = 130, 333
    out, lse = records.attend(kernel, 1, WAYS[0])
    assert kernel.copied_bytes in (None, 4 * layout.record_bytes)
    assert np.isneginf(lse[0]).all()
    assert np.isneginf(lse[5]).all()
    assert np.isfinite(lse[1:5]).all()
    assert_close(merged(out, lse, records.group), records.oracle(), 5 * CLOSE)


def nothing(layout: Layout, kernel: Launches) -> None:
    records = Records(layout, blocks=2, queries=16, group=1)
    records.high[:] = 64
    out, lse = records.attend(kernel, 2, WAYS[0])
    assert kernel.copied_bytes in (None, 0)
    assert not out.any()
    assert np.isneginf(lse).all()


RECORD_CHECKS = (plain, many_rows, bounds, unseen_nan, seen_nan, one_query, nothing)


def _windows() -> Iterator[Case]:
    for always, kinds in zip((True, False), WINDOWS, strict=True):
        for number, dim in kinds:
            made = window_variant(number, dim)
            for check in (whole_window, ragged_window):
                name = f"attend_window-{number}-{dim}-{check.__name__}"
                yield Case(name, made, partial(check, number, dim), always)
    yield Case("attend_window-bfloat16-64-long_window", window_variant(BF16, 64), long_window, True)


def whole_window(number: Number, head_dim: int, kernel: Launches) -> None:
    """Three tiles, one of a single slot, and two tiles of rows."""
    window = Window(number, head_dim, slots=129, queries=3, group=7)
    window.softcap = 5.0
    for way, per_part in zip(WAYS, (1, 2, 3), strict=True):
        assert_close(merged(*window.attend(kernel, per_part, way), 7), window.oracle(), CLOSE)
        assert kernel.copied_bytes in (None, 2 * window.planes.nbytes), "both tiles of rows read all"


def ragged_window(number: Number, head_dim: int, kernel: Launches) -> None:
    """Sinks and two ranges of a ring, causal to each query, NaN in every slot that none sees."""
    window = Window(number, head_dim, slots=203, queries=4, group=2)
    ranges = [[[0, 5], [20 + m, 40], [195, 200 + m]] for m in range(3)]
    window.ranges = np.array([*ranges, [[9, 9], [4, 2], [64, 65]]], np.int64)
    window.planes[:, :, ~window.seen.any(axis=0)] = narrow(np.full(1, np.nan, np.float32), number)
    slot_bytes = window.planes[:, :, 0].nbytes
    for way, per_part in zip(WAYS, (2, 1, 4), strict=True):
        assert_close(merged(*window.attend(kernel, per_part, way), 2), window.oracle(), CLOSE)
        assert kernel.copied_bytes in (None, (203 - 64) * slot_bytes), "one of four tiles is seen by none"


def long_window(kernel: Launches) -> None:
    """Weights are relative to the largest logit, not to what has become of it after many tiles."""
    window = Window(BF16, 64, slots=170 * BLOCK, queries=1, group=1, kv_heads=1)
    assert_close(merged(*window.attend(kernel, 170, WAYS[0]), 1), window.oracle(), CLOSE)


def _seals() -> Iterator[Case]:
    for always, kinds in zip((True, False), SEALS, strict=True):
        for form, number, dim in kinds:
            layout = layout_of(form, number, dim, 1 if number is F16 else 2)
            made = variant.seal(integers(layout))
            name = f"seal-{form}-{number}-{dim}"
            yield Case(name, made, partial(sealed, layout), always)


def sealed(layout: Layout, kernel: Launches) -> None:
    """Every byte of the records, and no other."""
    rng = np.random.default_rng(layout.head_dim)
    heads, blocks, slots = layout.kv_heads, 3, 4 * BLOCK
    planes = rng.standard_normal((2, heads, slots, layout.head_dim)).astype(np.float32)
    planes *= 10.0 ** rng.integers(-3, 4, (2, heads, slots, 1)).astype(np.float32)
    _make_special(planes[:, :, 3 * BLOCK :])
    k, v = (narrow(x, number_of(layout)) for x in planes)
    firsts = np.array([3 * BLOCK, 5, BLOCK + 9], np.int64)
    wanted = np.full((blocks + 1, layout.record_bytes), 0xFF, np.uint8)
    rows = np.array([3, 0, 2])
    for row, first in zip(rows, firsts, strict=True):
        part = slice(first, first + BLOCK)
        seal(layout, k[:, part], v[:, part], wanted, np.array([row]))
    given = np.full_like(wanted, 0xFF)
    made = variant.seal(integers(layout))
    places = rows.astype(np.int64) * layout.record_bytes
    strides = (slots * layout.head_dim, layout.head_dim)
    sources = (frozen(np.ascontiguousarray(k)), frozen(np.ascontiguousarray(v)))
    WAYS[0].launch(
        kernel, made, (blocks, heads, 2), given, frozen(places), *sources, frozen(firsts), *strides
    )
    np.testing.assert_array_equal(given, wanted)


def _opened() -> Iterator[Case]:
    for always, kinds in zip((True, False), OPENED, strict=True):
        for form, number, dim in kinds:
            layout = layout_of(form, number, dim)
            made = variant.dequantise(integers(layout))
            yield Case(f"dequantise-{form}-{number}-{dim}", made, partial(opened, layout), always)


def opened(layout: Layout, kernel: Launches) -> None:
    """The numbers nearest to those that a reader has; records in any places, and nothing else is written."""
    records = Records(layout, blocks=3, queries=1, group=1)
    numbers = np.stack([records.k, records.v])
    _make_special(numbers[:, :, BLOCK:])
    records.k, records.v = numbers
    records.seal()
    number, made = number_of(layout), variant.dequantise(integers(layout))
    each = [stored(layout, records.pool[row]) for row in records.rows]
    wanted = [np.concatenate(x, axis=1) for x in zip(*each, strict=True)]
    given = narrow(np.full((2, layout.kv_heads + 1, *records.k.shape[1:]), 7, np.float32), number)
    keys, values = (np.ascontiguousarray(x) for x in given)
    WAYS[0].launch(
        *(kernel, made, (3, layout.kv_heads, 2), keys, values, frozen(records.pool), frozen(records.places))
    )
    for found, exact in zip((keys, values), wanted, strict=True):
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(widen(found[:-1]), widen(narrow(exact, number)))
        assert (widen(found[-1]) == 7).all()


def _make_special(tokens: NDArray[np.float32]) -> None:
    """Numbers that the arithmetic of FORMAT.md has words for, in [2, heads, tokens, dim]."""
    tokens[:, :, 0] = 0
    tokens[:, :, 1] = -0.0
    tokens[:, :, 2] = 3.5
    tokens[:, :, 3, 1] = np.inf
    tokens[:, :, 4, 0] = np.nan
    tokens[:, :, 5] *= np.float32(1e30)
    tokens[:, :, 6] *= np.float32(1e-38)
    tokens[:, :, 7] = np.float32(1e-44)
    tokens[:, :, 8, ::2] = -127
    tokens[:, :, 8, 1::2] = np.linspace(-126.5, 126.5, tokens.shape[3] // 2, dtype=np.float32)
    tokens[:, 0, 9, 2] = -np.inf
    tokens[:, -1, 10] = np.abs(tokens[:, -1, 10]) * -1
    tokens[:, -1, 11, -1] = -np.nan
    tokens[:, :, 12] = np.arange(tokens.shape[3], dtype=np.float32) % 16
    tokens[:, :, 13, :16] = 3e38
    tokens[:, :, 14, :16] = -3e38


def _others() -> Iterator[Case]:
    for dim, always in ((80, True), (96, True), (64, False), (128, False), (256, True)):
        yield Case(f"merge-{dim}", variant.merge(dim, 2), partial(merges, dim), always)
        yield Case(f"rotate-{dim}", variant.rotate(dim), partial(rotates, dim), always)


def merges(head_dim: int, kernel: Launches) -> None:
    rng = np.random.default_rng(head_dim)
    parts, heads, group, queries = 160, 2, 3, 2
    out = rng.standard_normal((parts, heads, queries * group, head_dim)).astype(np.float32)
    lse = (4 * rng.standard_normal((parts, heads, queries * group))).astype(np.float32)
    hidden = rng.random(lse.shape) < 0.4
    hidden[0], hidden[:, 1, 2], hidden[:, 0, 1:3] = False, True, False
    lse[hidden] = -np.inf
    out[hidden] = np.nan
    lse[:2, 0, 1] = [90, 200]
    lse[-1, 0, 2], lse[0, 1, 0] = 200, 200
    merged_out = np.full((queries, heads * group, head_dim), np.nan, np.float32)
    merged_lse = np.full((queries, heads * group), np.nan, np.float32)
    grid = (queries * group, heads, 1)
    given = (frozen(out), frozen(lse))
    WAYS[0].launch(kernel, variant.merge(head_dim, heads), grid, merged_out, merged_lse, *given, parts, group)
    wanted = merged(np.where(hidden[..., None], 0, out), lse, group)
    assert np.isneginf(wanted[1]).sum() == 1
    assert_close((merged_out, merged_lse), wanted, CLOSE)


def rotates(head_dim: int, kernel: Launches) -> None:
    x = np.random.default_rng(head_dim).standard_normal((3, head_dim)).astype(np.float32)
    x[1, 0] = -np.nan
    out = np.full_like(x, 7)
    WAYS[0].launch(kernel, variant.rotate(head_dim), (3, 1, 1), out, frozen(x))
    np.testing.assert_array_equal(out.view(np.uint32), reference.rotate(x).view(np.uint32))
