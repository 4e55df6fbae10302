"""Runs as a cache: what is used stays, what is not goes when room is needed, the ends of chains first."""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lru import Lru

from spilld.offload.block_table import RunRef
from spilld.offload.disk.files.extent import RunKey, RunPlace, extent_bytes
from spilld.offload.disk.index.index_row import Contents
from spilld.offload.errors import IndexDamaged, TierFull
from spilld.offload.prefix_cache.block_hash import chain_hash, root
from spilld.offload.prefix_cache.run_cache import RunCache
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import page_aligned

from .faults import ScriptedSystem
from .run_tier import RunTier
from .tier_contract import FINGERPRINT, LAYERS, LAYOUT, LAYOUTS, blocks, key

COUNT = 2
EXTENT = extent_bytes(LAYOUT, COUNT)
RUN_BYTES = LAYERS * EXTENT
ROOM = 5
"""Runs that fit."""


def history(lineage: int, count: int = 20) -> list[bytes]:
    parent, names = root(FINGERPRINT, LAYOUT.format), []
    for _ in range(count):
        parent = chain_hash(parent, [lineage])
        names.append(parent)
    return names


NAMES = history(0)


def open_tier(folder: Path) -> RunTier:
    return RunTier(folder, ROOM * RUN_BYTES, LAYOUTS, FINGERPRINT, ScriptedSystem())


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[RunTier]:
    tier = open_tier(tmp_path / "kv")
    yield tier
    tier.check_integrity()
    tier.close()


@pytest.fixture
def cache(tier: RunTier) -> RunCache:
    return RunCache(tier, EXTENT, Lru)


def reserve(cache: RunCache, n: int, first: int, names: list[bytes] = NAMES, count: int = COUNT) -> RunPlace:
    end = first + count
    contents = Contents(names[first - 1], tuple(names[first:end]))
    return cache.reserve(
        key(n), first=first, count=count, chain=names[end - 1], contents=contents, layouts=LAYOUTS
    )


def put(tier: RunTier, cache: RunCache, n: int, first: int, names: list[bytes] = NAMES) -> None:
    """Run n holds blocks first and first + 1 of a history."""
    place = reserve(cache, n, first, names)
    scratch = page_aligned(place.identity.largest_extent)
    for layer, records in enumerate(blocks(n, COUNT)):
        tier.io.write_extent(place, layer, records, np.arange(COUNT), scratch)
    tier.io.sync(place)
    tier.commit(place)
    cache.enter(place)


def numbers(tier: RunTier) -> set[int]:
    return {int.from_bytes(place.run, "big") for place in tier.runs()}


def test_a_committed_run_is_cached_and_found(tier: RunTier, cache: RunCache) -> None:
    put(tier, cache, 1, 1)
    put(tier, cache, 2, 3)
    assert cache.find(NAMES[1:], 1) == [RunRef(key(1), 1, 1, 2), RunRef(key(2), 3, 3, 2)]
    assert cache.find(NAMES[2:4], 2) == [RunRef(key(1), 1, 2, 1), RunRef(key(2), 3, 3, 1)]
    assert cache.cached_bytes == tier.used_bytes == 2 * RUN_BYTES
    cache.check_integrity({})


def test_room_is_made_by_evicting_the_least_recently_used(tier: RunTier, cache: RunCache) -> None:
    for n in range(ROOM):
        put(tier, cache, n, 1, history(n))
    cache.acquire([key(0)])
    cache.release(key(0))
    put(tier, cache, 10, 1, history(10))
    assert numbers(tier) == {0, 2, 3, 4, 10}
    assert cache.find(history(1)[1:], 1) == []
    cache.check_integrity({})


def test_what_is_used_stays(tier: RunTier, cache: RunCache) -> None:
    for n in range(ROOM):
        put(tier, cache, n, 1, history(n))
    runs = [key(n) for n in range(ROOM)]
    cache.acquire(runs)
    cache.hold(runs[:1])
    cache.check_integrity(Counter(runs) + Counter(runs[:1]))
    with pytest.raises(TierFull):
        reserve(cache, 10, 1, history(10))
    assert numbers(tier) == set(range(ROOM))
    for n in (0, 3):
        cache.release(key(n))
    put(tier, cache, 10, 1, history(10))
    assert numbers(tier) == {0, 1, 2, 4, 10}
    cache.check_integrity(Counter(key(n) for n in (0, 1, 2, 4)))


