"""Attention over a window on the CPU, against a float64 softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spilld.cuda_ext.memory.cpu_kernels import attend_rows

SLOTS = 600


class Window:
    def __init__(self, *, bf16: bool, kv_heads: int, group: int, head_dim: int, size: float = 1.0) -> None:
        rng = np.random.default_rng(head_dim + group)
        self.group = group
        self.k, self.v = (
            rng.standard_normal((kv_heads, SLOTS, head_dim)).astype(np.float32) for _ in range(2)
        )
        self.k *= np.float32(size)
        if bf16:
            for x in (self.k, self.v):
                x.view(np.uint32)[:] &= np.uint32(0xFFFF0000)
        self.bf16 = bf16
        self.q = rng.standard_normal((kv_heads * group, head_dim)).astype(np.float32)
        self.scale = head_dim**-0.5

    def attend(self, ranges: Any, softcap: float = 0.0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        k, v = ((x.view(np.uint32) >> 16).astype(np.uint16) if self.bf16 else x for x in (self.k, self.v))
        out, lse = np.full_like(self.q, np.nan), np.full(len(self.q), np.nan, np.float32)
        attend_rows(self.q, k, v, np.array(ranges, np.int64).reshape(-1, 2), self.scale, softcap, out, lse)
        return out, lse

    def check(self, ranges: Any, softcap: float = 0.0, tolerance: float = 3e-6) -> None:
        out, lse = self.attend(ranges, softcap)
        seen = np.concatenate([np.arange(*r) for r in ranges]).astype(int)
        for h, query in enumerate(self.q):
            k, v = (x[h // self.group, seen].astype(np.float64) for x in (self.k, self.v))
            logits = self.scale * (k @ query.astype(np.float64))
            if softcap:
                logits = softcap * np.tanh(logits / softcap)
            weights = np.exp(logits - logits.max())
            want = weights @ v / weights.sum()
            np.testing.assert_allclose(out[h], want, rtol=tolerance, atol=3 * tolerance)
            np.testing.assert_allclose(
                lse[h], logits.max() + np.log(weights.sum()), rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"), [(3, 3, 64), (1, 4, 256), (2, 1, 16), (2, 7, 80), (1, 2, 96)]
)
def test_matches_float64(bf16: bool, kv_heads: int, group: int, head_dim: int) -> None:
    window = Window(bf16=bf16, kv_heads=kv_heads, group=group, head_dim=head_dim)
    for ranges in (
        [(0, 576)],
        [(0, 64), (130, 131), (200, 200), (300, SLOTS)],
        [(599, 600)],
        [(7, 20), (0, 3)],
    ):
        window.check(ranges)


@pytest.mark.parametrize("softcap", [50.0, 0.25])
def test_softcap(softcap: float) -> None:
    Window(bf16=True, kv_heads=1, group=3, head_dim=64, size=30).check([(0, 100)], softcap, tolerance=1e-5)


def test_nothing_visible() -> None:
    window = Window(bf16=True, kv_heads=1, group=3, head_dim=64)
    for ranges in ([], [(5, 5)], [(9, 3)]):
        out, lse = window.attend(ranges)
        assert (out == 0).all()
        assert (lse == -np.inf).all()


def test_unseen_nan_does_not_leak() -> None:
    window = Window(bf16=True, kv_heads=2, group=3, head_dim=64)
    ranges = [(0, 64), (100, 163)]
    clean = window.attend(ranges)
    window.k[:, 64:100] = window.v[:, 64:100] = window.k[:, 163:] = window.v[:, 163:] = np.nan
    for got, want in zip(window.attend(ranges), clean, strict=True):
        np.testing.assert_array_equal(got, want)
    out, lse = window.attend([(0, 65)])
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


def test_huge_logits() -> None:
    Window(bf16=False, kv_heads=1, group=3, head_dim=64, size=1e5).check([(0, 500)], tolerance=1e-5)


def test_shapes_are_checked() -> None:
    window = Window(bf16=False, kv_heads=1, group=2, head_dim=16)
    with pytest.raises(ValueError, match="leave the window"):
        window.attend([(0, SLOTS + 1)])
    with pytest.raises(ValueError, match="leave the window"):
        window.attend([(-1, 5)])
    window.v = window.v[:, :10].copy()
    with pytest.raises(ValueError, match="do not fit"):
        window.attend([(0, 5)])
    window.v = window.k[:, ::2]
    window.k = window.k[:, ::2]
    with pytest.raises(ValueError, match="contiguous"):
        window.attend([(0, 5)])
