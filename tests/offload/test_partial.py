"""Partial attention over records, against float64 softmax over what the reference codec reads from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spilld.offload.kernels.attention.partial import Partial, merge
from spilld.offload.record import (
    BLOCK,
    SEALED,
    Element,
    Format,
    Layout,
)

from . import reference

F32 = NDArray[np.float32]
FIRST = 64


class Case:
    """Sealed blocks of random numbers in shuffled records, with the oracle beside them."""

    def __init__(self, layout: Layout, group: int, queries: int, blocks: int, *, size: float = 1.0) -> None:
        rng = np.random.default_rng(layout.head_dim + group + queries)
        self.layout, self.group, self.queries = layout, group, queries
        shape = (layout.kv_heads, blocks * BLOCK, layout.head_dim)
        k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
        k *= np.float32(size)
        v += np.linspace(-2, 2, layout.head_dim, dtype=np.float32)
        k_sealed: NDArray[Any]
        v_sealed: NDArray[Any]
        if layout.element is Element.BFLOAT16:
            k_sealed, v_sealed = (((x.view(np.uint32) + 0x8000) >> 16).astype(np.uint16) for x in (k, v))
        else:
            k_sealed, v_sealed = k, v
        memory = np.full((blocks + 4) * layout.record_bytes + 64, 0xFF, np.uint8)
        start = -memory.ctypes.data % 64
        self.records = memory[start : start + (blocks + 3) * layout.record_bytes].reshape(blocks + 3, -1)
        self.rows = rng.permutation(blocks + 3)[:blocks].astype(np.int64)
        reference.seal(layout, k_sealed, v_sealed, self.records, self.rows)
        self.positions = FIRST + BLOCK * np.arange(blocks, dtype=np.int64)
        self.q = rng.standard_normal((queries, group * layout.kv_heads, layout.head_dim)).astype(np.float32)
        self.low = np.zeros(queries, np.int64)
        self.high = np.full(queries, FIRST + blocks * BLOCK, np.int64)
        self.scale, self.softcap = layout.head_dim**-0.5, 0.0

    def attend(self, order: Any = slice(None)) -> tuple[F32, F32]:
        out = np.full_like(self.q, np.nan)
        lse = np.full(self.q.shape[:2], np.nan, np.float32)
        places = self.rows[order] * self.layout.record_bytes
        Partial(self.layout).attend(
            self.q,
            self.records.reshape(-1),
            places,
            self.positions[order].copy(),
            self.low,
            self.high,
            self.scale,
            self.softcap,
            out,
            lse,
        )
        return out, lse

    def oracle(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        values = [reference.values(self.layout, self.records[row]) for row in self.rows]
        k, v = (np.concatenate(x, axis=1).astype(np.float64) for x in zip(*values, strict=True))
        t = (self.positions[:, None] + np.arange(BLOCK)).reshape(-1)
        out, lse = np.zeros(self.q.shape), np.full(self.q.shape[:2], -np.inf)
        for m in range(self.queries):
            seen = (t >= self.low[m]) & (t < self.high[m])
            for h in range(self.q.shape[1] if seen.any() else 0):
                logits = self.scale * (k[h // self.group][seen] @ self.q[m, h].astype(np.float64))
                if self.softcap:
                    logits = self.softcap * np.tanh(logits / self.softcap)
                top = logits.max()
                weights = np.exp(logits - top)
                out[m, h] = weights @ v[h // self.group][seen] / weights.sum()
                lse[m, h] = top + np.log(weights.sum())
        return out, lse

    def check(self, *, tolerance: float = 3e-6) -> None:
        out, lse = self.attend()
        want_out, want_lse = self.oracle()
        np.testing.assert_allclose(lse, want_lse, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(out, want_out, rtol=tolerance, atol=4 * tolerance)


def layout(form: Format, head_dim: int = 64, kv_heads: int = 2, element: Element = Element.FLOAT32) -> Layout:
    return Layout(format=form, element=element, kv_heads=kv_heads, head_dim=head_dim)


FORMATS = pytest.mark.parametrize("form", SEALED)


@pytest.mark.parametrize(
    ("form", "element", "head_dim", "kv_heads", "group", "queries"),
    [
        # k8v4 has the most shapes: a last group of 16, one group only, tile heights 1 to 3, many tiles.
        (Format.K8V4, Element.BFLOAT16, 64, 3, 3, 1),
        (Format.K8V4, Element.BFLOAT16, 16, 1, 1, 1),
        (Format.K8V4, Element.BFLOAT16, 80, 2, 7, 1),
        (Format.K8V4, Element.BFLOAT16, 256, 1, 4, 1),
        (Format.K8V4, Element.BFLOAT16, 64, 3, 3, 16),
        (Format.INT4, Element.BFLOAT16, 64, 3, 3, 1),
        (Format.INT4, Element.FLOAT32, 80, 1, 2, 1),
        (Format.INT4, Element.FLOAT32, 64, 3, 3, 16),
        (Format.INT8, Element.BFLOAT16, 64, 3, 3, 1),
        (Format.INT8, Element.FLOAT32, 80, 2, 2, 5),
        (Format.EXACT, Element.FLOAT32, 64, 3, 3, 1),
        (Format.EXACT, Element.FLOAT32, 16, 2, 2, 1),
        (Format.EXACT, Element.BFLOAT16, 96, 2, 1, 1),
    ],
)
def test_matches_float64(
    form: Format, element: Element, head_dim: int, kv_heads: int, group: int, queries: int
) -> None:
    Case(layout(form, head_dim, kv_heads, element), group, queries, blocks=37).check()


@FORMATS
def test_ragged_visibility(form: Format) -> None:
    case = Case(layout(form), 1, 3, blocks=9)
    end = FIRST + 9 * BLOCK
    for low, high in [
        ((0, 0, 0), (end, end - 1, end - BLOCK)),
        ((70, 130, FIRST + 63), (end, 131, FIRST + 64)),
        ((0, 300, 1000), (FIRST, 200, 2000)),
        ((200, 201, 0), (204, 500, 0)),
        ((-5, -5, 64), (10**12, 65, 10**12)),
    ]:
        case.low[:], case.high[:] = low, high
        case.check()


def test_each_query_has_its_own_visibility() -> None:
    """16 queries of 3 heads are rows in tiles of 6: two queries a tile."""
    case = Case(layout(Format.K8V4, kv_heads=3), 3, 16, blocks=9)
    case.low[:] = np.linspace(0, 300, 16)
    case.high[:] = np.linspace(290, 700, 16)
    case.check()


@FORMATS
def test_nothing_visible(form: Format) -> None:
    case = Case(layout(form), 1, 3, blocks=9)
    case.high[:] = FIRST
    for order in (slice(None), slice(0, 0)):
        out, lse = case.attend(order)
        assert (out == 0).all()
        assert (lse == -np.inf).all()


@FORMATS
def test_unseen_nan_does_not_leak(form: Format) -> None:
    """Bytes of 0xFF are NaN in every bf16 and float32 plane; query 0 sees none of them, query 2 some."""
    case = Case(layout(form), 1, 3, blocks=9)
    case.low[:], case.high[:] = (160, 160, 0), (500, 501, 640)
    clean, _ = case.attend()
    hidden = np.full((1, case.layout.record_bytes), 0xFF, np.uint8)
    k_tokens, v_tokens = range(160 - 128), range(500 - 448, BLOCK)
    for block, tokens in ((1, k_tokens), (6, v_tokens)):
        record = case.records[case.rows[block]]
        for name in ("k", "v"):
            _poison(case.layout, record, name, tokens)
    case.records[case.rows[0]] = hidden
    out, lse = case.attend()
    np.testing.assert_array_equal(out[0], clean[0])
    assert np.isfinite(lse[0]).all()
    assert np.isnan(out[2]).all()
    assert np.isnan(lse[2]).all()


def _poison(layout: Layout, record: NDArray[np.uint8], name: str, tokens: range) -> None:
    """Make K or V of some tokens of a record NaN."""
    scales = layout.format is not Format.EXACT
    offset, size = layout.plane(f"{name}_scales" if scales else f"{name}_codes")
    plane = record[offset : offset + size].reshape(layout.kv_heads, -1)
    rows = 1
    if name == "k":
        rows = {Format.EXACT: layout.head_dim, Format.INT4: layout.groups}.get(layout.format, 1)
    plane.reshape(layout.kv_heads, rows, BLOCK, -1)[:, :, list(tokens)] = 0xFF


def test_one_block_and_any_order() -> None:
    case = Case(layout(Format.K8V4), 3, 1, blocks=20)
    out, lse = case.attend()
    shuffled = np.random.default_rng(1).permutation(20)
    other_out, other_lse = case.attend(shuffled)
    np.testing.assert_allclose(other_out, out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other_lse, lse, rtol=1e-6)
    np.testing.assert_array_equal(case.attend()[0], out)
    Case(layout(Format.K8V4), 3, 1, blocks=1).check()


def test_parts_merge_to_the_whole() -> None:
    case = Case(layout(Format.K8V4), 3, 1, blocks=20)
    out, lse = case.attend(slice(0, 7))
    merge(out, lse, *case.attend(slice(7, 20)))
    want_out, want_lse = case.oracle()
    np.testing.assert_allclose(out, want_out, rtol=3e-6, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=3e-6)


@FORMATS
@pytest.mark.parametrize("softcap", [50.0, 0.25])
def test_softcap(form: Format, softcap: float) -> None:
    case = Case(layout(form), 3, 1, blocks=9, size=20.0)
    case.softcap = softcap
    case.check(tolerance=1e-5)


@FORMATS
def test_huge_logits(form: Format) -> None:
    """Logits of tens of thousands: one token takes all the weight; float32 sums limit how exactly."""
    case = Case(layout(form), 3, 1, blocks=9, size=1e5)
    out, lse = case.attend()
    want_out, want_lse = case.oracle()
    assert np.abs(want_lse).max() > 1e4
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)
    np.testing.assert_allclose(out, want_out, rtol=1e-2, atol=1e-2)


def test_shapes_are_checked() -> None:
    case = Case(layout(Format.K8V4), 3, 1, blocks=2)
    case.rows[0] = len(case.records)
    with pytest.raises(ValueError, match="places"):
        case.attend()
    case.q = case.q[:, :, :32].copy()
    with pytest.raises(ValueError, match="do not fit"):
        case.attend()
    with pytest.raises(ValueError, match="cannot merge"):
        merge(
            np.zeros((1, 2, 4), np.float32),
            *(np.zeros((1, 3), np.float32),) * 2,
            np.zeros((1, 2), np.float32),
        )


def test_merge_is_exact_and_associative() -> None:
    rng = np.random.default_rng(0)
    outs = [rng.standard_normal((2, 3, 16)).astype(np.float32) for _ in range(3)]
    lses = [(30 * rng.standard_normal((2, 3))).astype(np.float32) for _ in range(3)]

    def merged(a: tuple[F32, F32], b: tuple[F32, F32]) -> tuple[F32, F32]:
        out, lse = a[0].copy(), a[1].copy()
        merge(out, lse, *b)
        return out, lse

    x, y, z = zip(outs, lses, strict=True)
    left, right = merged(merged(x, y), z), merged(x, merged(y, z))
    weights = np.exp(np.array(lses, np.float64) - np.max(lses, axis=0))
    want = (weights[..., None] * outs).sum(0) / weights.sum(0)[..., None]
    for side in (left, right):
        np.testing.assert_allclose(side[0], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(side[1], np.max(lses, axis=0) + np.log(weights.sum(0)), rtol=1e-6)


def test_merge_with_nothing() -> None:
    out = np.arange(32, dtype=np.float32).reshape(1, 2, 16)
    lse = np.array([[1.0, -2.0]], np.float32)
    nothing = np.zeros_like(out), np.full_like(lse, -np.inf)
    kept = out.copy(), lse.copy()
    merge(*kept, *nothing)
    taken = nothing[0].copy(), nothing[1].copy()
    merge(*taken, out, lse)
    for got in (kept, taken):
        np.testing.assert_array_equal(got[0], out)
        np.testing.assert_array_equal(got[1], lse)
    merge(*nothing, *(x.copy() for x in nothing))
    assert (nothing[0] == 0).all()
    assert (nothing[1] == -np.inf).all()
