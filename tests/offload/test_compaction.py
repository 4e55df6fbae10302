"""Runs that move together: files become shorter, and every byte stays readable whatever fails meanwhile."""

from __future__ import annotations

import errno
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spilld.offload.disk.files.extent import HEADER_BYTES, RunPlace, extent_bytes
from spilld.offload.disk.files.segment import Range
from spilld.offload.errors import (
    ExtentMissing,
    FolderInUse,
    IndexDamaged,
    TierFull,
)
from spilld.offload.maintenance import compaction as module
from spilld.offload.maintenance.compaction import PAUSE_S, Compaction
from spilld.offload.maintenance.token_bucket import Bucket
from spilld.offload.prefix_cache.run_cache import RunCache
from spilld.offload.system import page_aligned

from .faults import Fault, ScriptedSystem, Short, Stall, error
from .run_tier import RunTier
from .test_disk import names, peek, poke, segment_of
from .tier_contract import BUDGET, FINGERPRINT, LAYERS, LAYOUT, LAYOUTS, assert_tier, blocks, key, put

COUNT = 2
EXTENT = extent_bytes(LAYOUT, COUNT)
RUN_BYTES = LAYERS * EXTENT
SEGMENT_RUNS = 5
WIDEST = extent_bytes(LAYOUT, 12)
FAST = 1 << 40


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """A tier, its cache, and what moves its runs, on a clock that stands still."""

    def __init__(self, home: Path, rate: int = FAST) -> None:
        self.home = home
        self.clock = Clock()
        self.rate = rate
        self.start()

    def start(self) -> None:
        self.system = ScriptedSystem(durable=True)
        self.tier = RunTier(
            *(self.home / "kv", BUDGET, LAYOUTS, FINGERPRINT, self.system),
            segment_bytes=SEGMENT_RUNS * RUN_BYTES,
        )
        self.cache = RunCache(self.tier, WIDEST)
        self.compaction = Compaction(self.tier, self.cache, WIDEST, self.rate, self.clock)

    def put(self, n: int, count: int = COUNT) -> None:
        put(self.tier, n, count)
        self.cache.enter(self.tier.locate(key(n)))

    def sparse(self) -> dict[int, int]:
        """Two files of which a little more than half is holes; returns what is left."""
        for n in range(2 * SEGMENT_RUNS):
            self.put(n)
        for n in (0, 1, 2, 5, 6, 7):
            self.cache.discard(key(n))
        return dict.fromkeys((3, 4, 8, 9), COUNT)

    def step(self) -> None:
        """Begin what is due and wait for its end."""
        self.compaction.step(begin=True)
        self.compaction.wait(10)
        assert not self.compaction.moving, "a move never ended"

    def compact(self, steps: int = 100) -> int:
        """As many moves as there are; how many it were."""
        for moves in range(steps):
            before = self.compaction.bytes_moved, self.compaction.failures, len(self.tier.runs())
            self.step()
            if before == (self.compaction.bytes_moved, self.compaction.failures, len(self.tier.runs())):
                return moves
        raise AssertionError("moving never ends")

    def check(self, runs: dict[int, int]) -> None:
        assert_tier(self.tier, runs)
        self.cache.check_integrity({})
        sizes = sum(path.stat().st_size for path in (self.home / "kv").glob("*.segment"))
        assert self.tier.used_bytes == sizes
        assert self.tier.hole_bytes == sizes - sum(self.tier.run_bytes(count) for count in runs.values())

    def close(self) -> None:
        self.compaction.close()
        self.tier.close()

    def reopen(self) -> None:
        self.close()
        self.start()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.tier.check_integrity()
    rig.close()


def begun(rig: Rig, call: str, passing: int = 0) -> Stall:
    """A move that hangs in a system call."""
    stall = Stall()
    rig.system.script[call].extend([*[None] * passing, stall])
    rig.compaction.step(begin=True)
    until = time.monotonic() + 10
    while not stall.begun.wait(0.002):
        rig.compaction.step(begin=False)
        assert time.monotonic() < until, "the call was never made"
    return stall


