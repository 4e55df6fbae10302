"""The tiered store: every block stays readable, byte for byte, wherever it lies and whatever fails."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from spilld.offload.block_table import BlockTable, RunRef
from spilld.offload.disk.files.extent import RunKey, largest_extent, run_bytes
from spilld.offload.disk.index.index_row import Contents
from spilld.offload.disk.prefetch import Prefetcher
from spilld.offload.disk.read_ticket import ExtentRead, ReadState, Ticket
from spilld.offload.disk.spiller import Spiller
from spilld.offload.errors import (
    BudgetTooSmall,
    ExtentCorrupt,
    ExtentMissing,
    TierFull,
    WriteFailed,
)
from spilld.offload.host import residency
from spilld.offload.host.residency import Holding, Spill
from spilld.offload.host.slab import HostSlab, columns_within
from spilld.offload.maintenance.compaction import Compaction
from spilld.offload.maintenance.wear import WriteBudget
from spilld.offload.prefix_cache.block_hash import chain_hash, root
from spilld.offload.prefix_cache.run_cache import RunCache
from spilld.offload.record import SEALED, Element, Format
from spilld.offload.store import host_space
from spilld.offload.store.disk_backend import DiskBackend
from spilld.offload.store.host_space import Planner
from spilld.offload.store.run_length import EXTENT_TARGET, RUN_STEP, run_length
from spilld.offload.store.store import Store
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import Bytes

from .faults import ScriptedSystem, Stall, error
from .run_tier import RunTier
from .tier_contract import FINGERPRINT, LAYERS, LAYOUT, LAYOUTS, MIXED

RECORD = LAYOUT.record_bytes
RUN = 4
RUN_BYTES = run_bytes(LAYOUTS, RUN)
COLUMNS = 16
BUFFERS = 6
ROOT = root(FINGERPRINT, LAYOUT.format)
CHECKPOINT_BLOCKS = 2


@lru_cache(maxsize=512)
def content(name: bytes, layouts: StoreLayout = LAYOUTS) -> tuple[Bytes, ...]:
    """What the model computes for the block of this chain hash, uint8[record_bytes] for each layer."""
    generator = np.random.default_rng(int.from_bytes(name))
    records = tuple(generator.integers(0, 256, nbytes, dtype=np.uint8) for nbytes in layouts.record_bytes)
    for record in records:
        record.flags.writeable = False
    return records


class GatedSystem(ScriptedSystem):
    """Every write waits until the gate is open, so that a test decides what is in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def fdatasync(self, file: int) -> None:
        assert self.gate.wait(30), "the test never opened the gate"
        super().fdatasync(file)


@dataclass(eq=False)
class Known:
    """A sequence and what it must hold: block b, a record for each layer, at index b - 1.

    The tokens of blocks without a name yet are of its own lineage; sequences that begin with the same names
    share a history.
    """

    table: BlockTable
    lineage: int
    names: list[bytes] = field(default_factory=list)
    blocks: list[tuple[Bytes, ...]] = field(default_factory=list)

    def hashes(self, stop: int) -> list[bytes]:
        """Chain hashes of blocks 0 .. stop - 1."""
        while len(self.names) < stop:
            self.names.append(chain_hash(self.names[-1] if self.names else ROOT, [self.lineage]))
        return self.names[:stop]


