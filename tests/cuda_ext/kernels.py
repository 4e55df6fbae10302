"""The kernels over numpy arrays, as a backend launches them, and what they must compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spilld.cuda_ext.compile import variant
from spilld.cuda_ext.compile.variant import BLOCK, ROWS, Variant
from spilld.offload.record import Format, Layout

from ..offload import reference
from .emulator import Order, Staging
from .numbers import Number, integers, narrow, number_of, seal, values, widen

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Sums = tuple[NDArray[Any], NDArray[Any]]


class Launches(Protocol):
    """Compiled kernels over numpy arrays: what they leave is copied back into those that may be written."""

    @property
    def copied_bytes(self) -> int | None:
        """What the async copies of the last launch have read; None where nobody counts."""

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        *arguments: Any,
        order: Order,
        landing: Staging,
        seed: int,
    ) -> None: ...


@dataclass(frozen=True)
class Way:
    """How the emulator runs what a GPU may run in any way."""

    order: Order = Order.RANDOM
    landing: Staging = Staging.RANDOM
    seed: int = 0

    def launch(self, kernel: Launches, variant: Variant, grid: tuple[int, int, int], *arguments: Any) -> None:
        needs = (variant.name, grid, variant.threads, variant.shared_bytes)
        kernel.launch(*needs, *arguments, order=self.order, landing=self.landing, seed=self.seed)


class Records:
    """Sealed blocks in shuffled places of a pool, the rest of which is NaN, and queries over them."""

    def __init__(self, layout: Layout, *, blocks: int, queries: int, group: int, seed: int = 0) -> None:
        rng = np.random.default_rng([layout.head_dim, blocks, queries, group, seed])
        self.layout, self.group, self.queries = layout, group, queries
        shape = (layout.kv_heads, blocks * BLOCK, layout.head_dim)
        self.k, self.v = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
        self.v += np.linspace(-2, 2, layout.head_dim, dtype=np.float32)
        self.pool = np.full((blocks + 2, layout.record_bytes), 0xFF, np.uint8)
        self.rows = rng.permutation(blocks + 2)[:blocks].astype(np.int64)
        self.seal()
        self.places: I64 = self.rows * layout.record_bytes
        self.positions: I64 = BLOCK * (1 + np.arange(blocks, dtype=np.int64))
        heads = group * layout.kv_heads
        self.q = rng.standard_normal((queries, heads, layout.head_dim)).astype(np.float32)
        self.low = np.zeros(queries, np.int64)
        self.high = np.full(queries, BLOCK * (1 + blocks), np.int64)
        self.scale, self.softcap = layout.head_dim**-0.5, 0.0

    def seal(self) -> None:
        k, v = (narrow(x, number_of(self.layout)) for x in (self.k, self.v))
        seal(self.layout, k, v, self.pool, self.rows)

    def attend(self, kernel: Launches, per_part: int, way: Way) -> Sums:
        """Partial outputs [parts, kv_heads, rows, head_dim] and lse [parts, kv_heads, rows]."""
        made = variant.attend_records(integers(self.layout))
        parts, heads = max(1, -(-len(self.places) // per_part)), self.layout.kv_heads
        rows = self.queries * self.group
        out = np.full((parts, heads, rows, self.layout.head_dim), np.nan, np.float32)
        lse = np.full((parts, heads, rows), np.nan, np.float32)
        q = reference.rotate(self.q) if self.layout.format is Format.INT4 else self.q
        arrays = (np.ascontiguousarray(q), self.pool, self.places, self.positions, self.low, self.high)
        given = [frozen(array) for array in arrays]
        sizes = (len(self.places), per_part, self.queries, self.group)
        grid = (parts, heads, -(-rows // ROWS))
        way.launch(kernel, made, grid, out, lse, *given, *sizes, float(self.scale), float(self.softcap))
        return out, lse

    def values(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        both = [values(self.layout, self.pool[row]) for row in self.rows]
        k, v = (np.concatenate(x, axis=1).astype(np.float64) for x in zip(*both, strict=True))
        return k, v

    def oracle(self) -> Sums:
        t = (self.positions[:, None] + np.arange(BLOCK)).reshape(-1)
        seen = (t >= self.low[:, None]) & (t < self.high[:, None])
        return softmax_attention(self.q, *self.values(), seen, self.scale, self.softcap)


class Window:
    """Exact numbers by slot, NaN where no query looks, and queries over ranges of slots."""

    def __init__(
        self, number: Number, head_dim: int, *, slots: int, queries: int, group: int, kv_heads: int = 2
    ) -> None:
        rng = np.random.default_rng([head_dim, slots, queries, group])
        self.number, self.slots, self.group, self.queries, self.kv_heads = (
            number,
            slots,
            group,
            queries,
            kv_heads,
        )
        numbers = rng.standard_normal((2, self.kv_heads, slots, head_dim)).astype(np.float32)
        self.planes = narrow(numbers, number)
        heads = group * self.kv_heads
        self.q = rng.standard_normal((queries, heads, head_dim)).astype(np.float32)
        self.ranges: I64 = np.tile(np.array([[0, slots]], np.int64), (queries, 1, 1))
        self.scale, self.softcap = head_dim**-0.5, 0.0

    @property
    def seen(self) -> NDArray[np.bool_]:
        slot = np.arange(self.slots)
        inside = (slot >= self.ranges[..., :1]) & (slot < self.ranges[..., 1:])
        return np.asarray(inside.any(axis=1))

    def attend(self, kernel: Launches, per_part: int, way: Way) -> Sums:
        """As Records.attend, with parts of so many tiles."""
        head_dim = self.q.shape[2]
        made = window_variant(self.number, head_dim)
        rows, parts = self.queries * self.group, -(-self.slots // (BLOCK * per_part))
        out = np.full((parts, self.kv_heads, rows, head_dim), np.nan, np.float32)
        lse = np.full((parts, self.kv_heads, rows), np.nan, np.float32)
        sizes = (self.ranges.shape[1], self.slots, per_part, self.queries, self.group)
        given = [frozen(array) for array in (self.q, self.planes, self.ranges)]
        grid = (parts, self.kv_heads, -(-rows // ROWS))
        way.launch(kernel, made, grid, out, lse, *given, *sizes, float(self.scale), float(self.softcap))
        return out, lse

    def oracle(self) -> Sums:
        k, v = widen(self.planes).astype(np.float64)
        return softmax_attention(self.q, k, v, self.seen, self.scale, self.softcap)


def window_variant(number: Number, head_dim: int) -> Variant:
    return variant.attend_window(8 * number.nbytes, head_dim, float16=number is Number.FLOAT16)


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A view that a kernel does not write: it is not copied back."""
    view = array.view()
    view.flags.writeable = False
    return view