class TestMoves:
    def test_files_become_shorter_and_every_byte_stays(self, rig: Rig) -> None:
        runs = rig.sparse()
        assert rig.tier.hole_bytes == 6 * RUN_BYTES
        moves = rig.compact()
        rig.check(runs)
        assert rig.tier.used_bytes == 4 * RUN_BYTES
        assert rig.tier.hole_bytes == 0
        assert rig.compaction.bytes_moved == moves * RUN_BYTES == 3 * RUN_BYTES
        assert len(list((rig.home / "kv").glob("*.segment"))) == 1, "the emptier file is gone"
        rig.reopen()
        rig.check(runs)

    def test_what_moved_makes_room_for_another_size(self, rig: Rig) -> None:
        for n in range(16):
            rig.put(n)
        runs = dict.fromkeys(range(0, 16, 2), COUNT)
        for n in range(1, 16, 2):
            rig.cache.discard(key(n))
        with pytest.raises(TierFull):
            put(rig.tier, 100, 12)
        rig.compact()
        put(rig.tier, 100, 12)
        assert_tier(rig.tier, runs | {100: 12})

    def test_sizes_do_not_mix(self, rig: Rig) -> None:
        sizes = {n: 1 + n % 3 for n in range(12)}
        for n, count in sizes.items():
            rig.put(n, count)
        runs = {n: count for n, count in sizes.items() if n not in (0, 1, 2, 3, 4, 5)}
        for n in sizes.keys() - runs:
            rig.cache.discard(key(n))
        assert rig.compact()
        rig.check(runs)
        by_file: dict[int, set[int]] = {}
        for place in rig.tier.runs():
            by_file.setdefault(place.range.segment, set()).add(place.range.nbytes)
        assert all(len(found) == 1 for found in by_file.values())

    def test_a_few_holes_are_not_worth_it(self, rig: Rig) -> None:
        for n in range(9):
            rig.put(n)
        rig.cache.discard(key(1))
        assert rig.compact() == 0
        rig.cache.discard(key(2))
        assert rig.compact() == 1

    def test_it_begins_only_when_told(self, rig: Rig) -> None:
        runs = rig.sparse()
        rig.compaction.step(begin=False)
        assert not rig.compaction.moving
        rig.check(runs)

    def test_a_new_run_and_one_that_moves_do_not_share_a_hole(self, rig: Rig) -> None:
        runs = rig.sparse()
        stall = begun(rig, "pwritev")
        rig.put(20)
        stall.over.set()
        rig.compact()
        rig.check(runs | {20: COUNT})

    def test_runs_too_long_for_its_memory_stay(self, rig: Rig) -> None:
        runs = rig.sparse()
        rig.compaction.close()
        rig.compaction = Compaction(rig.tier, rig.cache, EXTENT - 4096, FAST, rig.clock)
        assert rig.compact() == 0
        rig.check(runs)

    @pytest.mark.parametrize("call", ["preadv", "pwritev", "fdatasync"])
    def test_it_never_blocks_its_caller(self, rig: Rig, call: str) -> None:
        runs = rig.sparse()
        stall = begun(rig, call)
        rig.compaction.step(begin=True)
        assert rig.compaction.moving
        rig.tier.check_integrity()
        stall.over.set()
        rig.compact()
        rig.check(runs)

    def test_nothing_else_moves_while_a_run_does(self, rig: Rig) -> None:
        rig.sparse()
        stall = begun(rig, "pwritev")
        calls = rig.system.calls["preadv"]
        for _ in range(3):
            rig.compaction.step(begin=True)
        assert rig.system.calls["preadv"] == calls
        stall.over.set()
        rig.compaction.wait(10)