class Rig:
    """A store of 16 block columns of host memory, and by default four full runs of disk."""

    def __init__(
        self,
        folder: Path,
        *,
        layouts: StoreLayout = LAYOUTS,
        columns: int = COLUMNS,
        disk_runs: int = 4,
        disk_rest: int = 0,
        planner: Planner = residency.plan,
        rate: int = 0,
        daily: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder / "kv"
        self.columns = columns
        self.layouts = layouts
        self.run_bytes = run_bytes(layouts, RUN)
        self.disk_budget = disk_runs * self.run_bytes + disk_rest if disk_runs else 0
        self.planner = planner
        self.rate = rate
        self.daily = daily
        self.clock = clock
        self.lineages = 0
        self.start()

    def start(self, run_blocks: int = RUN) -> None:
        """As a daemon does, on whatever is in the folder."""
        self.system = GatedSystem()
        budget = self.columns * self.layouts.column_bytes + RECORD
        while columns_within(budget, self.layouts.record_bytes) < self.columns:
            budget += RECORD
        self.slab = HostSlab(budget, self.layouts.record_bytes)
        self.disk: DiskBackend | None = None
        if self.disk_budget:
            tier = RunTier(
                self.folder,
                self.disk_budget,
                self.layouts,
                FINGERPRINT,
                self.system,
                segment_bytes=2 * self.run_bytes,
            )
            extent = largest_extent(self.layouts, run_blocks)
            extent = max(extent, largest_extent(self.layouts.raw, CHECKPOINT_BLOCKS))
            cache = RunCache(tier, extent)
            wear = None if self.daily is None else WriteBudget(self.daily, tier.index, self.clock)
            self.disk = DiskBackend(
                *(tier, cache, Spiller(tier, extent), Prefetcher(tier, BUFFERS, extent)),
                compaction=Compaction(tier, cache, extent, self.rate, wear=wear) if self.rate else None,
                wear=wear,
            )
        self.store = Store(self.layouts, self.slab, run_blocks, self.disk, self.planner)
        self.sequences: list[Known] = []

    def content(self, name: bytes) -> tuple[Bytes, ...]:
        return content(name, self.layouts)

    @property
    def path(self) -> DiskBackend:
        assert self.disk is not None
        return self.disk

    def open(self, reserved: int = 0, like: Sequence[bytes] = ()) -> Known:
        """A sequence that begins with blocks of these names."""
        self.lineages += 1
        known = Known(self.store.open(), self.lineages, list(like))
        self.sequences.append(known)
        self.store.reserve(known.table, reserved)
        return known

    def grow(self, known: Known, count: int) -> None:
        """Rows for the next blocks, which hold nothing yet."""
        start = len(known.table.chain)
        self.store.grow(known.table, known.hashes(start + count + (not start))[start:])

    def seal(self, known: Known) -> None:
        """What the model computes, into the rows that have none yet."""
        for block in range(len(known.blocks) + 1, known.table.stop):
            records = self.content(known.names[block])
            for layer, record in enumerate(records):
                self.store.records(layer)[known.table.rows[layer, block]] = record
            known.blocks.append(records)

    def attach(self, known: Known, most: int = 1000) -> int:
        """Take over what is stored of an empty sequence, `most` blocks of it; returns how many it was."""
        refs, blocks = [], 0
        for ref in self.store.find(known.hashes(max(len(known.names), 1))):
            assert ref.first == blocks + 1, "a gap in what was found"
            count = min(ref.count, most - blocks)
            if count:
                refs.append(RunRef(ref.run, ref.base, ref.first, count))
                blocks += count
        if blocks:
            self.store.attach(known.table, refs, known.hashes(blocks + 1))
            known.blocks = [self.content(name) for name in known.names[1 : blocks + 1]]
        return blocks

    def fill(self, known: Known, count: int) -> None:
        """What a step of the engine does for a sequence."""
        self.store.settle()
        self.grow(known, count)
        self.seal(known)
        self.store.settle()

    def forget(self, known: Known) -> None:
        self.sequences.remove(known)
        self.store.forget(known.table)

    def reset(self, known: Known, *, anew: bool = True) -> None:
        """Forget what was computed; anew: what comes next is something else."""
        self.store.reset(known.table)
        known.blocks.clear()
        if anew:
            self.lineages += 1
            known.lineage = self.lineages
            known.names.clear()

    def reopen(self, run_blocks: int = RUN) -> None:
        """End the process in good order and begin the next."""
        self.close()
        self.start(run_blocks)

    def stored(self) -> dict[RunKey, list[Bytes]]:
        """What lies on disk, by run and layer."""
        tier = self.path.tier
        assert isinstance(tier, RunTier)
        return {place.run: [tier.get(place.run, layer) for layer in range(LAYERS)] for place in tier.runs()}

    def settled(self) -> None:
        """Wait until no thread has anything of the store."""
        prefetch = self.path.prefetch
        until = time.monotonic() + 10
        while time.monotonic() < until:
            self.store.settle()
            prefetch.finished()
            if not (self.path.spiller.pending or self.path.moving or prefetch._issued or prefetch._abandoned):
                return
            time.sleep(0.001)
        raise AssertionError("a thread never ended")

    def scan(self, known: Known, layer: int, visible: range) -> dict[int, Bytes]:
        """Visible records of a layer by block, read as attention reads them."""
        table, nbytes = known.table, self.layouts[layer].record_bytes
        found: dict[int, Bytes] = {}
        for block in visible:
            if table.rows[layer, block] >= 0:
                place = table.rows[layer, block] * nbytes
                found[block] = self.store.memory[place : place + nbytes].copy()
        runs = self.store.runs_to_read(table, visible)
        waiting = list(
            zip(runs, self.store.submit([ExtentRead(ref.run, layer) for ref in runs]), strict=True)
        )
        while waiting:
            size = self.store.staging_batch
            batch, waiting = waiting[:size], waiting[size:]
            with self.store.staged([ticket for _, ticket in batch]) as (memory, offsets):
                for (ref, _), offset in zip(batch, offsets, strict=True):
                    for block in table.extent_blocks(ref, visible).tolist():
                        place = offset + (block - ref.base) * nbytes
                        assert block not in found, "a block is served by two tiers"
                        found[block] = memory[place : place + nbytes].copy()
        return found

    def assert_scan(self, known: Known, layer: int, visible: range) -> None:
        found = self.scan(known, layer, visible)
        assert sorted(found) == list(visible)
        for block, record in found.items():
            np.testing.assert_array_equal(record, known.blocks[block - 1][layer], f"block {block}")

    def check(self) -> None:
        """Books, budgets, and every byte of every block."""
        self.store.check_integrity([known.table for known in self.sequences])
        assert self.slab.used_bytes <= self.slab.budget_bytes
        assert sum(known.table.reserved for known in self.sequences) <= self.store.capacity or (
            self.store.spill_failure
        )
        if self.disk is not None:
            self.disk.prefetch.check_integrity()
            sizes = sum(path.stat().st_size for path in self.folder.glob("*.segment"))
            assert sizes <= self.disk.tier.budget_bytes
        for known in self.sequences:
            assert known.table.stop == len(known.blocks) + 1
            for layer in range(LAYERS):
                self.assert_scan(known, layer, range(1, known.table.stop))

    def assert_all_disk_can_be_had(self) -> None:
        """Nothing is in use, so one run as large as the whole budget fits. What was cached is gone then."""
        cache, tier = self.path.cache, self.path.tier
        assert cache.cached_bytes == sum(place.range.nbytes for place in tier.runs())
        count = tier.budget_bytes // self.layouts.column_bytes
        while tier.run_bytes(count) > tier.budget_bytes:
            count -= 1
        whole = cache.reserve(
            bytes(16),
            first=1,
            count=count,
            chain=bytes(32),
            contents=Contents(bytes(32)),
            layouts=self.layouts,
        )
        tier.abandon(whole)
        assert (tier.used_bytes, tier.runs(), cache.cached_bytes) == (0, [], 0)

    def close(self) -> None:
        self.system.gate.set()
        self.store.close()


@contextmanager
def rigged(folder: Path, **options: object) -> Iterator[Rig]:
    rig = Rig(folder, **options)  # type: ignore[arg-type]
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture(params=[LAYOUTS, MIXED], ids=["alike", "mixed"])
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    with rigged(tmp_path, layouts=request.param) as rig:
        yield rig


WHICH = st.integers(0, 3)
COUNT = st.integers(1, 8)
RESERVATION = st.integers(0, 14)


class StoreMachine(RuleBasedStateMachine):
    """What an engine may do between and during steps. Choices never depend on what a thread has done."""

    layouts = LAYOUTS

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.rig = Rig(Path(self.folder.name), rate=1 << 40, layouts=self.layouts)
        self.ahead: list[Ticket] = []
        self.histories: list[list[bytes]] = []

    def pick(self, which: int) -> Known | None:
        return self.rig.sequences[which] if which < len(self.rig.sequences) else None

    @initialize(blocks=st.lists(st.integers(6, 14), min_size=2, max_size=4))
    def begin(self, blocks: list[int]) -> None:
        for reserved in blocks:
            self.open(reserved, idle=False)

    @rule(blocks=RESERVATION, idle=st.booleans(), like=st.integers(0, 20), shared=st.integers(0, 20))
    def open(self, blocks: int, idle: bool, like: int = 0, shared: int = 0) -> None:
        """A new sequence, which may begin as one that was there before."""
        if len(self.rig.sequences) < 4:
            names = self.histories[like][:shared] if like < len(self.histories) else []
            known = self.rig.open(like=names)
            self.histories.append(known.names)
            known.table.idle = idle
            self.reserve(len(self.rig.sequences) - 1, blocks)

    @rule(which=WHICH, most=st.integers(0, 20))
    def attach(self, which: int, most: int) -> None:
        """Blocks of an empty sequence that are stored need not be computed again."""
        if (known := self.pick(which)) is None or known.table.chain:
            return
        self.finish_writes()
        blocks = self.rig.attach(known, min(most, known.table.reserved))
        assert known.table.disk_blocks == blocks

    @rule(which=WHICH)
    def find(self, which: int) -> None:
        """What is found is stored without a gap, and is what the names say; all else is not stored."""
        if (known := self.pick(which)) is None:
            return
        self.finish_writes()
        stored, at = self.rig.stored(), 1
        for ref in self.rig.store.find(known.names):
            assert ref.first == at
            for block in ref.blocks:
                for layer, records in enumerate(stored[ref.run]):
                    expected = self.rig.content(known.names[block])[layer]
                    np.testing.assert_array_equal(records[block - ref.base], expected)
            at += ref.count
        if at < len(known.names):
            expected = self.rig.content(known.names[at])[0]
            assert not any((records == expected).all(1).any() for records, *_ in stored.values())

    @rule()
    def write_behind(self) -> None:
        self.rig.store.write_behind()

    @rule(which=WHICH)
    def save(self, which: int) -> None:
        if (known := self.pick(which)) is not None:
            self.rig.store.save(known.table)

    @rule(runs=st.integers(1, 4))
    def evict(self, runs: int) -> None:
        """Everything goes before room is refused, but what is in use and what that continues."""
        self.finish_writes()
        cache, tier = self.rig.path.cache, self.rig.path.tier
        used = {ref.run for known in self.rig.sequences for ref in known.table.runs}
        try:
            place = cache.reserve(
                bytes(16),
                first=1,
                count=runs * RUN,
                chain=bytes(32),
                contents=Contents(b""),
                layouts=self.rig.layouts,
            )
        except TierFull:
            left = {place.run for place in tier.runs()}
            continued = {run for child in left for run in tier.index.holders(tier.contents(child).parent)}
            assert left <= used | continued, "a run that nobody needs was not given up"
        else:
            tier.abandon(place)
        assert all(run in tier for run in used), "a run in use is gone"

    @rule()
    def reopen(self) -> None:
        """A daemon that ends and starts again loses no run, and no byte of one."""
        self.finish_writes()
        self.rest()
        before = self.rig.stored()
        self.rig.reopen()
        after = self.rig.stored()
        assert after.keys() == before.keys()
        for run, layers in before.items():
            for found, records in zip(after[run], layers, strict=True):
                np.testing.assert_array_equal(found, records)

    @rule(which=WHICH, blocks=RESERVATION)
    def reserve(self, which: int, blocks: int) -> None:
        if (known := self.pick(which)) is None:
            return
        blocks = max(blocks, known.table.stop - 1)
        before, room = known.table.reserved, self.rig.store.unreserved
        if blocks - before > room:
            with pytest.raises(TierFull):
                self.rig.store.reserve(known.table, blocks)
            assert known.table.reserved == before
        else:
            self.rig.store.reserve(known.table, blocks)
            assert self.rig.store.unreserved == room - (blocks - before)

    @rule(parts=st.lists(st.tuples(WHICH, COUNT), min_size=1, max_size=4, unique_by=lambda part: part[0]))
    def step(self, parts: list[tuple[int, int]]) -> None:
        """All sequences of a step grow before the first of them is sealed."""
        rig = self.rig
        rig.system.gate.set()
        rig.store.settle()
        grown = []
        for which, count in parts:
            if (known := self.pick(which)) is None:
                continue
            count = min(count, known.table.reserved - (known.table.stop - 1))
            before = (known.table.stop, list(known.table.chain))
            try:
                rig.grow(known, count)
            except TierFull:
                assert rig.slab.free_columns < count
                assert before == (known.table.stop, known.table.chain)
            else:
                grown.append(known)
                assert (known.table.rows[:, len(known.blocks) + 1 : known.table.stop] >= 0).all()
        for known in grown:
            rig.seal(known)

    @rule(which=WHICH, at=st.integers(0, 19), count=st.integers(1, RUN))
    def spill(self, which: int, at: int, count: int) -> None:
        """A short run out of the middle of what is in host memory."""
        if (known := self.pick(which)) is None or not (spans := known.table.host_spans()):
            return
        span = spans[at % len(spans)]
        first = span[at % len(span)]
        with suppress(TierFull):
            self.rig.store.spill(known.table, first, min(count, span.stop - first))

    @rule(columns=st.integers(0, COLUMNS))
    def make_room(self, columns: int) -> None:
        self.rig.store.make_room(columns)

    @rule()
    def settle(self) -> None:
        self.rig.store.settle()

    @rule()
    def hold_writes(self) -> None:
        self.rig.system.gate.clear()

    @rule()
    def finish_writes(self) -> None:
        self.rig.system.gate.set()
        self.rig.settled()

    @rule(which=WHICH, layer=st.integers(0, LAYERS - 1), a=st.integers(1, 20), b=st.integers(1, 20))
    def scan(self, which: int, layer: int, a: int, b: int) -> None:
        """A sliding window sees the middle of a sequence."""
        if (known := self.pick(which)) is not None:
            self.rig.assert_scan(known, layer, range(min(a, b), min(max(a, b), known.table.stop)))

    @rule(which=WHICH, layer=st.integers(0, LAYERS - 1))
    def read_ahead(self, which: int, layer: int) -> None:
        """Extents that nobody will look at: half of the ring, as attention needs the other half."""
        self.rest()
        if (known := self.pick(which)) is not None:
            refs = known.table.runs[: BUFFERS // 2]
            self.ahead = self.rig.store.submit([ExtentRead(ref.run, layer) for ref in refs])

    @rule()
    def rest(self) -> None:
        self.rig.store.cancel(self.ahead)
        self.ahead = []

    @rule(which=WHICH, anew=st.booleans())
    def reset(self, which: int, anew: bool) -> None:
        if (known := self.pick(which)) is not None:
            reserved = known.table.reserved
            self.rig.reset(known, anew=anew)
            assert known.table.reserved == reserved

    @rule(which=WHICH)
    def forget(self, which: int) -> None:
        if (known := self.pick(which)) is not None:
            self.rig.forget(known)

    @rule(which=WHICH, idle=st.booleans())
    def change_idle(self, which: int, idle: bool) -> None:
        if (known := self.pick(which)) is not None:
            known.table.idle = idle

    @invariant()
    def everything_is_there(self) -> None:
        self.rig.check()
        assert self.rig.store.spill_failure is None

    def teardown(self) -> None:
        """Once all is forgotten and no thread has anything, no row is taken, and all disk can be had."""
        rig = self.rig
        try:
            rig.system.gate.set()
            for known in list(rig.sequences):
                rig.forget(known)
            self.rest()
            rig.settled()
            rig.check()
            assert rig.slab.used_bytes == 0
            assert rig.store.unreserved == rig.store.capacity
            rig.assert_all_disk_can_be_had()
        finally:
            rig.close()
            self.folder.cleanup()


class MixedStoreMachine(StoreMachine):
    """With layers of two sizes."""

    layouts = MIXED


TestStoreMachine, TestMixedStoreMachine = StoreMachine.TestCase, MixedStoreMachine.TestCase
TestStoreMachine.settings = TestMixedStoreMachine.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


# Sizes.


@pytest.mark.parametrize("fmt", SEALED)
@pytest.mark.parametrize(("layers", "step"), [(1, 1), (3, 8), (30, 8), (26, 2)])
def test_run_length_says_how_many_bytes_are_enough(fmt: Format, layers: int, step: int) -> None:
    layouts = StoreLayout.of(fmt, Element.BFLOAT16, [(layers, 3, 64), (1, 1, 128)])
    with pytest.raises(BudgetTooSmall) as refused:
        run_length(layouts, 1, step)
    match = re.search(r"need at least ([\d.]+) (KiB|MiB|GiB)$", str(refused.value))
    assert match is not None
    needed = math.ceil(float(match[1]) * 2 ** {"KiB": 10, "MiB": 20, "GiB": 30}[match[2]])
    padding = max(layouts.record_bytes)
    columns = HostSlab(needed + padding, layouts.record_bytes).n_columns
    assert run_length(layouts, columns, step) == RUN_STEP
    with pytest.raises(BudgetTooSmall, match=match[0]):
        run_length(layouts, HostSlab(int(needed * 0.98), layouts.record_bytes).n_columns, step)


@pytest.mark.parametrize("columns", range(16, 200, 7))
def test_a_run_leaves_room_for_another_and_a_step(columns: int) -> None:
    step = 8
    run = run_length(LAYOUTS, columns, step)
    assert run % RUN_STEP == 0
    assert 2 * run + step <= columns < 2 * (run + RUN_STEP) + step or run * RECORD >= EXTENT_TARGET


def test_a_run_is_no_longer_than_the_disk_needs() -> None:
    run = run_length(LAYOUTS, 10**9 // LAYERS, 8)
    assert (run - RUN_STEP) * RECORD < EXTENT_TARGET <= run * RECORD


@pytest.mark.parametrize("disk_runs", [0, 1, 5])
def test_reservations_are_kept_within_the_capacity(tmp_path: Path, disk_runs: int) -> None:
    with rigged(tmp_path, columns=10, disk_runs=disk_runs, disk_rest=RUN_BYTES - 1) as rig:
        kv, capacity = rig.store, 10 + disk_runs * RUN
        assert (kv.capacity, kv.unreserved) == (capacity, capacity)
        one, other = rig.open(4), rig.open(3)
        assert kv.unreserved == capacity - 7
        with pytest.raises(TierFull, match=f"{capacity - 6} more blocks .* {capacity - 7} do"):
            kv.reserve(one.table, capacity - 2)
        assert (one.table.reserved, kv.unreserved) == (4, capacity - 7)
        kv.reserve(one.table, capacity - 3)
        kv.reserve(one.table, capacity - 3)
        assert kv.unreserved == 0
        kv.reset(one.table)
        assert kv.unreserved == 0
        kv.reserve(one.table, 1)
        assert kv.unreserved == capacity - 4
        rig.forget(other)
        assert kv.unreserved == capacity - 1
        rig.check()


def test_a_block_that_was_not_reserved_gets_no_row(rig: Rig) -> None:
    known = rig.open(3)
    rig.fill(known, 3)
    for _ in range(2):
        with pytest.raises(ValueError, match="reserved"):
            rig.grow(known, 1)
        rig.check()
    rig.store.reserve(known.table, 4)
    rig.fill(known, 1)
    rig.check()


def test_one_sequence_fills_both_tiers_to_the_last_block(rig: Rig) -> None:
    capacity = rig.store.capacity
    assert capacity == COLUMNS + 4 * RUN
    known = rig.open(capacity)
    while known.table.stop <= capacity:
        rig.fill(known, min(5, capacity + 1 - known.table.stop))
        rig.check()
    assert rig.slab.free_columns == 0
    assert rig.path.tier.used_bytes == rig.path.tier.budget_bytes
    column = rig.layouts.column_bytes
    assert rig.store.usage(known.table) == {"host": COLUMNS * column, "disk": 4 * RUN * column}
    with pytest.raises(TierFull):
        rig.store.reserve(known.table, capacity + 1)


def test_the_first_block_has_a_hash_and_no_row(rig: Rig) -> None:
    known = rig.open(4)
    rig.store.grow(known.table, [bytes(32)])
    assert (known.table.stop, rig.slab.used_bytes) == (1, 0)
    rig.store.grow(known.table, [])
    rig.store.grow(known.table, [bytes(32)] * 2)
    assert (known.table.stop, rig.slab.used_bytes) == (3, 2 * rig.layouts.column_bytes)
    assert (known.table.rows[:, 0] < 0).all()


def test_without_a_disk(tmp_path: Path) -> None:
    with rigged(tmp_path, columns=4, disk_runs=0) as rig:
        one, other = rig.open(3), rig.open(1)
        rig.fill(one, 3)
        rig.fill(other, 1)
        rig.store.make_room(4)
        rig.check()
        assert rig.store.submit([]) == []
        rig.store.cancel([])
        assert (rig.store.disk_read_bytes, rig.store.stall_seconds) == (0, 0.0)
        assert not [name for name in rig.store.stats() if "disk" in name]
        with pytest.raises(TierFull):
            rig.store.reserve(other.table, 2)
        rig.forget(one)
        rig.store.reserve(other.table, 4)
        rig.fill(other, 3)
        rig.check()


# Spills.


def test_growth_waits_for_the_write_that_makes_room(rig: Rig) -> None:
    known = rig.open(COLUMNS + RUN)
    rig.fill(known, COLUMNS)
    stall = Stall()
    rig.system.script["fdatasync"].append(stall)
    timer = threading.Timer(0.1, stall.over.set)
    timer.start()
    rig.grow(known, 1)
    assert stall.over.is_set()
    rig.seal(known)
    rig.check()
    assert known.table.disk_blocks == RUN
    timer.join()


def test_growth_gives_up_on_a_write_that_never_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_space, "WRITE_DEADLINE_S", 0.05)
    known = rig.open(COLUMNS + RUN)
    rig.fill(known, COLUMNS)
    rig.system.gate.clear()
    with pytest.raises(TierFull, match="no write to disk has ended"):
        rig.grow(known, 1)
    rig.check()
    rig.system.gate.set()
    rig.settled()
    rig.fill(known, 1)
    rig.check()


def test_make_room_never_waits_and_counts_what_is_on_its_way(rig: Rig) -> None:
    known = rig.open(COLUMNS)
    rig.fill(known, COLUMNS)
    rig.system.gate.clear()
    for columns, spans in (
        (0, range(1, 17)),
        (1, range(5, 17)),
        (RUN, range(5, 17)),
        (RUN + 1, range(9, 17)),
    ):
        rig.store.make_room(columns)
        assert known.table.host_spans() == (spans,)
    rig.check()
    assert rig.slab.free_columns == 0
    rig.system.gate.set()
    rig.settled()
    assert rig.slab.free_columns == 2 * RUN
    assert known.table.disk_blocks == 2 * RUN
    rig.check()


def test_what_is_not_sealed_yet_is_not_spilled(rig: Rig) -> None:
    """In a step all sequences grow first; room for the last must not come from rows the step will fill."""
    old, one, other = rig.open(8), rig.open(8), rig.open(12)
    rig.fill(old, 8)
    rig.grow(one, 8)
    rig.grow(other, 8)
    assert one.table.host_spans() == ()
    assert (one.table.rows[:, 1:] >= 0).all()
    rig.seal(one)
    rig.seal(other)
    rig.check()
    assert (old.table.disk_blocks, one.table.disk_blocks) == (8, 0)
    rig.fill(other, 4)
    rig.check()


def test_when_nothing_but_the_step_is_in_host_memory_growth_fails(rig: Rig) -> None:
    one, other = rig.open(COLUMNS), rig.open(4)
    rig.grow(one, COLUMNS)
    with pytest.raises(TierFull, match="none can be spilled"):
        rig.grow(other, 4)
    rig.seal(one)
    rig.store.settle()
    rig.check()
    rig.reset(one)
    rig.grow(one, COLUMNS)
    with pytest.raises(TierFull, match="none can be spilled"):
        rig.grow(other, 4)
    rig.seal(one)
    rig.fill(other, 4)
    rig.check()


def test_the_planner_sees_what_can_go_and_who_is_idle(tmp_path: Path) -> None:
    asked: list[tuple[list[Holding], int, int]] = []

    def planner(holdings: Sequence[Holding], columns: int, run_blocks: int) -> list[Spill]:
        asked.append((list(holdings), columns, run_blocks))
        return [Spill(1, 2, 3)] if len(asked) == 1 else []

    with rigged(tmp_path, planner=planner) as rig:
        running, idle, empty = rig.open(8), rig.open(8), rig.open(8)
        rig.fill(running, 8)
        rig.fill(idle, 7)
        idle.table.idle = empty.table.idle = True
        rig.system.gate.clear()
        rig.store.make_room(1)
        assert asked == []
        rig.store.make_room(3)
        before = [Holding((range(1, 9),)), Holding((range(1, 8),), idle=True), Holding((), idle=True)]
        assert asked == [(before, 2, RUN)]
        rig.store.make_room(8)
        after = [before[0], Holding((range(1, 2), range(5, 8)), idle=True), before[2]]
        assert asked[1:] == [(after, 8 - 1 - 3, RUN)]
        rig.system.gate.set()


def test_a_planner_may_decline(tmp_path: Path) -> None:
    with rigged(tmp_path, planner=lambda holdings, columns, run_blocks: []) as rig:
        one, other = rig.open(COLUMNS), rig.open(1)
        rig.fill(one, COLUMNS)
        rig.store.make_room(4)
        with pytest.raises(TierFull, match="none can be spilled"):
            rig.grow(other, 1)
        rig.check()
        assert rig.path.tier.used_bytes == 0
        assert rig.store.spill_failure is None


def test_a_full_disk_is_no_failure(tmp_path: Path) -> None:
    with rigged(tmp_path, disk_runs=1) as rig:
        one, other = rig.open(COLUMNS), rig.open(RUN)
        rig.fill(one, COLUMNS)
        rig.fill(other, RUN)
        rig.forget(other)
        other = rig.open(RUN)
        rig.fill(other, RUN)
        with pytest.raises(TierFull):
            rig.store.spill(one.table, 5, RUN)
        rig.store.make_room(1)
        rig.check()
        assert rig.store.spill_failure is None
        rig.forget(one)
        rig.store.spill(other.table, 1, RUN)
        rig.settled()
        rig.check()
        assert other.table.disk_blocks == RUN


# Failures.


@pytest.mark.parametrize("call", ["ftruncate", "pwritev", "fdatasync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_no_more_loses_nothing(rig: Rig, call: str, number: int) -> None:
    capacity = rig.store.capacity
    known, idle = rig.open(COLUMNS + RUN + 4), rig.open(2)
    rig.fill(known, COLUMNS)
    rig.fill(known, 1)
    durable = rig.path.tier.used_bytes
    rig.system.script[call].append(error(number))
    rig.fill(known, 3)
    with pytest.raises(TierFull, match="none can be spilled"):
        rig.grow(known, 1)
    assert isinstance(rig.store.spill_failure, WriteFailed)
    assert str(rig.store.spill_failure) == rig.store.stats()["disk_failure"]
    assert known.table.leaving == []
    assert rig.path.tier.used_bytes == durable == rig.run_bytes
    assert (rig.store.usage(known.table)["host"], known.table.disk_blocks) == (
        COLUMNS * rig.layouts.column_bytes,
        RUN,
    )
    rig.check()
    assert (capacity, rig.store.capacity, rig.store.unreserved) == (COLUMNS + 4 * RUN, COLUMNS, 0)
    with pytest.raises(TierFull):
        rig.store.reserve(idle.table, 3)
    calls = rig.system.calls.copy()
    rig.store.make_room(COLUMNS)
    assert (rig.system.calls["pwritev"], rig.system.calls["ftruncate"]) == (
        calls["pwritev"],
        calls["ftruncate"],
    )
    rig.forget(known)
    assert rig.store.unreserved == COLUMNS - 2
    rig.fill(idle, 2)
    rig.check()


PASSING = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN]


@pytest.mark.parametrize("call", ["open", "ftruncate", "pwritev", "fdatasync", "fsync_folder"])
@pytest.mark.parametrize("number", PASSING)
def test_what_the_kernel_lacks_for_a_moment_ends_no_tier(rig: Rig, call: str, number: int) -> None:
    """EMFILE while many clients connect: the run is written a little later, and no request fails."""
    known = rig.open(COLUMNS + RUN + 4)
    rig.fill(known, COLUMNS)
    rig.system.script[call].extend([error(number)] * 2)
    rig.fill(known, 1)
    assert not rig.system.script[call], "it was met"
    assert (rig.store.spill_failure, rig.store.stats()["disk_failure"]) == (None, "")
    assert known.table.disk_blocks == RUN
    rig.check()


@pytest.mark.parametrize("call", ["open", "pwritev"])
def test_what_the_kernel_lacks_for_long_fails_who_needs_it(rig: Rig, call: str) -> None:
    """Not for ever: once it is there again, so is the tier."""
    known = rig.open(COLUMNS + RUN + 4)
    rig.fill(known, COLUMNS)
    rig.system.script[call].extend([error(errno.EMFILE)] * 100)
    with pytest.raises(TierFull, match=r"none can be spilled.*Too many open files"):
        rig.grow(known, 1)
    rig.settled()
    assert rig.store.spill_failure is None
    rig.check()
    rig.system.script[call].clear()
    rig.fill(known, 1)
    assert known.table.disk_blocks == RUN
    rig.check()


def test_a_failed_write_of_a_forgotten_sequence_frees_its_rows(rig: Rig) -> None:
    known = rig.open(8)
    rig.fill(known, 8)
    stall = Stall()
    rig.system.script["pwritev"].extend([stall, error(errno.EIO)])
    rig.store.spill(known.table, 1, RUN)
    rig.store.spill(known.table, 5, 3)
    assert stall.begun.wait(5)
    rig.forget(known)
    stall.over.set()
    rig.settled()
    rig.check()
    assert rig.slab.used_bytes == 0
    assert [place.identity.first for place in rig.path.tier.runs()] == [5]
    assert rig.store.spill_failure is not None
    rig.assert_all_disk_can_be_had()


def test_a_corrupt_extent_is_told_and_gives_all_buffers_back(rig: Rig) -> None:
    known = rig.open(COLUMNS)
    rig.fill(known, COLUMNS)
    for first in range(1, 13, RUN):
        rig.store.spill(known.table, first, RUN)
    rig.settled()
    ref = known.table.runs[1]
    place = rig.path.tier.locate(ref.run)
    path = rig.folder / f"{place.range.segment:08}.segment"
    with path.open("r+b") as file:
        file.seek(place.offset(1) + 5000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    visible = range(1, known.table.stop)
    rig.assert_scan(known, 0, visible)
    with pytest.raises(ExtentCorrupt, match="layer 1"):
        rig.scan(known, 1, visible)
    assert ref.run not in rig.path.tier, "what is damaged must not be found again"
    for layer in range(LAYERS):
        with pytest.raises(ExtentMissing):
            rig.scan(known, layer, visible)
    intact = [run.run for run in known.table.runs if run != ref]
    tickets = rig.store.submit([ExtentRead(run, layer) for run in intact for layer in range(LAYERS)])
    assert len(tickets) == BUFFERS
    with rig.store.staged(tickets) as (_, offsets):
        assert len(set(offsets)) == BUFFERS, "a buffer is gone"
    rig.reset(known, anew=False)
    assert [found.run for found in rig.store.find(known.names)] == intact[:1]
    rig.fill(known, COLUMNS)
    rig.check()
    rig.forget(known)
    rig.assert_all_disk_can_be_had()


def test_staged_gives_buffers_back_when_the_reader_breaks(rig: Rig) -> None:
    known = rig.open(4)
    rig.fill(known, 4)
    rig.store.spill(known.table, 1, RUN)
    rig.settled()
    for _ in range(2 * BUFFERS):
        tickets = rig.store.submit([ExtentRead(known.table.runs[0].run, 0)] * 3)
        with pytest.raises(ZeroDivisionError), rig.store.staged(tickets):
            raise ZeroDivisionError
    rig.check()


# Forgetting.


def test_forgetting_what_is_being_written_frees_it_in_the_end(rig: Rig) -> None:
    known = rig.open(8)
    rig.fill(known, 8)
    stall = Stall()
    rig.system.script["pwritev"].append(stall)
    rig.store.spill(known.table, 2, RUN)
    rig.store.spill(known.table, 6, 2)
    assert stall.begun.wait(5)
    rig.forget(known)
    rig.check()
    assert rig.slab.used_bytes == 6 * rig.layouts.column_bytes, "a row was freed under a write"
    assert rig.store.unreserved == rig.store.capacity
    stall.over.set()
    rig.settled()
    rig.check()
    assert rig.slab.used_bytes == 0
    assert sorted(place.identity.first for place in rig.path.tier.runs()) == [2, 6]
    rig.assert_all_disk_can_be_had()
    assert not list(rig.folder.glob("*.segment"))


def test_rows_being_written_are_not_given_to_what_comes_next(rig: Rig) -> None:
    """A reset sequence is computed again while its old blocks are still on their way out, twice over."""
    known = rig.open(6)
    rig.fill(known, 6)
    rig.system.gate.clear()
    for _ in range(2):
        rig.store.spill(known.table, 1, RUN)
        rig.reset(known)
        rig.grow(known, 6)
        rig.seal(known)
        rig.check()
    rig.store.settle()
    rig.store.spill(known.table, 3, RUN)
    rig.system.gate.set()
    rig.settled()
    rig.check()
    assert (known.table.disk_blocks, known.table.host_blocks) == (RUN, 2)
    assert rig.path.tier.used_bytes <= 3 * rig.run_bytes


def test_growth_may_take_the_room_of_what_was_forgotten_under_a_write(rig: Rig) -> None:
    known = rig.open(COLUMNS)
    rig.fill(known, COLUMNS)
    stall = Stall()
    rig.system.script["fdatasync"].append(stall)
    for first in range(1, COLUMNS, RUN):
        rig.store.spill(known.table, first, RUN)
    rig.forget(known)
    other = rig.open(COLUMNS)
    timer = threading.Timer(0.05, stall.over.set)
    timer.start()
    rig.fill(other, COLUMNS)
    rig.settled()
    rig.check()
    assert (other.table.disk_blocks, rig.path.cache.cached_bytes) == (0, 4 * rig.run_bytes)
    timer.join()


def test_room_of_what_is_being_read_is_given_away_only_when_the_read_has_ended(rig: Rig) -> None:
    known = rig.open(RUN)
    rig.fill(known, RUN)
    rig.store.spill(known.table, 1, RUN)
    rig.settled()
    stall = Stall()
    rig.system.script["preadv"].append(stall)
    tickets = rig.store.submit([ExtentRead(known.table.runs[0].run, layer) for layer in range(LAYERS)])
    assert stall.begun.wait(5)
    rig.store.cancel(tickets)
    rig.forget(known)
    rig.check()
    with pytest.raises(TierFull):
        rig.assert_all_disk_can_be_had()
    assert (rig.path.tier.runs(), rig.path.tier.used_bytes) == ([], rig.run_bytes)
    stall.over.set()
    rig.settled()
    rig.check()
    rig.assert_all_disk_can_be_had()


def test_the_accounts_add_up(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    known, other = rig.open(10), rig.open(5)
    rig.fill(known, 10)
    rig.fill(other, 5)
    rig.store.spill(known.table, 3, RUN)
    rig.settled()
    rig.assert_scan(known, 0, range(1, 11))
    rig.assert_scan(known, 1, range(1, 3))
    stats, extent = rig.store.stats(), rig.path.tier.locate(known.table.runs[0].run).identity.extent_bytes(0)
    assert stats["reserved_blocks"] == 15
    assert stats["capacity_blocks"] == rig.store.capacity
    assert stats["host_used_bytes"] == 11 * rig.layouts.column_bytes
    assert (
        stats["disk_used_bytes"] == stats["disk_written_bytes"] == stats["disk_cached_bytes"] == rig.run_bytes
    )
    assert stats["prefetch_bytes_read"] == rig.store.disk_read_bytes == extent
    assert stats["prefetch_failures"] == 0
    assert stats["disk_failure"] == ""
    assert rig.store.stall_seconds >= 0
    assert rig.store.usage(known.table) == {
        "host": 6 * rig.layouts.column_bytes,
        "disk": RUN * rig.layouts.column_bytes,
    }
    assert rig.store.usage(other.table) == {"host": 5 * rig.layouts.column_bytes, "disk": 0}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_window_reads_only_the_runs_it_sees(rig: Rig) -> None:
    known = rig.open(12)
    rig.fill(known, 12)
    for first in (9, 1):
        rig.store.spill(known.table, first, RUN)
    rig.settled()
    late, early = known.table.runs
    assert (late.blocks, early.blocks) == (range(9, 13), range(1, 5))
    assert rig.path.tier.locate(late.run).identity.chain_hash == known.table.chain[12]
    seen = {range(5, 9): [], range(4, 9): [early], range(5, 13): [late], range(1, 13): [late, early]}
    for visible, runs in seen.items():
        assert rig.store.runs_to_read(known.table, visible) == runs
        rig.assert_scan(known, 2, visible)


def test_integrity_checks_notice(rig: Rig) -> None:
    known = rig.open(6)
    rig.fill(known, 6)
    with pytest.raises(AssertionError, match="a table is lost"):
        rig.store.check_integrity([])
    rows = known.table.rows.copy()
    for damage, message in (
        ((0, 2, -1), "known|some layers"),
        ((0, 2, rows[0, 1]), "share a row"),
        ((slice(None), 2, -1), "known"),
    ):
        known.table.rows[damage[:2]] = damage[2]
        with pytest.raises(AssertionError, match=message):
            rig.store.check_integrity([known.table])
        known.table.rows[:] = rows
    rig.check()


@pytest.mark.parametrize("layouts", [LAYOUTS, MIXED], ids=["alike", "mixed"])
def test_a_run_that_was_scanned_whole_comes_back(tmp_path: Path, layouts: StoreLayout) -> None:
    with rigged(tmp_path, columns=40, layouts=layouts) as rig:
        known = rig.open(2 * RUN)
        rig.fill(known, 2 * RUN)
        for first in (1, 1 + RUN):
            rig.store.spill(known.table, first, RUN)
            rig.settled()
        assert known.table.disk_blocks == 2 * RUN
        for layers, back in ((range(LAYERS - 1), 0), (range(LAYERS), RUN)):
            promotion = rig.store.promotion(known.table, known.table.runs)
            (ref, _) = known.table.runs
            for layer in layers:
                (ticket,) = tickets = rig.store.submit([ExtentRead(ref.run, layer)])
                with rig.store.staged(tickets) as (memory, (offset,)):
                    promotion.copy(ref, layer, memory, offset)
                assert ticket.state is ReadState.RELEASED
            promotion.end()
            assert known.table.disk_blocks == 2 * RUN - back
            rig.check()
        rig.store.make_room(40)
        assert known.table.disk_blocks == 2 * RUN, "copies go first"
        rig.check()


def lay_out(rig: Rig, count: int) -> list[Known]:
    """Sequences of one full run each, on disk only, one after the other."""
    all_known = [rig.open(RUN) for _ in range(count)]
    for known in all_known:
        rig.fill(known, RUN)
        rig.store.spill(known.table, 1, RUN)
        rig.settled()
    return all_known


def test_runs_move_together_between_steps(tmp_path: Path) -> None:
    with rigged(tmp_path, disk_runs=8, rate=1 << 40) as rig:
        all_known = lay_out(rig, 6)
        for known in (*all_known[0:2], *all_known[2:6:2]):
            run = known.table.runs[0].run
            rig.forget(known)
            rig.path.cache.discard(run)
        stats = rig.store.stats()
        assert stats["disk_hole_bytes"] == 2 * RUN_BYTES
        assert stats["disk_moved_bytes"] == 0
        rig.store.settle()
        assert rig.store.writing, "who waits for the next event must soon look again"
        rig.check()
        rig.settled()
        stats = rig.store.stats()
        assert (stats["disk_hole_bytes"], stats["disk_moved_bytes"]) == (0, RUN_BYTES)
        assert stats["disk_used_bytes"] == stats["disk_cached_bytes"] == 2 * RUN_BYTES
        rig.check()


def test_nothing_begins_to_move_while_something_is_written(tmp_path: Path) -> None:
    with rigged(tmp_path, disk_runs=8, rate=1 << 40) as rig:
        first, second, *_ = lay_out(rig, 4)
        late = rig.open(RUN)
        rig.fill(late, RUN)
        rig.system.gate.clear()
        rig.store.spill(late.table, 1, RUN)
        for known in (first, second):
            run = known.table.runs[0].run
            rig.forget(known)
            rig.path.cache.discard(run)
        rig.store.settle()
        assert not rig.path.moving
        rig.system.gate.set()
        rig.settled()
        rig.check()


def test_a_pinned_run_that_turns_out_damaged_leaves_the_books_right(tmp_path: Path) -> None:
    with rigged(tmp_path) as rig:
        (known,) = lay_out(rig, 1)
        run, capacity = known.table.runs[0].run, rig.store.capacity
        rig.store.pin([run])
        assert rig.store.capacity == capacity - RUN
        rig.forget(known)
        rig.path.cache.discard(run)
        assert rig.store.capacity == capacity
        rig.store.unpin([run])
        rig.check()
