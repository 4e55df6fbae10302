"""The contract of a tier, for the dict oracle, the host slab and the disk; and the slab's own promises."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from spilld.offload.disk.files.extent import RunKey
from spilld.offload.errors import (
    BudgetTooSmall,
    ExtentMissing,
    MemoryRefused,
    TierFull,
    WriteFailed,
)
from spilld.offload.host.slab import HostSlab, columns_within
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import Bytes, Rows

from .faults import ScriptedSystem, error
from .run_tier import RunTier
from .tier_contract import BUDGET, FINGERPRINT, LAYERS, LAYOUTS, MIXED, DictTier, TearableTier, TierContract


class SlabTier:
    """The host slab as a tier: a run is a row of the slab for each layer and block."""

    def __init__(self, slab: HostSlab, layouts: StoreLayout) -> None:
        self.slab = slab
        self.layouts = layouts
        self.runs: dict[RunKey, Rows] = {}

    @property
    def used_bytes(self) -> int:
        return self.slab.used_bytes

    @property
    def budget_bytes(self) -> int:
        return self.slab.budget_bytes

    def __contains__(self, run: RunKey) -> bool:
        return run in self.runs

    def put(self, run: RunKey, first: int, chain_hash: bytes, records: Sequence[Bytes]) -> None:
        if run in self.runs:
            raise ValueError("already there")
        rows = self.slab.allocate(len(records[0]))
        for layer, layer_records in enumerate(records):
            self.slab.records[layer][rows[layer]] = layer_records
        self.runs[run] = rows

    def put_torn(self, run: RunKey, first: int, chain_hash: bytes, records: Sequence[Bytes]) -> None:
        rows = self.slab.allocate(len(records[0]))
        self.slab.records[0][rows[0]] = records[0]
        self.slab.free(rows)
        raise WriteFailed("torn")

    def get(self, run: RunKey, layer: int) -> Bytes:
        if run not in self.runs:
            raise ExtentMissing("no such run")
        if not 0 <= layer < LAYERS:
            raise ValueError("no such layer")
        records: Bytes = self.slab.records[layer][self.runs[run][layer]]
        return records

    def delete(self, run: RunKey) -> None:
        if run not in self.runs:
            raise ExtentMissing("no such run")
        self.slab.free(self.runs.pop(run))

    def check_integrity(self) -> None:
        self.slab.check_integrity()
        assert (
            sum(rows.shape[1] for rows in self.runs.values()) + self.slab.free_columns == self.slab.n_columns
        )


class TearableDisk(RunTier):
    """The disk tier, with a disk that dies after the first layer of a run."""

    def put_torn(self, run: RunKey, first: int, chain_hash: bytes, records: Sequence[Bytes]) -> None:
        assert isinstance(self.system, ScriptedSystem)
        script = self.system.script["pwritev"]
        script.extend([None, error(errno.EIO)])
        try:
            self.put(run, first, chain_hash, records)
        finally:
            script.clear()


BOTH = pytest.mark.parametrize("layouts", [LAYOUTS, MIXED], ids=["alike", "mixed"])


@BOTH
class TestDict(TierContract):
    @pytest.fixture
    def tier(self, layouts: StoreLayout) -> TearableTier:
        return DictTier(BUDGET, layouts)


@BOTH
class TestSlab(TierContract):
    @pytest.fixture
    def tier(self, layouts: StoreLayout) -> TearableTier:
        return SlabTier(HostSlab(BUDGET, layouts.record_bytes), layouts)


@BOTH
class TestDisk(TierContract):
    @pytest.fixture(params=["direct", "buffered"])
    def tier(
        self, tmp_path: Path, request: pytest.FixtureRequest, layouts: StoreLayout
    ) -> Iterator[TearableTier]:
        system = ScriptedSystem(direct=request.param == "direct")
        tier = TearableDisk(tmp_path / "kv", BUDGET, layouts, FINGERPRINT, system, segment_bytes=BUDGET // 3)
        yield tier
        tier.check_integrity()
        tier.close()


def test_slab_stays_within_its_budget() -> None:
    slab = HostSlab(1000, [192])
    assert slab.n_columns == 5
    assert slab.records[0].shape == (5, 192)
    assert slab.memory.nbytes <= slab.budget_bytes
    assert slab.memory.ctypes.data % 4096 == 0
    assert slab.records[0].flags.c_contiguous
    with pytest.raises(BudgetTooSmall):
        HostSlab(191, [192])
    with pytest.raises(BudgetTooSmall):
        HostSlab(383, [192, 192])


@pytest.mark.parametrize("sizes", [[64], [64, 64], [192, 64], [64, 192, 64, 320], [6400, 64, 6400]])
@pytest.mark.parametrize("budget", [100_000, 123_456, 1 << 20])
def test_slab_has_room_for_all_that_fits(sizes: list[int], budget: int) -> None:
    """Padding before a pool costs less than a record of it."""
    slab = HostSlab(budget, sizes)
    assert slab.memory.nbytes <= budget
    assert slab.n_columns == columns_within(budget, sizes)
    assert slab.n_columns * sum(sizes) > budget - sum(sizes) - sum(set(sizes))
    if len(set(sizes)) == 1:
        assert slab.n_columns == budget // sum(sizes)
    rows = slab.allocate(slab.n_columns)
    places = [(int(row) * nbytes, nbytes) for nbytes, mine in zip(sizes, rows, strict=True) for row in mine]
    places.sort()
    assert all(at + nbytes <= following for (at, nbytes), (following, _) in pairwise(places))
    assert sum(places[-1]) <= slab.memory.nbytes
    slab.free(rows)
    slab.check_integrity()


def test_memory_that_the_kernel_does_not_have() -> None:
    with pytest.raises(MemoryRefused, match="the kernel gives no 1 PiB of memory"):
        HostSlab(1 << 50, [1 << 30])


def test_slab_memory_is_touched_only_with_use() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    slab = HostSlab(1 << 30, [1 << 20])
    for _ in range(50):
        rows = slab.allocate(8)
        slab.records[0][rows[0]] = 1
        slab.free(rows)
    assert resident() - before < 64 << 20


def test_slab_gives_low_rows_in_order_and_reuses_freed_ones() -> None:
    slab = HostSlab(64 * 10, [64])
    assert slab.allocate(4).tolist() == [[0, 1, 2, 3]]
    slab.free([[1, 2]])
    assert slab.allocate(3).tolist() == [[1, 2, 4]]
    slab.check_integrity()


def test_slab_keeps_the_rows_of_a_layer_together() -> None:
    slab = HostSlab(64 * 20, [64, 64])
    assert slab.allocate(3).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("rows", [[[0, 0]], [[0, 5]], [[-1]], [[10]], [[0], [1]], [[0.0]], [0]])
def test_slab_refuses_to_free_what_is_not_taken(rows: list[int]) -> None:
    slab = HostSlab(64 * 10, [64])
    slab.allocate(5)
    with pytest.raises(ValueError, match="row"):
        slab.free(rows)
    assert slab.free_columns == 5
    slab.check_integrity()
    slab.free([np.arange(5)])
    with pytest.raises(ValueError, match="twice"):
        slab.free([[3]])
    assert slab.used_bytes == 0


def test_slab_frees_all_layers_or_none() -> None:
    slab = HostSlab(10_000, [64, 192])
    rows = slab.allocate(4)
    wrong = rows.copy()
    wrong[1, 0] = wrong[1, 1]
    with pytest.raises(ValueError, match="twice"):
        slab.free(wrong)
    assert slab.used_bytes == 4 * 256
    slab.check_integrity()
    slab.free(rows)
    slab.check_integrity()


def test_slab_allocates_all_or_nothing() -> None:
    slab = HostSlab(64 * 10, [64])
    rows = slab.allocate(7)
    with pytest.raises(TierFull):
        slab.allocate(4)
    assert slab.free_columns == 3
    assert slab.used_bytes == 7 * 64
    assert slab.allocate(0).shape == (1, 0)
    rest = slab.allocate(3)
    assert sorted([*rows[0], *rest[0]]) == list(range(10))
    slab.check_integrity()