class TestRate:
    def test_a_bucket_against_its_sum(self) -> None:
        """Left is what came, as far as it fits, less what was spent."""
        clock, generator = Clock(), np.random.default_rng(3)
        bucket, left = Bucket(1000, 10.0, clock), 1000.0
        for _ in range(500):
            seconds, nbytes = float(generator.integers(0, 4)), int(generator.integers(0, 400))
            clock.now += seconds
            left = min(1000.0, left + 100 * seconds)
            assert bucket.left == left
            bucket.spend(nbytes)
            left -= nbytes
            assert bucket.left == left

    def test_a_clock_that_is_set_back_brings_nothing(self) -> None:
        clock = Clock()
        bucket = Bucket(1000, 10.0, clock, spent=900)
        clock.now -= 500
        assert bucket.left == 100
        clock.now += 1
        assert bucket.left == 200

    def test_no_more_moves_than_its_rate(self, tmp_path: Path) -> None:
        rig = Rig(tmp_path, rate=RUN_BYTES // 4)
        for n in range(16):
            rig.put(n)
        for n in range(0, 16, 2):
            rig.cache.discard(key(n))
        began, holes = rig.clock.now, rig.tier.hole_bytes
        for _ in range(200):
            rig.step()
            allowed = rig.rate * (rig.clock.now - began + 1) + RUN_BYTES
            assert rig.compaction.bytes_moved <= allowed
            rig.clock.now += 0.25
        assert rig.compaction.bytes_moved >= holes // 2
        assert 8 * rig.tier.hole_bytes <= rig.tier.used_bytes
        rig.check(dict.fromkeys(range(1, 16, 2), COUNT))
        rig.close()

    def test_a_full_bucket_lasts_a_second(self, tmp_path: Path) -> None:
        rig = Rig(tmp_path, rate=1)
        rig.sparse()
        rig.step()
        assert rig.compaction.bytes_moved == RUN_BYTES
        rig.clock.now += RUN_BYTES - 2
        rig.step()
        assert rig.compaction.bytes_moved == RUN_BYTES
        rig.clock.now += 2
        rig.step()
        assert rig.compaction.bytes_moved == 2 * RUN_BYTES
        rig.close()


def last(rig: Rig) -> RunPlace:
    """The run that moves next."""
    number, _ = next(rig.tier._files.space.moves())
    return max(
        (place for place in rig.tier.runs() if place.range.segment == number),
        key=lambda place: place.range.offset,
    )


def number_of(place: RunPlace) -> int:
    return int.from_bytes(place.run, "big")


class TestLeases:
    def test_a_run_that_is_read_keeps_its_bytes_until_then(self, rig: Rig) -> None:
        runs = rig.sparse()
        place = last(rig)
        rig.tier.hold(place)
        used = rig.tier.used_bytes
        rig.step()
        assert rig.compaction.bytes_moved == RUN_BYTES
        assert rig.tier.used_bytes == used
        assert rig.tier.locate(place.run).range != place.range
        rig.tier.check_integrity()
        with pytest.raises(ExtentMissing):
            rig.tier.hold(place)
        rig.put(20)
        buffer = page_aligned(EXTENT)
        for layer in range(LAYERS):
            records = rig.tier.io.read_extent(place, layer, buffer)
            np.testing.assert_array_equal(records, blocks(number_of(place), COUNT)[layer])
        rig.tier.release(place)
        with pytest.raises(ValueError, match="more often"):
            rig.tier.release(place)
        rig.check(runs | {20: COUNT})
        rig.compact()
        rig.check(runs | {20: COUNT})

    def test_a_run_that_is_held_in_both_places_is_deleted(self, rig: Rig) -> None:
        runs = rig.sparse()
        old = last(rig)
        rig.tier.hold(old)
        rig.step()
        new = rig.tier.locate(old.run)
        rig.tier.hold(new)
        rig.cache.discard(old.run)
        rig.tier.check_integrity()
        rig.tier.release(new)
        rig.tier.check_integrity()
        rig.tier.release(old)
        del runs[number_of(old)]
        rig.check(runs)

    def test_closing_while_the_old_place_is_read(self, tmp_path: Path) -> None:
        rig = Rig(tmp_path)
        rig.sparse()
        place = last(rig)
        rig.tier.hold(place)
        rig.step()
        rig.close()
        with pytest.raises(FolderInUse):
            rig.start()
        rig.tier.release(place)
        rig.start()
        rig.check(dict.fromkeys((3, 4, 8, 9), COUNT))
        rig.close()

    @pytest.mark.parametrize("call", ["preadv", "pwritev", "fdatasync"])
    def test_a_run_that_is_deleted_while_it_moves_is_gone(self, rig: Rig, call: str) -> None:
        runs = rig.sparse()
        place = last(rig)
        stall = begun(rig, call)
        rig.cache.discard(place.run)
        stall.over.set()
        rig.compaction.wait(10)
        assert rig.compaction.failures == 0
        del runs[number_of(place)]
        rig.check(runs)
        rig.compact()
        rig.check(runs)

    def test_the_old_bytes_are_free_only_once_the_index_is_durable(self, rig: Rig) -> None:
        """Else a power cut could bring the old row back, and its bytes would be another run's."""
        runs = rig.sparse()
        place, used = last(rig), rig.tier.used_bytes
        stall = begun(rig, "fdatasync", passing=1)
        assert rig.tier.locate(place.run).range != place.range
        assert rig.tier.used_bytes == used
        rig.tier.check_integrity()
        rig.put(20)
        assert rig.tier.locate(key(20)).range != place.range
        stall.over.set()
        rig.compact()
        rig.check(runs | {20: COUNT})

    def test_a_move_that_the_index_has_not_is_given_up_at_the_end(self, rig: Rig) -> None:
        runs, stall = rig.sparse(), begun(rig, "fdatasync")
        places = {place.run: place.range for place in rig.tier.runs()}
        stall.over.set()
        while rig.compaction._outcomes.empty():
            time.sleep(0.001)
        rig.compaction.close()
        assert {place.run: place.range for place in rig.tier.runs()} == places
        assert rig.compaction.failures == 0
        rig.check(runs)
        rig.reopen()
        rig.check(runs)


class TestFaults:
    @pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
    @pytest.mark.parametrize(
        ("call", "at"), [("preadv", 0), ("preadv", 2), ("pwritev", 0), ("pwritev", 2), ("fdatasync", 0)]
    )
    def test_a_move_that_fails_loses_nothing(self, rig: Rig, call: str, at: int, number: int) -> None:
        runs, places = rig.sparse(), {place.run: place.range for place in rig.tier.runs()}
        rig.system.script[call].extend([*[None] * at, error(number)])
        rig.step()
        assert (rig.compaction.failures, rig.compaction.bytes_moved) == (1, 0)
        assert {place.run: place.range for place in rig.tier.runs()} == places
        rig.check(runs)
        assert rig.compact() == 0, "it tried again at once"
        rig.clock.now += PAUSE_S
        assert rig.compact() == 3
        rig.check(runs)
        rig.reopen()
        rig.check(runs)

    def test_short_and_interrupted_transfers_are_completed(self, rig: Rig) -> None:
        runs = rig.sparse()
        parts: list[Fault] = [Short(4096), InterruptedError(), Short(100), None, Short(4200), None]
        for call in ("preadv", "pwritev"):
            rig.system.script[call].extend(parts)
        rig.compact()
        assert rig.compaction.failures == 0
        rig.check(runs)

    def test_a_write_that_makes_no_progress_ends(self, rig: Rig) -> None:
        runs = rig.sparse()
        rig.system.script["pwritev"].append(Short(0))
        rig.step()
        assert rig.compaction.failures == 1
        rig.check(runs)

    @pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), IndexDamaged("malformed")])
    def test_an_index_that_takes_no_move(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch, failure: Exception
    ) -> None:
        runs, places = rig.sparse(), {place.run: place.range for place in rig.tier.runs()}

        def fail(*_: object) -> None:
            raise failure

        with monkeypatch.context() as patched:
            patched.setattr(rig.tier.index, "move", fail)
            rig.step()
        assert (rig.compaction.failures, rig.compaction.bytes_moved) == (1, 0)
        assert {place.run: place.range for place in rig.tier.runs()} == places
        rig.check(runs)

    def test_an_index_that_cannot_be_synced_names_the_new_place(self, rig: Rig) -> None:
        runs = rig.sparse()
        rig.system.script["fdatasync"].extend([None, error(errno.EIO)])
        rig.step()
        assert (rig.compaction.failures, rig.compaction.bytes_moved) == (1, RUN_BYTES)
        rig.check(runs)
        rig.reopen()
        rig.check(runs)

    def test_a_file_that_will_not_shrink_stays_counted(self, rig: Rig) -> None:
        runs = rig.sparse()
        for call in ("ftruncate", "unlink"):
            rig.system.script[call].extend([error(errno.EIO)] * 20)
        rig.compact()
        rig.check(runs)
        rig.system.script.clear()
        rig.tier._files.trim()
        assert rig.tier.used_bytes == 4 * RUN_BYTES

    @pytest.mark.parametrize("layer", range(LAYERS))
    def test_a_damaged_run_is_discarded_and_not_copied(self, rig: Rig, layer: int) -> None:
        runs, place = rig.sparse(), last(rig)
        hole = next(rig.tier._files.space.moves())[1]
        path, where = segment_of(rig.home, place), place.offset(layer) + HEADER_BYTES + 100
        poke(path, where, bytes([peek(path, where, 1)[0] ^ 1]))
        target = path.with_name(f"{hole.segment:08}.segment"), hole.offset + layer * EXTENT, EXTENT
        before = peek(*target)
        rig.step()
        assert peek(*target) == before
        assert place.run not in rig.tier
        assert rig.compaction.bytes_moved == 0
        del runs[number_of(place)]
        rig.check(runs)
        rig.compact()
        rig.check(runs)

    def test_a_bug_in_a_move_does_not_end_its_thread(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        runs = rig.sparse()

        def fail(*_: object) -> None:
            raise RuntimeError("a bug")

        with monkeypatch.context() as patched:
            patched.setattr(rig.tier.io, "copy_extent", fail)
            rig.step()
        assert "a bug" in caplog.text
        rig.clock.now += PAUSE_S
        assert rig.compact() == 3
        rig.check(runs)

    def test_a_move_that_the_kernel_never_ends_keeps_the_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "CLOSE_S", 0.05)
        rig = Rig(tmp_path)
        runs, stall = rig.sparse(), begun(rig, "pwritev")
        compaction = rig.compaction
        rig.close()
        with pytest.raises(FolderInUse):
            rig.start()
        stall.over.set()
        compaction._thread.join(10)
        assert not compaction._thread.is_alive()
        compaction.step(begin=False)
        rig.start()
        rig.check(runs)
        rig.close()