def test_a_release_too_many_is_a_bug(tier: RunTier, cache: RunCache) -> None:
    put(tier, cache, 1, 1)
    cache.acquire([key(1)])
    cache.release(key(1))
    with pytest.raises(AssertionError, match="more often"):
        cache.release(key(1))


def test_integrity_checks_notice(tier: RunTier, cache: RunCache) -> None:
    put(tier, cache, 1, 1)
    with pytest.raises(AssertionError, match="a use of a run"):
        cache.check_integrity({key(1): 1})
    tier.delete(key(1))
    with pytest.raises(AssertionError, match="other runs"):
        cache.check_integrity({})


def test_a_chain_goes_from_its_end(tier: RunTier, cache: RunCache) -> None:
    """Though its beginning was used longest ago."""
    for n in range(ROOM):
        put(tier, cache, n, 1 + COUNT * n)
    for gone in range(ROOM):
        put(tier, cache, 10 + gone, 1, history(10 + gone))
        assert len(cache.find(NAMES[1:], 1)) == ROOM - 1 - gone
        assert len(numbers(tier)) == ROOM
        cache.acquire([key(10 + gone)])
    with pytest.raises(TierFull):
        reserve(cache, 30, 1, history(30))


def test_what_a_used_run_continues_stays(tier: RunTier, cache: RunCache) -> None:
    for n in range(3):
        put(tier, cache, n, 1 + COUNT * n)
    cache.acquire([key(1)])
    for n in range(10, 16):
        put(tier, cache, n, 1, history(n))
    assert numbers(tier) >= {0, 1}
    assert 2 not in numbers(tier)


def test_a_checkpoint_goes_before_its_anchor(tier: RunTier, cache: RunCache) -> None:
    put(tier, cache, 1, 1)
    place = cache.reserve(
        key(2),
        first=1,
        count=COUNT,
        chain=NAMES[2],
        contents=Contents(NAMES[2], tokens=(7,)),
        layouts=LAYOUTS,
    )
    tier.commit(place)
    cache.enter(place)
    assert cache.checkpoints(NAMES[2]) == [(key(2), [7])]
    for n in range(10, 14):
        put(tier, cache, n, 1, history(n))
    assert cache.checkpoints(NAMES[2]) == []
    assert cache.find(NAMES[1:], 1) == [RunRef(key(1), 1, 1, 2)]


def test_a_fork_keeps_what_both_continue(tier: RunTier, cache: RunCache) -> None:
    branch = [*NAMES[:3], *(chain_hash(NAMES[2], [n]) for n in range(5))]
    put(tier, cache, 1, 1)
    put(tier, cache, 2, 3)
    put(tier, cache, 3, 3, branch)
    cache.discard(key(2))
    for n in range(10, 13):
        put(tier, cache, n, 1, history(n))
    assert numbers(tier) == {1, 3, 10, 11, 12}
    put(tier, cache, 13, 1, history(13))
    assert numbers(tier) == {1, 10, 11, 12, 13}


def test_a_discarded_run_is_not_found_and_its_room_is_free(tier: RunTier, cache: RunCache) -> None:
    put(tier, cache, 1, 1)
    put(tier, cache, 2, 3)
    cache.acquire([key(1)])
    cache.discard(key(1))
    cache.discard(key(1))
    cache.discard(key(99))
    assert cache.find(NAMES[1:], 1) == []
    assert (cache.cached_bytes, numbers(tier)) == (RUN_BYTES, {2})
    cache.check_integrity({key(1): 1})
    cache.release(key(1))
    put(tier, cache, 3, 1)
    assert cache.find(NAMES[1:], 1) == [RunRef(key(3), 1, 1, 2), RunRef(key(2), 3, 3, 2)]


def test_a_victim_that_is_being_read_gives_no_room_yet(tier: RunTier, cache: RunCache) -> None:
    for n in range(ROOM):
        put(tier, cache, n, 1, history(n))
    places = [tier.locate(key(n)) for n in range(ROOM)]
    for place in places:
        tier.hold(place)
    with pytest.raises(TierFull):
        reserve(cache, 10, 1, history(10))
    assert (numbers(tier), tier.used_bytes) == (set(), ROOM * RUN_BYTES)
    tier.release(places[2])
    put(tier, cache, 10, 1, history(10))
    for place in places[:2] + places[3:]:
        tier.release(place)
    assert (numbers(tier), tier.used_bytes) == ({10}, 3 * RUN_BYTES)


