"""The file system keeps its floor: files do not grow below it, holes are filled all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spilld.offload.disk.index.index_row import Contents
from spilld.offload.errors import TierFull
from spilld.offload.prefix_cache.run_cache import RunCache
from spilld.offload.system import SystemCalls

from .run_tier import RunTier
from .tier_contract import BUDGET, FINGERPRINT, LAYOUTS, assert_tier, blocks, chain, key, put


class SmallDisk(SystemCalls):
    """Says how much is free; the files are real."""

    free = 1 << 40

    def free_bytes(self, folder: Path) -> int:
        used = sum(file.stat().st_size for file in folder.glob("*.segment"))
        return self.free - used


@pytest.fixture
def system() -> SmallDisk:
    return SmallDisk()


@pytest.fixture
def tier(tmp_path: Path, system: SmallDisk) -> Iterator[RunTier]:
    tier = RunTier(tmp_path / "kv", BUDGET, LAYOUTS, FINGERPRINT, system, floor_bytes=10_000)
    yield tier
    tier.close()


def test_the_real_file_system_answers(tmp_path: Path) -> None:
    assert SystemCalls().free_bytes(tmp_path) > 0
    with pytest.raises(FileNotFoundError):
        SystemCalls().free_bytes(tmp_path / "nowhere")


def test_nothing_grows_below_it(tier: RunTier, system: SmallDisk) -> None:
    size = tier.run_bytes(2)
    system.free = 10_000 + 2 * size
    put(tier, 1)
    put(tier, 2)
    with pytest.raises(TierFull, match="10000 must be"):
        put(tier, 3)
    assert_tier(tier, {1: 2, 2: 2})
    tier.delete(key(1))
    put(tier, 3)
    assert_tier(tier, {2: 2, 3: 2})


def test_cached_runs_go_instead(tier: RunTier, system: SmallDisk) -> None:
    system.free = 10_000 + 2 * tier.run_bytes(2)
    cache = RunCache(tier, 1 << 20)
    for n in (1, 2):
        put(tier, n)
        cache.enter(tier.locate(key(n)))
    place = cache.reserve(
        key(3), first=0, count=2, chain=chain(3), contents=Contents(chain(0)), layouts=LAYOUTS
    )
    assert key(1) not in tier
    assert key(2) in tier
    tier.abandon(place)
    np.testing.assert_array_equal(tier.get(key(2), 0), blocks(2, 2)[0])


def test_what_is_there_stays_when_others_fill_the_disk(tier: RunTier, system: SmallDisk) -> None:
    put(tier, 1)
    system.free = 0
    with pytest.raises(TierFull):
        put(tier, 2)
    assert_tier(tier, {1: 2})