def test_the_index_names_only_rows_it_has(rig: Rig) -> None:
    rig.put(1)
    before = rig.tier.index.entries()
    with pytest.raises(IndexDamaged, match="no row"):
        rig.tier.index.move(key(2), Range(0, 0, RUN_BYTES))
    assert rig.tier.index.entries() == before


def test_a_run_that_moved_before_is_not_moved_from_there(rig: Rig) -> None:
    runs = rig.sparse()
    first, second = rig.tier.relocate(WIDEST), rig.tier.relocate(WIDEST)
    assert first is not None
    assert second is not None
    assert first.source == second.source
    scratch = page_aligned(EXTENT)
    for layer in range(LAYERS):
        rig.tier.io.copy_extent(first, layer, scratch)
    rig.tier.moved(first)
    with pytest.raises(ExtentMissing, match="no longer"):
        rig.tier.moved(second)
    rig.tier.abandon(second.target)
    rig.check(runs)


class CompactionMachine(RuleBasedStateMachine):
    """Runs come, go and move on a disk that fails and is damaged now and then. Daemons come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.home = tempfile.TemporaryDirectory()
        self.rig = Rig(Path(self.home.name))
        self.runs: dict[int, int] = {}
        self.damaged: set[int] = set()
        self.held: list[tuple[int, int, RunPlace]] = []
        self.next = 0

    @rule(count=st.sampled_from([1, 2, 2, 2, 3, 5]), many=st.integers(1, 5))
    def put(self, count: int, many: int) -> None:
        for n in range(self.next, self.next + many):
            try:
                self.rig.put(n, count)
                self.runs[n] = count
            except TierFull:
                break
        self.next += many

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        for n in data.draw(st.lists(st.sampled_from(sorted(self.runs)), max_size=4, unique=True)):
            self.rig.cache.discard(key(n))
            del self.runs[n]

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        n = data.draw(st.sampled_from(sorted(self.runs)))
        place = self.rig.tier.locate(key(n))
        self.rig.tier.hold(place)
        self.held.append((n, self.runs[n], place))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.rig.tier.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))[2])

    @precondition(lambda self: self.runs.keys() - self.damaged)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        n = data.draw(st.sampled_from(sorted(self.runs.keys() - self.damaged)))
        place = self.rig.tier.locate(key(n))
        where = place.offset(0) + data.draw(
            st.integers(0, HEADER_BYTES + place.identity.payload_bytes(0) - 1)
        )
        path = segment_of(self.rig.home, place)
        poke(path, where, bytes([peek(path, where, 1)[0] ^ 0x80]))
        self.damaged.add(n)

    @rule(
        call=st.sampled_from(["", "", "", "preadv", "pwritev", "fdatasync", "ftruncate", "unlink"]),
        at=st.integers(0, 3),
        moves=st.integers(1, 4),
    )
    def move(self, call: str, at: int, moves: int) -> None:
        """Only what was damaged may be lost by it, and no file becomes longer."""
        used = self.rig.tier.used_bytes
        if call:
            self.rig.system.script[call].extend([*[None] * at, error(errno.EIO)])
        for _ in range(moves):
            self.rig.step()
            self.rig.clock.now += PAUSE_S
        self.rig.system.script.clear()
        assert self.rig.tier.used_bytes <= used
        gone = {n for n in self.runs if key(n) not in self.rig.tier}
        assert gone <= self.damaged
        self.runs = {n: count for n, count in self.runs.items() if n not in gone}

    @rule()
    def reopen(self) -> None:
        while self.held:
            self.rig.tier.release(self.held.pop()[2])
        self.rig.reopen()

    @invariant()
    def everything_intact_is_served(self) -> None:
        tier = self.rig.tier
        tier.check_integrity()
        assert {place.run for place in tier.runs()} == {key(n) for n in self.runs}
        for n in self.runs.keys() - self.damaged:
            for layer, records in enumerate(blocks(n, self.runs[n])):
                np.testing.assert_array_equal(tier.get(key(n), layer), records)
        for n, count, place in self.held:
            buffer = page_aligned(place.identity.largest_extent)
            np.testing.assert_array_equal(tier.io.read_extent(place, 1, buffer), blocks(n, count)[1])

    def teardown(self) -> None:
        for _, _, place in self.held:
            self.rig.tier.release(place)
        self.rig.compact()
        for n in self.runs:
            self.rig.cache.discard(key(n))
        self.rig.tier.check_integrity()
        self.rig.close()
        assert names(self.rig.home / "kv") == {"lock", "index.sqlite"}
        self.home.cleanup()


CompactionMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestCompactionMachine = CompactionMachine.TestCase