def test_a_run_too_long_for_the_readers_is_not_found(tier: RunTier, cache: RunCache) -> None:
    put(tier, cache, 1, 1)
    put(tier, cache, 2, 3)
    assert len(RunCache(tier, EXTENT, Lru).find(NAMES[1:], 1)) == 2
    assert RunCache(tier, EXTENT - 1, Lru).find(NAMES[1:], 1) == []


def test_a_run_of_other_layers_is_not_found(tmp_path: Path) -> None:
    """Whatever its row says: a reader would ask for layers that it does not have."""
    tier = open_tier(tmp_path / "kv")
    put(tier, RunCache(tier, EXTENT, Lru), 1, 1)
    tier.close()
    fewer = RunTier(
        tmp_path / "kv",
        ROOM * RUN_BYTES,
        StoreLayout.uniform(LAYOUT, LAYERS - 1),
        FINGERPRINT,
        ScriptedSystem(),
    )
    assert numbers(fewer) == {1}
    assert RunCache(fewer, EXTENT, Lru).find(NAMES[1:], 1) == []
    fewer.close()


def test_a_restart_knows_chains_and_the_order_of_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000, 2000))
    monkeypatch.setattr("spilld.offload.disk.tier.time.time", lambda: next(clock))
    tier = open_tier(tmp_path / "kv")
    cache = RunCache(tier, EXTENT, Lru)
    for n in (1, 2, 3):
        put(tier, cache, n, 1, history(n))
    put(tier, cache, 4, 3, history(1))
    cache.acquire([key(1), key(4)])
    cache.acquire([key(2)])
    tier.close()
    tier = open_tier(tmp_path / "kv")
    cache = RunCache(tier, EXTENT, Lru)
    cache.check_integrity({})
    assert cache.cached_bytes == 4 * RUN_BYTES
    gone: list[set[int]] = []
    for n in range(10, 16):
        before = numbers(tier)
        put(tier, cache, n, 1, history(n))
        gone.append(before - numbers(tier))
    assert gone == [set(), {3}, {4}, {1}, {2}, {10}]
    tier.close()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "disk I/O error"), IndexDamaged("malformed")])
def test_an_index_that_cannot_be_asked_knows_nothing(
    tier: RunTier, cache: RunCache, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    put(tier, cache, 1, 1)
    place = reserve(cache, 2, 3)
    tier.commit(place)

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("spilld.offload.disk.index.database.Database.rows", fail)
        assert cache.find(NAMES[1:], 1) == []
        assert cache.checkpoints(NAMES[2]) == []
        cache.enter(place)
    assert len(cache.find(NAMES[1:], 1)) == 2
    cache.check_integrity({})


@pytest.mark.parametrize("seed", range(4))
def test_it_never_loses_what_is_used_or_breaks_a_chain(tier: RunTier, cache: RunCache, seed: int) -> None:
    """Random requests: each finds its history, uses it, computes on, and lets go some time later."""
    choose = random.Random(seed)
    using: list[list[RunKey]] = []
    for n in range(120):
        names = history(choose.randrange(4))
        found = cache.find(names[1:], 1)
        runs = [stretch.run for stretch in found]
        cache.acquire(runs)
        end = found[-1].first + found[-1].count if found else 1
        try:
            if end + COUNT < len(names):
                put(tier, cache, n, end, names)
                cache.hold([key(n)])
                runs.append(key(n))
        except TierFull:
            assert using or runs, "nothing is used, yet there is no room"
        using.append(runs)
        while len(using) > choose.randrange(3):
            for run in using.pop(choose.randrange(len(using))):
                cache.release(run)
        uses = Counter(run for runs in using for run in runs)
        assert all(run in tier for run in uses), "a run in use is gone"
        cache.check_integrity(uses)
        stored = {n: tier.contents(key(n)) for n in numbers(tier)}
        reachable = {stretch.run for h in range(4) for stretch in cache.find(history(h)[1:], 1)}
        assert reachable == {key(n) for n in stored}, "a run was left that no chain leads to"
