"""Attention over all tiers against a float64 oracle of the visibility rule."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from spilld.attention.base import Attention, AttentionPlan
from spilld.attention.cpu import CpuAttention
from spilld.cuda_ext.memory.cpu_windows import CpuKVWindows, element_view
from spilld.cuda_ext.memory.windows import KVWindows, KVWindowShape
from spilld.kv.attention_span import (
    BLOCK,
    SINKS,
    WINDOW_TOKENS,
    MaskChunks,
    Sliding,
    boundary,
    sealed_by,
    stored_blocks,
)
from spilld.kv.batch import Batch, BatchItem
from spilld.kv.geometry import Geometry, LayerGeometry
from spilld.kv.sequence import KVSequence
from spilld.offload.disk.files.extent import extent_bytes
from spilld.offload.disk.prefetch import Prefetcher
from spilld.offload.disk.spiller import Spiller
from spilld.offload.disk.tier import DiskTier
from spilld.offload.errors import ExtentCorrupt
from spilld.offload.host.slab import HostSlab
from spilld.offload.prefix_cache.run_cache import RunCache
from spilld.offload.record import Element, Format, Layout
from spilld.offload.store.disk_backend import DiskBackend
from spilld.offload.store.store import Store
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import PAGE, page_aligned

from ..offload import reference
from .harness import one_thread

F64 = npt.NDArray[np.float64]
RUN = 6


@dataclass(frozen=True)
class Case:
    """m queries from position `start` on; every second run of blocks lies on disk."""

    start: int
    m: int
    format: Format = Format.K8V4
    kv_heads: int = 2
    group: int = 1
    head_dim: int = 64
    window: Sliding = None
    softcap: float = 0.0
    element: Element = Element.FLOAT32
    disk: bool = True
    sink_logits: bool = False

    def __str__(self) -> str:
        parts = [f"{self.m}@{self.start}", self.format, f"{self.kv_heads}x{self.group}x{self.head_dim}"]
        if isinstance(self.window, MaskChunks):
            parts += [f"c{self.window.size}"]
        elif self.window is not None:
            parts += [f"w{self.window}"]
        parts += [f"cap{self.softcap}"] * bool(self.softcap)
        parts += ["sinks"] * self.sink_logits
        return "-".join([*parts, *[self.element.value] * (self.element is Element.BFLOAT16)])

    @property
    def layout(self) -> Layout:
        return Layout(self.format, self.element, self.kv_heads, self.head_dim)

    @property
    def geometry(self) -> Geometry:
        heads = self.group * self.kv_heads
        scaling = float(self.head_dim**-0.5)
        sizes = heads, self.kv_heads, self.head_dim
        layer = LayerGeometry(*sizes, self.window, scaling, self.softcap, 0, self.sink_logits)
        return Geometry((layer,), vocab=100, max_positions=4096, eos=frozenset())

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.element is Element.FLOAT32 else torch.bfloat16


EXACT, INT8, K8V4, INT4 = Format.EXACT, Format.INT8, Format.K8V4, Format.INT4
CASES = [
    Case(1301, 1, EXACT, group=2, head_dim=16),
    Case(1301, 1, INT8, group=3, head_dim=80),
    Case(1301, 1, K8V4, group=1, head_dim=96, softcap=3.0),
    Case(1301, 1, K8V4, group=3, head_dim=64, window=700),
    Case(1301, 1, INT8, group=2, head_dim=32, window=100),
    Case(1301, 1, INT4, group=3, head_dim=64, softcap=3.0),
    Case(1279, 3, K8V4, group=2, head_dim=128),
    Case(1023, 3, INT8, group=1, head_dim=80),
    Case(511, 3, EXACT, group=3, head_dim=16, softcap=2.0),
    Case(767, 3, K8V4, group=2, head_dim=80, window=333),
    Case(1217, 64, K8V4, group=3, head_dim=64),
    Case(1001, 64, EXACT, group=1, head_dim=64),
    Case(991, 64, INT8, group=2, head_dim=64, window=600, softcap=3.0),
    Case(777, 300, K8V4, group=2, head_dim=96),
    Case(803, 300, INT8, group=3, head_dim=80),
    Case(901, 300, EXACT, group=2, head_dim=256, window=450),
    Case(1, 512, K8V4, group=2, head_dim=64),
    Case(333, 512, INT8, group=1, head_dim=64),
    Case(1023, 512, K8V4, group=3, head_dim=80),
    Case(1023, 512, INT4, group=2, head_dim=64),
    Case(769, 512, K8V4, group=2, head_dim=16, softcap=4.0),
    Case(769, 512, EXACT, group=2, head_dim=64, window=100),
    Case(769, 512, K8V4, group=2, head_dim=64, window=300),
    Case(769, 512, K8V4, group=2, head_dim=64, window=300, softcap=3.0),
    Case(1301, 1, K8V4, group=2, element=Element.BFLOAT16),
    Case(777, 300, K8V4, group=2, element=Element.BFLOAT16),
    Case(777, 300, EXACT, group=2, element=Element.BFLOAT16),
    Case(1023, 512, INT8, group=2, disk=False),
    Case(1301, 1, EXACT, group=2, sink_logits=True),
    Case(1301, 1, K8V4, group=2, window=100, sink_logits=True),
    Case(777, 300, EXACT, group=3, window=450, sink_logits=True),
    Case(1301, 1, K8V4, group=2, window=MaskChunks(600)),
    Case(1301, 1, EXACT, group=2, window=MaskChunks(1301)),
    Case(769, 512, K8V4, group=2, window=MaskChunks(900)),
    Case(777, 300, EXACT, group=3, window=MaskChunks(100)),
]


Tier = Callable[[Store, KVWindowShape, Geometry], tuple[KVWindows, Attention]]
"""What attends."""


def cpu_tier(store: Store, shape: KVWindowShape, geometry: Geometry) -> tuple[KVWindows, Attention]:
    windows = CpuKVWindows(shape, 4 * shape.nbytes)
    return windows, CpuAttention(geometry, store, windows)


class Setup:
    """One sequence with one layer of random K/V, and every tier that it can lie in; those of another if it is
    beside that."""

    def __init__(
        self, case: Case, folder: Path, tier: Tier = cpu_tier, *, beside: Setup | None = None
    ) -> None:
        self.case = case
        if beside is None:
            self.disk, self.store = self._open(folder)
            shape = KVWindowShape.uniform(WINDOW_TOKENS, 1, case.kv_heads, case.head_dim, case.dtype)
            self.windows, self.attention = tier(self.store, shape, case.geometry)
        else:
            self.disk, self.store = beside.disk, beside.store
            self.windows, self.attention = beside.windows, beside.attention
        self.sequence = KVSequence(self.store.open(), self.windows.take(), bytes(32))
        with self.windows.written(self.sequence.window) as numbers:  # what was never written is never seen
            for planes in numbers:
                planes.view(np.uint8)[...] = 0xFF
        self.store.reserve(self.sequence.table, 60)
        stop = case.start + case.m
        draw = np.random.default_rng(case.start * 1000 + case.m)

        def normal(heads: int) -> torch.Tensor:
            numbers = draw.standard_normal((stop, heads, case.head_dim), np.float32)
            return torch.from_numpy(numbers).to(case.dtype)

        self.q, self.k, self.v = (normal(n * case.kv_heads) for n in (case.group, 1, 1))
        self.q *= 3
        sinks = torch.from_numpy(draw.standard_normal(case.geometry.layers[0].heads, np.float32)) + 8
        self.sink_logits = sinks.to(case.dtype) if case.sink_logits else None
        self.sequence.tokens = draw.integers(0, 100, stop).tolist()

    def _open(self, folder: Path) -> tuple[DiskBackend, Store]:
        layout, layouts = self.case.layout, StoreLayout.uniform(self.case.layout, 1)
        tier, size = DiskTier(folder / "kv", 64 << 20, layouts, bytes(32)), extent_bytes(layout, RUN)
        disk = DiskBackend(tier, RunCache(tier, size), Spiller(tier, size), Prefetcher(tier, 4, size))
        slab = HostSlab(64 * layout.record_bytes, layouts.record_bytes)
        return disk, Store(layouts, slab, RUN, disk)

    def item(self, position: int, count: int) -> BatchItem:
        """The next `count` tokens, with room for what they seal."""
        table = self.sequence.table
        self.store.grow(table, self.sequence.hashes(len(table.chain), sealed_by(position + count - 1)))
        return BatchItem(self.sequence, count, position)

    def plan_of(self, *items: BatchItem) -> AttentionPlan:
        """With the reads that they need under way."""
        plan = self.attention.plan(Batch(items))
        tickets = self.store.submit([planned.read for planned in plan.reads])
        for planned, ticket in zip(plan.reads, tickets, strict=True):
            planned.ticket = ticket
        return plan

    def part(self, position: int, count: int) -> BatchItem:
        """As `item`, planned alone."""
        part = self.item(position, count)
        self.plan = self.plan_of(part)
        return part

    def attend(self, part: BatchItem) -> torch.Tensor:
        """What was made last by `part`."""
        tokens = slice(part.position, part.last + 1)
        rows = self.q[tokens], self.k[tokens], self.v[tokens]
        return self.attention.forward(0, *rows, self.plan, self.sink_logits)

    def fill(self) -> None:
        """Everything before the queries, in uneven pieces; then every second run goes to disk."""
        at = 0
        while at < self.case.start:
            count = min((301, 45, 512)[at % 3], self.case.start - at)
            self.attend(self.part(at, count))
            at += count
        table = self.sequence.table
        if self.case.disk:
            for first in range(2, table.stop, 2 * RUN):
                self.store.spill(table, first, min(RUN, table.stop - first))
        while table.leaving:
            self.store.settle()
            time.sleep(0.001)

    def expected(self) -> F64:
        """float64 [m, heads, head_dim], from all numbers and the rule alone."""
        case, stop = self.case, self.case.start + self.case.m
        t, p = np.arange(stop), np.arange(case.start, stop)[:, None]
        old = (t >= SINKS) & (t < np.array([[boundary(int(query))] for (query,) in p]))
        hidden = t > p
        if isinstance(case.window, MaskChunks):
            hidden |= t // case.window.size < p // case.window.size
        elif case.window is not None:
            hidden |= t <= p - case.window
        out = np.empty((case.m, case.kv_heads * case.group, case.head_dim))
        stored = self._stored()
        for head in range(out.shape[1]):
            q, kv = widen(self.q)[case.start :, head], head // case.group
            k, v = (widen(x)[:, kv] for x in (self.k, self.v))
            old_k, old_v = (x[kv].astype(np.float64) for x in stored)
            logits = case.head_dim**-0.5 * np.where(old, q @ old_k.T, q @ k.T)
            if case.softcap:
                logits = case.softcap * np.tanh(logits / case.softcap)
            logits[hidden] = -np.inf
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            sums = np.where(old, weights, 0) @ old_v + np.where(old, 0, weights) @ v
            total = weights.sum(axis=1, keepdims=True)
            if self.sink_logits is not None:
                total += np.exp(widen(self.sink_logits)[head] - logits.max(axis=1, keepdims=True))
            out[:, head] = sums / total
        return out

    def _stored(self) -> list[npt.NDArray[np.float32]]:
        """What the reference codec keeps of every whole block; zeros after those."""
        layout, blocks = self.case.layout, (self.case.start + self.case.m) // BLOCK
        records = np.zeros((blocks, layout.record_bytes), np.uint8)
        k, v = (element_view(x[: blocks * BLOCK].transpose(0, 1).contiguous()) for x in (self.k, self.v))
        reference.seal(layout, k, v, records, np.arange(blocks))
        values = [reference.values(layout, record) for record in records]
        kept = []
        for parts in zip(*values, strict=True):
            kept.append(np.zeros(self.k.transpose(0, 1).shape, np.float32))
            kept[-1][:, : blocks * BLOCK] = np.concatenate(parts, axis=1)
        return kept


def widen(x: torch.Tensor) -> F64:
    return x.double().numpy()


@contextmanager
def prepared(case: Case, folder: Path, tier: Tier = cpu_tier) -> Iterator[Setup]:
    with one_thread():
        setup = Setup(case, folder, tier)
        try:
            setup.fill()
            yield setup
            setup.store.check_integrity(setup.store._tables)
            setup.disk.prefetch.check_integrity()
        finally:
            setup.attention.close()
            setup.store.close()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_the_oracles(case: Case, tmp_path: Path) -> None:
    with prepared(case, tmp_path) as setup:
        part = setup.part(case.start, case.m)
        found = setup.attend(part).double().numpy()
        wanted = setup.expected()
        tolerance = 2e-5 if case.element is Element.FLOAT32 else 2e-2
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() < tolerance
        table = setup.sequence.table
        seen = stored_blocks(part.position, part.last, case.window)
        on_disk = [b for ref in table.runs for b in ref.blocks if b in seen]
        assert on_disk or not case.disk or case.window or case.start < 700, "nothing lies on disk"
        size = case.layout.record_bytes
        assert part.read_bytes["disk"] == len(on_disk) * size
        assert part.read_bytes["host"] == (len(seen) - len(on_disk)) * size


@pytest.mark.parametrize("m", [1, 3, 300])
def test_a_damaged_extent_fails_the_slice_and_frees_the_ring(m: int, tmp_path: Path) -> None:
    case = Case(1301, m, window=None)
    with prepared(case, tmp_path) as setup:
        damage(setup, 0)
        part = setup.part(case.start, m)
        out = setup.attend(part)
        assert isinstance(part.failure, ExtentCorrupt)
        assert part.failure.__traceback__ is None, "whose frames hold the tensors of the call"
        assert not out.any()
        assert out.shape == (m, 2, 64)
        assert not setup.attend(part).any(), "a failed slice stays failed in every layer"


def damage(setup: Setup, run: int) -> None:
    """One of its runs on disk, the oldest is the first."""
    place = setup.disk.tier.locate(setup.sequence.table.runs[run].run)
    ones = page_aligned(PAGE)
    ones[:] = 1
    setup.disk.tier.system.pwritev(place.file, [ones.data], place.offset(0))


@pytest.mark.parametrize("damaged", [None, 0, 1])
@pytest.mark.parametrize("window", [None, 700])
def test_rows_and_chunks_of_several_sequences_go_together(
    window: int | None, damaged: int | None, tmp_path: Path
) -> None:
    """Each is the oracle's; one whose KV is lost fails alone."""
    cases = [Case(start, m, group=2, window=window) for start, m in ((1100, 300), (1301, 1), (600, 1))]
    with prepared(cases[0], tmp_path) as first:
        setups = [first, *(Setup(case, tmp_path, beside=first) for case in cases[1:])]
        for setup in setups[1:]:
            setup.fill()
        if damaged is not None:
            damage(setups[damaged], -1)
        items = [setup.item(setup.case.start, setup.case.m) for setup in setups]
        plan = first.plan_of(*items)
        assert [item.count for item in plan.batch.items] == [1, 1, 300], "decode rows come first"
        assert {read.item for read in plan.reads} >= set(items[:2]), "something is read for both"
        owner = dict(zip(items, setups, strict=True))
        rows = [(owner[item], slice(item.position, item.last + 1)) for item in plan.batch.items]
        q, k, v = (
            torch.cat([getattr(setup, name)[tokens] for setup, tokens in rows]) for name in ("q", "k", "v")
        )
        out = first.attention.forward(0, q, k, v, plan)
        for number, (setup, item) in enumerate(zip(setups, items, strict=True)):
            found = out[item.rows].double().numpy()
            if number == damaged:
                assert isinstance(item.failure, ExtentCorrupt)
                assert not found.any()
            else:
                assert item.failure is None
                assert np.abs(found - setup.expected()).max() < 2e-5
