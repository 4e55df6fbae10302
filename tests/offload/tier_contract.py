"""What every tier promises. A dict is the oracle; the host slab and the disk tier pass the same class."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pytest

from spilld.offload.disk.files.extent import RunKey
from spilld.offload.errors import (
    ExtentMissing,
    ReadFailed,
    TierFull,
    WriteFailed,
)
from spilld.offload.record import Element, Format, Layout
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import Bytes

LAYOUT = Layout(Format.INT8, Element.FLOAT32, kv_heads=1, head_dim=16)
LAYERS = 3
LAYOUTS = StoreLayout.uniform(LAYOUT, LAYERS)
MIXED = StoreLayout.of(LAYOUT.format, LAYOUT.element, [(1, 1, 16), (1, 1, 32), (1, 1, 16)])
"""Layers of two sizes; as many as in LAYOUTS."""
BUDGET = 400_000
FINGERPRINT = bytes(range(32))


def key(n: int) -> RunKey:
    return n.to_bytes(16, "big")


def chain(n: int) -> bytes:
    return n.to_bytes(32, "little")


def blocks(n: int, count: int, layouts: StoreLayout = LAYOUTS) -> list[Bytes]:
    """Records of run n, uint8[count, record_bytes] for each layer, unlike those of any other run."""
    generator = np.random.default_rng([n, count])
    return [generator.integers(0, 256, (count, nbytes), dtype=np.uint8) for nbytes in layouts.record_bytes]


class Tier(Protocol):
    @property
    def layouts(self) -> StoreLayout: ...
    @property
    def used_bytes(self) -> int: ...
    @property
    def budget_bytes(self) -> int: ...
    def __contains__(self, run: RunKey) -> bool: ...
    def put(self, run: RunKey, first: int, chain_hash: bytes, records: Sequence[Bytes]) -> None: ...
    def get(self, run: RunKey, layer: int) -> Bytes: ...
    def delete(self, run: RunKey) -> None: ...
    def check_integrity(self) -> None: ...


class TearableTier(Tier, Protocol):
    def put_torn(self, run: RunKey, first: int, chain_hash: bytes, records: Sequence[Bytes]) -> None:
        """As put, but the write dies after the first layer: raises WriteFailed."""


class DictTier:
    """The oracle: a run takes the bytes of its records."""

    def __init__(self, budget_bytes: int, layouts: StoreLayout) -> None:
        self.budget_bytes = budget_bytes
        self.layouts = layouts
        self.runs: dict[RunKey, list[Bytes]] = {}

    @property
    def used_bytes(self) -> int:
        return sum(layer.nbytes for records in self.runs.values() for layer in records)

    def __contains__(self, run: RunKey) -> bool:
        return run in self.runs

    def put(self, run: RunKey, first: int, chain_hash: bytes, records: Sequence[Bytes]) -> None:
        if run in self.runs:
            raise ValueError("already there")
        if self.used_bytes + sum(layer.nbytes for layer in records) > self.budget_bytes:
            raise TierFull("full")
        self.runs[run] = [layer.copy() for layer in records]

    def put_torn(self, run: RunKey, first: int, chain_hash: bytes, records: Sequence[Bytes]) -> None:
        raise WriteFailed("torn")

    def get(self, run: RunKey, layer: int) -> Bytes:
        if run not in self.runs:
            raise ExtentMissing("no such run")
        if not 0 <= layer < LAYERS:
            raise ValueError("no such layer")
        return self.runs[run][layer]

    def delete(self, run: RunKey) -> None:
        if run not in self.runs:
            raise ExtentMissing("no such run")
        del self.runs[run]

    def check_integrity(self) -> None:
        assert self.used_bytes <= self.budget_bytes


def put(tier: Tier, n: int, count: int = 2) -> None:
    tier.put(key(n), n, chain(n), blocks(n, count, tier.layouts))


def fill(tier: Tier, count: int) -> dict[int, int]:
    """Put runs of count blocks until there is no room."""
    runs: dict[int, int] = {}
    with contextlib.suppress(TierFull):
        for n in range(1000):
            put(tier, n, count)
            runs[n] = count
    return runs


def assert_tier(tier: Tier, runs: dict[int, int]) -> None:
    """The tier holds exactly these runs (number: count), every byte of them, and its books are right."""
    tier.check_integrity()
    assert tier.used_bytes <= tier.budget_bytes
    assert tier.used_bytes >= sum(count * tier.layouts.column_bytes for count in runs.values())
    assert (tier.used_bytes == 0) == (not runs)
    for n, count in runs.items():
        assert key(n) in tier
        for layer, records in enumerate(blocks(n, count, tier.layouts)):
            np.testing.assert_array_equal(tier.get(key(n), layer), records)


class TierContract:
    """Subclasses provide the fixture `tier`, empty, with a budget of BUDGET bytes."""

    def test_what_was_put_comes_back(self, tier: TearableTier) -> None:
        runs = {1: 1, 2: 5, 3: 2}
        for n, count in runs.items():
            put(tier, n, count)
        assert_tier(tier, runs)

    def test_a_stranger_is_missing(self, tier: TearableTier) -> None:
        put(tier, 1)
        assert key(2) not in tier
        with pytest.raises(ExtentMissing):
            tier.get(key(2), 0)
        with pytest.raises(ExtentMissing):
            tier.delete(key(2))
        assert_tier(tier, {1: 2})

    def test_a_deleted_run_is_missing_and_its_room_is_free(self, tier: TearableTier) -> None:
        put(tier, 1)
        put(tier, 2)
        tier.delete(key(1))
        assert key(1) not in tier
        with pytest.raises(ExtentMissing):
            tier.get(key(1), 0)
        assert_tier(tier, {2: 2})
        tier.delete(key(2))
        assert_tier(tier, {})

    def test_a_key_can_come_back_after_delete(self, tier: TearableTier) -> None:
        put(tier, 1, 3)
        tier.delete(key(1))
        put(tier, 1, 2)
        assert_tier(tier, {1: 2})

    def test_a_run_is_put_once(self, tier: TearableTier) -> None:
        put(tier, 1)
        with pytest.raises(ValueError, match="already there"):
            put(tier, 1)
        assert_tier(tier, {1: 2})

    def test_a_full_tier_takes_nothing_and_loses_nothing(self, tier: TearableTier) -> None:
        runs = fill(tier, 4)
        assert len(runs) >= 8
        assert_tier(tier, runs)
        with pytest.raises(TierFull):
            put(tier, 2000, 4)
        assert key(2000) not in tier
        tier.delete(key(3))
        put(tier, 2000, 4)
        del runs[3]
        assert_tier(tier, runs | {2000: 4})

    def test_a_run_larger_than_the_tier_is_refused_at_once(self, tier: TearableTier) -> None:
        count = BUDGET // tier.layouts.column_bytes + 1
        with pytest.raises(TierFull):
            put(tier, 1, count)
        assert_tier(tier, {})

    def test_a_torn_write_reads_as_missing(self, tier: TearableTier) -> None:
        put(tier, 1)
        used = tier.used_bytes
        with pytest.raises(WriteFailed):
            tier.put_torn(key(2), 2, chain(2), blocks(2, 2, tier.layouts))
        assert key(2) not in tier
        assert tier.used_bytes == used
        for layer in range(LAYERS):
            with pytest.raises(ReadFailed):
                tier.get(key(2), layer)
        put(tier, 2)
        assert_tier(tier, {1: 2, 2: 2})

    def test_a_layer_out_of_range_is_a_bug(self, tier: TearableTier) -> None:
        put(tier, 1)
        for layer in (-1, LAYERS):
            with pytest.raises(ValueError, match="layer"):
                tier.get(key(1), layer)

    @pytest.mark.parametrize("seed", range(3))
    def test_it_does_what_a_dict_does(self, tier: TearableTier, seed: int) -> None:
        """Random operations; only when the tier is full may differ, because padding and holes take room."""
        choose = random.Random(seed)
        oracle = DictTier(tier.budget_bytes, tier.layouts)
        runs: dict[int, int] = {}
        for n in range(60):
            action = choose.choice(["put", "put", "put", "torn", "delete"])
            if action == "delete" and runs:
                gone = choose.choice(sorted(runs))
                tier.delete(key(gone))
                oracle.delete(key(gone))
                del runs[gone]
                continue
            count = choose.randint(1, 9)
            if action == "torn":
                with pytest.raises((WriteFailed, TierFull)):
                    tier.put_torn(key(n), n, chain(n), blocks(n, count, tier.layouts))
            else:
                with contextlib.suppress(TierFull):
                    put(tier, n, count)
                    oracle.put(key(n), n, chain(n), blocks(n, count, tier.layouts))
                    runs[n] = count
        assert {n for n in range(60) if key(n) in tier} == runs.keys()
        assert tier.used_bytes >= oracle.used_bytes
        assert_tier(tier, runs)