def softmax_attention(
    q: F32, k: NDArray[Any], v: NDArray[Any], seen: NDArray[np.bool_], scale: float, softcap: float
) -> Sums:
    """Output [M, heads, head_dim] and lse [M, heads] in float64; seen: [M, tokens]."""
    queries, heads, _ = q.shape
    group = heads // len(k)
    out, lse = np.zeros(q.shape), np.full((queries, heads), -np.inf)
    for m in range(queries):
        for h in range(heads if seen[m].any() else 0):
            logits = scale * (k[h // group][seen[m]] @ q[m, h].astype(np.float64))
            if softcap:
                logits = softcap * np.tanh(logits / softcap)
            top = logits.max()
            weights = np.exp(logits - top)
            out[m, h] = weights @ v[h // group][seen[m]] / weights.sum()
            lse[m, h] = top + np.log(weights.sum())
    return out, lse


def merged(out: NDArray[Any], lse: NDArray[Any], group: int) -> Sums:
    """Parts, as attention leaves them, merged in float64: [M, heads, head_dim] and [M, heads]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        top = lse.max(axis=0).astype(np.float64)
        centre = np.where(np.isneginf(top), 0, top)
        weights = np.exp(lse - centre)
        total = weights.sum(axis=0)
        mean = (out * weights[..., None]).sum(axis=0) / np.where(total == 0, 1, total)[..., None]
        whole = np.where(total == 0, -np.inf, centre + np.log(total))
    return by_query(mean, group), by_query(whole, group)


def by_query(rows: NDArray[Any], group: int) -> NDArray[Any]:
    """[kv_heads, M * group, ...] as [M, kv_heads * group, ...]."""
    heads, count = rows.shape[:2]
    split = rows.reshape(heads, count // group, group, *rows.shape[2:]).swapaxes(0, 1)
    return split.reshape(count // group, heads * group, *rows.shape[2:])


@dataclass
class Errors:
    """Of the numbers that were compared: the largest error, and how many comparisons had more than they
    tolerate, but not more than `bound`."""

    bound: float
    largest: float = 0.0
    beyond: int = 0

    def within(self, error: float, tolerance: float) -> float:
        """What to tolerate."""
        self.largest = max(self.largest, error)
        self.beyond += tolerance < error <= self.bound
        return max(tolerance, self.bound)


_errors: ContextVar[Errors | None] = ContextVar("errors", default=None)


@contextmanager
def measured(bound: float) -> Iterator[Errors]:
    """A scope in which errors up to the bound are noted, not raised."""
    errors = Errors(bound)
    token = _errors.set(errors)
    try:
        yield errors
    finally:
        _errors.reset(token)


def assert_close(given: Sums, wanted: Sums, tolerance: float) -> None:
    for mine, exact in zip(given, wanted, strict=True):
        assert_near(mine, exact, tolerance)


def assert_near(given: NDArray[Any], wanted: NDArray[Any], tolerance: float) -> None:
    if errors := _errors.get():
        finite = np.isfinite(given) & np.isfinite(wanted)
        error = np.abs(np.where(finite, given, 0) - np.where(finite, wanted, 0)).max(initial=0)
        tolerance = errors.within(float(error), tolerance)
    np.testing.assert_allclose(given, wanted, rtol=0, atol=tolerance)
