"""The contract of a tier, for the dict oracle, the host slab and the disk; and the slab's own promises."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
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
from spilld.offload.host.slab import HostSlab, Rows
from spilld.offload.system import Bytes

from .faults import ScriptedSystem, error
from .run_tier import RunTier
from .tier_contract import BUDGET, FINGERPRINT, LAYERS, LAYOUT, DictTier, TearableTier, TierContract


class SlabTier:
    """The host slab as a tier: a run is a row of the slab for each layer and block."""

    def __init__(self, slab: HostSlab) -> None:
        self.slab = slab
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
        rows = self.slab.allocate(len(records) * len(records[0])).reshape(len(records), -1)
        for layer_rows, layer_records in zip(rows, records, strict=True):
            self.slab.records[layer_rows] = layer_records
        self.runs[run] = rows

    def put_torn(self, run: RunKey, first: int, chain_hash: bytes, records: Sequence[Bytes]) -> None:
        rows = self.slab.allocate(len(records) * len(records[0]))
        self.slab.records[rows[: len(records[0])]] = records[0]
        self.slab.free(rows)
        raise WriteFailed("torn")

    def get(self, run: RunKey, layer: int) -> Bytes:
        if run not in self.runs:
            raise ExtentMissing("no such run")
        if not 0 <= layer < LAYERS:
            raise ValueError("no such layer")
        records: Bytes = self.slab.records[self.runs[run][layer]]
        return records

    def delete(self, run: RunKey) -> None:
        if run not in self.runs:
            raise ExtentMissing("no such run")
        self.slab.free(self.runs.pop(run).ravel())

    def check_integrity(self) -> None:
        self.slab.check_integrity()
        assert sum(rows.size for rows in self.runs.values()) + self.slab.free_slots == self.slab.n_slots


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


class TestDict(TierContract):
    @pytest.fixture
    def tier(self) -> TearableTier:
        return DictTier(BUDGET)


class TestSlab(TierContract):
    @pytest.fixture
    def tier(self) -> TearableTier:
        return SlabTier(HostSlab(BUDGET, LAYOUT.record_bytes))


class TestDisk(TierContract):
    @pytest.fixture(params=["direct", "buffered"])
    def tier(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[TearableTier]:
        system = ScriptedSystem(direct=request.param == "direct")
        tier = TearableDisk(
            tmp_path / "kv", BUDGET, LAYOUT, LAYERS, FINGERPRINT, system, segment_bytes=BUDGET // 3
        )
        yield tier
        tier.check_integrity()
        tier.close()


def test_slab_stays_within_its_budget() -> None:
    slab = HostSlab(1000, 192)
    assert slab.n_slots == 5
    assert slab.records.shape == (5, 192)
    assert slab.records.nbytes <= slab.budget_bytes
    assert slab.records.ctypes.data % 4096 == 0
    assert slab.records.flags.c_contiguous
    with pytest.raises(BudgetTooSmall):
        HostSlab(191, 192)


def test_memory_that_the_kernel_does_not_have() -> None:
    with pytest.raises(MemoryRefused, match="the kernel gives no 1 PiB of memory"):
        HostSlab(1 << 50, 1 << 30)


def test_slab_memory_is_touched_only_with_use() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    slab = HostSlab(1 << 30, 1 << 20)
    for _ in range(50):
        rows = slab.allocate(8)
        slab.records[rows] = 1
        slab.free(rows)
    assert resident() - before < 64 << 20


def test_slab_gives_low_rows_in_order_and_reuses_freed_ones() -> None:
    slab = HostSlab(64 * 10, 64)
    assert slab.allocate(4).tolist() == [0, 1, 2, 3]
    slab.free([1, 2])
    assert slab.allocate(3).tolist() == [1, 2, 4]
    slab.check_integrity()


@pytest.mark.parametrize("rows", [[0, 0], [0, 5], [-1], [10], [[0], [1]], [0.0]])
def test_slab_refuses_to_free_what_is_not_taken(rows: list[int]) -> None:
    slab = HostSlab(64 * 10, 64)
    slab.allocate(5)
    with pytest.raises(ValueError, match="row"):
        slab.free(rows)
    assert slab.free_slots == 5
    slab.check_integrity()
    slab.free(np.arange(5))
    with pytest.raises(ValueError, match="twice"):
        slab.free([3])
    assert slab.used_bytes == 0


def test_slab_allocates_all_or_nothing() -> None:
    slab = HostSlab(64 * 10, 64)
    rows = slab.allocate(7)
    with pytest.raises(TierFull):
        slab.allocate(4)
    assert slab.free_slots == 3
    assert slab.used_bytes == 7 * 64
    assert len(slab.allocate(0)) == 0
    rest = slab.allocate(3)
    assert sorted([*rows, *rest]) == list(range(10))
    slab.check_integrity()
