"""What outlives a sequence and the process: stored chains, checkpoints, and who may use them."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from spilld.offload.block_table import RunRef
from spilld.offload.disk.files.extent import RunKey
from spilld.offload.errors import (
    ExtentCorrupt,
    ExtentMissing,
    IndexDamaged,
    TierFull,
)
from spilld.offload.store.block_writer import WRITES_AHEAD
from spilld.offload.system import Bytes

from .faults import error
from .test_compaction import Clock
from .test_store import CHECKPOINT_BLOCKS, COLUMNS, RECORD, RUN, RUN_BYTES, Known, Rig, rigged
from .tier_contract import LAYERS, LAYOUTS


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with rigged(tmp_path) as rig:
        yield rig


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[Rig]:
    """With room for several checkpoints on disk."""
    with rigged(tmp_path, disk_runs=20) as rig:
        yield rig


def stored(rig: Rig, blocks: int, *, run: int = RUN) -> Known:
    """A sequence of which all blocks lie on disk, in runs of this length, and none in host memory."""
    known = rig.open(blocks)
    rig.fill(known, blocks)
    for first in range(1, blocks + 1, run):
        rig.store.spill(known.table, first, min(run, blocks + 1 - first))
    rig.settled()
    assert (known.table.host_blocks, known.table.disk_blocks) == (0, blocks)
    return known


def written(rig: Rig) -> int:
    return rig.path.spiller.bytes_written


# Prefix reuse.


def test_another_sequence_of_the_same_history_computes_nothing_again(rig: Rig) -> None:
    first = stored(rig, 10)
    second = rig.open(12, like=first.names)
    assert rig.attach(second) == 10
    assert (second.table.stop, second.table.host_blocks) == (11, 0)
    rig.check()
    rig.fill(second, 2)
    rig.check()
    assert rig.path.cache.cached_bytes == rig.path.tier.used_bytes


def test_what_a_sequence_left_is_found_when_it_is_gone(rig: Rig) -> None:
    first = stored(rig, 8)
    rig.forget(first)
    second = rig.open(8, like=first.names)
    assert rig.attach(second) == 8
    rig.check()


def test_a_fork_takes_a_part_of_a_run_and_goes_on_by_itself(rig: Rig) -> None:
    first = stored(rig, 8)
    fork = rig.open(12, like=first.names[:7])
    assert rig.attach(fork) == 6
    rig.fill(fork, 6)
    rig.check()
    rig.store.save(fork.table)
    rig.settled()
    rig.check()
    assert [(ref.base, ref.first, ref.count) for ref in fork.table.runs] == [
        (1, 1, 4),
        (5, 5, 2),
        (7, 7, 4),
        (11, 11, 2),
    ]
    third = rig.open(12, like=fork.names)
    assert rig.attach(third) == 12
    rig.check()
    rig.forget(first)
    rig.forget(fork)
    rig.check()


def test_a_chain_is_found_up_to_its_first_gap(rig: Rig) -> None:
    known = stored(rig, 12)
    rig.path.cache.discard(known.table.runs[1].run)
    assert rig.store.find(known.names) == [known.table.runs[0]]
    rig.path.cache.discard(known.table.runs[0].run)
    assert rig.store.find(known.names) == []


def test_a_stranger_finds_nothing(rig: Rig) -> None:
    stored(rig, 8)
    other = rig.open(8)
    assert rig.store.find(other.hashes(9)) == []
    assert rig.store.find([]) == []


def test_what_is_stored_is_not_written_again(rig: Rig) -> None:
    """Two requests compute the same prompt: the disk holds it once."""
    first = stored(rig, 8)
    second = rig.open(12, like=first.names)
    rig.fill(second, 12)
    before = written(rig)
    rig.store.spill(second.table, 1, RUN)
    assert written(rig) == before
    assert not rig.store.writing
    assert second.table.runs == first.table.runs[:1]
    assert second.table.host_blocks == 8
    rig.store.spill(second.table, 7, 6)
    rig.settled()
    assert [(ref.base, ref.first, ref.count) for ref in second.table.runs[1:]] == [(5, 7, 2), (9, 9, 4)]
    assert written(rig) == before + RUN_BYTES
    rig.check()
    rig.forget(first)
    rig.check()


def test_a_longer_run_is_preferred(rig: Rig) -> None:
    """A chain in few runs costs few reads."""
    short = stored(rig, 2, run=1)
    rig.forget(short)
    long = rig.open(RUN, like=short.names)
    rig.fill(long, RUN)
    assert rig.store._writer is not None
    rig.store._writer._write(long.table, 1, RUN, keep=True)
    rig.settled()
    assert [(ref.first, ref.count) for ref in rig.store.find(long.names)] == [(1, RUN)]


# Writing behind.


def test_a_full_run_is_written_behind_and_stays_in_host_memory(rig: Rig) -> None:
    known = rig.open(10)
    rig.fill(known, RUN - 1)
    rig.store.write_behind()
    assert not rig.store.writing
    rig.fill(known, RUN + 2)
    rig.system.gate.clear()
    rig.store.write_behind()
    rig.store.write_behind()
    assert rig.path.spiller.pending == 2
    rig.system.gate.set()
    rig.settled()
    assert (known.table.host_blocks, known.table.disk_blocks) == (9, 0)
    assert [ref.blocks for ref in known.table.runs] == [range(1, 5), range(5, 9)]
    assert known.table.host_spans() == (range(9, 10),)
    rig.store.write_behind()
    assert not rig.store.writing, "written twice"
    rig.check()
    assert rig.store.usage(known.table) == {"host": 9 * LAYERS * RECORD, "disk": 0}


def test_writing_behind_lets_the_disk_finish_first(rig: Rig) -> None:
    known = rig.open(COLUMNS)
    rig.fill(known, COLUMNS)
    rig.system.gate.clear()
    for _ in range(5):
        rig.store.write_behind()
    assert rig.path.spiller.pending == WRITES_AHEAD
    rig.check()


def test_room_is_made_at_once_from_what_is_on_disk(rig: Rig) -> None:
    known = rig.open(COLUMNS + 8)
    rig.fill(known, COLUMNS)
    rig.store.write_behind()
    rig.settled()
    calls = rig.system.calls["pwritev"]
    rig.store.make_room(RUN)
    assert rig.slab.free_columns == RUN
    assert not rig.store.writing
    assert rig.system.calls["pwritev"] == calls
    rig.check()
    rig.fill(known, RUN)
    rig.check()


def test_growth_waits_for_a_copy_that_is_being_written(rig: Rig) -> None:
    known = rig.open(COLUMNS + 1)
    rig.fill(known, COLUMNS)
    rig.store.save(known.table)
    rig.fill(known, 1)
    rig.check()


def test_room_is_made_of_idle_sequences_first(rig: Rig) -> None:
    running, idle = rig.open(8), rig.open(8)
    rig.fill(running, 8)
    rig.fill(idle, 8)
    idle.table.idle = True
    rig.store.save(running.table)
    rig.store.save(idle.table)
    rig.settled()
    rig.store.make_room(8)
    assert (running.table.host_blocks, idle.table.host_blocks) == (8, 0)
    rig.check()


def test_save_leaves_no_sealed_block_in_host_memory_only(rig: Rig) -> None:
    known = rig.open(10)
    rig.fill(known, 7)
    rig.store.save(known.table)
    rig.settled()
    assert known.table.host_spans() == ()
    assert known.table.host_blocks == 7
    rig.fill(known, 3)
    assert known.table.host_spans() == (range(8, 11),)
    rig.check()


def test_saving_is_no_failure_where_the_disk_is_in_use(tmp_path: Path) -> None:
    with rigged(tmp_path, disk_runs=1) as rig:
        first = stored(rig, RUN)
        other = rig.open(8)
        rig.fill(other, 8)
        rig.store.save(other.table)
        rig.store.write_behind()
        rig.settled()
        assert (other.table.runs, other.table.leaving, rig.store.spill_failure) == ([], [], None)
        assert first.table.runs[0].run in rig.path.tier
        rig.check()


@pytest.mark.parametrize("call", ["pwritev", "fdatasync", "ftruncate"])
def test_a_save_that_fails_leaves_the_rows(rig: Rig, call: str) -> None:
    known = rig.open(COLUMNS)
    rig.fill(known, COLUMNS)
    rig.system.script[call].append(error(errno.EIO))
    rig.store.save(known.table)
    rig.settled()
    assert known.table.host_blocks == COLUMNS
    assert rig.store.spill_failure is not None
    rig.check()
    calls = rig.system.calls.copy()
    rig.store.save(known.table)
    rig.store.write_behind()
    rig.store.checkpoints.save(bytes(32), [1], 0, numbers(1))
    assert rig.system.calls == calls
    assert not rig.store.writing


# Use and eviction.


def test_a_run_stays_while_one_of_its_sequences_does(tmp_path: Path) -> None:
    with rigged(tmp_path, disk_runs=2) as rig:
        first = stored(rig, 8)
        second = rig.open(0, like=first.names)
        rig.store.reserve(second.table, 8)
        rig.attach(second)
        rig.forget(first)
        with pytest.raises(TierFull):
            rig.assert_all_disk_can_be_had()
        rig.check()
        rig.forget(second)
        rig.assert_all_disk_can_be_had()


def test_what_nobody_uses_makes_room_for_what_somebody_does(rig: Rig) -> None:
    """A disk full of earlier conversations takes nothing away from the capacity."""
    for _ in range(3):
        known = rig.open(rig.store.capacity)
        while known.table.stop <= rig.store.capacity:
            rig.fill(known, min(4, rig.store.capacity + 1 - known.table.stop))
            rig.store.write_behind()
        rig.check()
        rig.forget(known)
    assert rig.path.tier.used_bytes == rig.path.tier.budget_bytes


def test_the_end_of_a_chain_goes_before_its_beginning(rig: Rig) -> None:
    old = stored(rig, 4 * RUN)
    rig.forget(old)
    for left in (3, 2, 1, 0):
        new = rig.open(RUN)
        rig.fill(new, RUN)
        rig.store.spill(new.table, 1, RUN)
        rig.settled()
        assert sum(ref.count for ref in rig.store.find(old.names)) == left * RUN
        rig.check()


def test_a_pinned_run_is_not_evicted(rig: Rig) -> None:
    known = stored(rig, RUN)
    runs = [ref.run for ref in known.table.runs]
    rig.store.pin(runs)
    rig.forget(known)
    with pytest.raises(TierFull):
        rig.assert_all_disk_can_be_had()
    rig.check()
    assert runs[0] in rig.path.tier
    rig.store.unpin(runs)
    rig.check()
    rig.assert_all_disk_can_be_had()


# Across processes.


def test_a_restart_loses_nothing_that_was_durable(rig: Rig) -> None:
    known = rig.open(COLUMNS)
    rig.fill(known, 6)
    rig.store.save(known.table)
    rig.settled()
    before = rig.stored()
    rig.reopen()
    assert rig.stored().keys() == before.keys()
    again = rig.open(COLUMNS, like=known.names)
    assert rig.attach(again) == 6
    rig.fill(again, 3)
    rig.check()
    rig.store.save(again.table)
    rig.settled()
    rig.reopen()
    last = rig.open(COLUMNS, like=again.names)
    assert rig.attach(last) == 9
    rig.check()


def test_an_end_in_good_order_finishes_what_was_begun(rig: Rig) -> None:
    known = rig.open(COLUMNS)
    rig.fill(known, COLUMNS - 1)
    rig.store.save(known.table)
    assert rig.store.writing
    rig.reopen()
    again = rig.open(COLUMNS, like=known.names)
    assert rig.attach(again) == COLUMNS - 1
    rig.check()


@pytest.mark.parametrize("run_blocks", [RUN // 2, RUN * 2])
def test_runs_of_another_length_than_today_are_read(tmp_path: Path, run_blocks: int) -> None:
    """The length follows from the host budget, which may change from one start to the next."""
    with rigged(tmp_path, disk_runs=8) as rig:
        rig.reopen(2 * RUN)
        known = stored(rig, 2 * RUN + 3, run=2 * RUN)
        rig.reopen(run_blocks)
        again = rig.open(COLUMNS, like=known.names)
        found = rig.attach(again)
        rig.check()
        rig.fill(again, 2 * RUN + 3 - found)
        rig.check()


def test_damage_between_two_starts_is_a_miss(rig: Rig) -> None:
    known = stored(rig, 3 * RUN)
    place = rig.path.tier.locate(known.table.runs[1].run)
    rig.close()
    with (rig.folder / f"{place.range.segment:08}.segment").open("r+b") as file:
        file.seek(place.offset(2) + 3000)
        file.write(bytes([file.read(1)[0] ^ 1]))
    rig.start()
    again = rig.open(COLUMNS, like=known.names)
    assert rig.attach(again) == 3 * RUN
    rig.assert_scan(again, 1, range(1, 13))
    with pytest.raises(ExtentCorrupt):
        rig.scan(again, 2, range(1, 13))
    rig.reset(again, anew=False)
    assert rig.attach(again) == RUN
    rig.fill(again, 2 * RUN)
    rig.check()


# Checkpoints.


def numbers(seed: int, blocks: int = CHECKPOINT_BLOCKS) -> list[Bytes]:
    shape = (LAYERS, blocks, LAYOUTS.raw.alike.record_bytes)
    return list(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def read_checkpoint(rig: Rig, run: RunKey) -> Bytes:
    return np.stack([layer.copy() for layer in rig.store.checkpoints.read(run)])


def test_a_checkpoint_comes_back_as_it_was(rig: Rig) -> None:
    anchor, tokens = bytes([7]) * 32, [1, 0, 2**32 - 1]
    rig.store.checkpoints.save(anchor, tokens, 4, numbers(1))
    assert rig.store.checkpoints.find(anchor) == []
    rig.settled()
    for _ in range(2):
        ((run, saved),) = rig.store.checkpoints.find(anchor)
        assert saved == tokens
        np.testing.assert_array_equal(read_checkpoint(rig, run), numbers(1))
        assert rig.store.checkpoints.find(bytes(32)) == []
        rig.check()
        rig.reopen()
    assert rig.path.tier.locate(run).identity.first == 4


def test_checkpoints_of_one_anchor_are_told_apart(wide: Rig) -> None:
    rig, anchor = wide, bytes([7]) * 32
    saved = {(1, 2): numbers(1), (1, 2, 3): numbers(2), (): numbers(3, 1)}
    for tokens, values in saved.items():
        rig.store.checkpoints.save(anchor, tokens, 0, values)
        rig.settled()
    found = {tuple(tokens): run for run, tokens in rig.store.checkpoints.find(anchor)}
    assert found.keys() == saved.keys()
    for tokens, run in found.items():
        np.testing.assert_array_equal(read_checkpoint(rig, run), saved[tokens])


def test_the_checkpoint_that_was_used_last_comes_first(wide: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(1000)
    monkeypatch.setattr("spilld.offload.disk.tier.time.time", lambda: next(clock))
    rig, anchor = wide, bytes([7]) * 32
    for tokens in ([1], [2], [3]):
        rig.store.checkpoints.save(anchor, tokens, 0, numbers(1))
        rig.settled()
    assert [tokens for _, tokens in rig.store.checkpoints.find(anchor)] == [[3], [2], [1]]
    read_checkpoint(rig, rig.store.checkpoints.find(anchor)[2][0])
    assert [tokens for _, tokens in rig.store.checkpoints.find(anchor)] == [[1], [3], [2]]


def test_a_damaged_checkpoint_is_told_and_gone(rig: Rig) -> None:
    anchor = bytes([7]) * 32
    rig.store.checkpoints.save(anchor, [1], 0, numbers(1))
    rig.settled()
    ((run, _),) = rig.store.checkpoints.find(anchor)
    place = rig.path.tier.locate(run)
    with (rig.folder / f"{place.range.segment:08}.segment").open("r+b") as file:
        os.pwrite(file.fileno(), b"?", place.offset(1) + 1000)
    with pytest.raises(ExtentCorrupt):
        read_checkpoint(rig, run)
    assert rig.store.checkpoints.find(anchor) == []
    with pytest.raises(ExtentMissing):
        read_checkpoint(rig, run)
    while rig.path.prefetch._abandoned:  # reads of other layers that were under way hold the run
        rig.path.prefetch.finished()
    rig.check()
    rig.assert_all_disk_can_be_had()


def test_a_checkpoint_half_read_leaves_nothing_behind(rig: Rig) -> None:
    rig.store.checkpoints.save(bytes(32), [1], 0, numbers(1))
    rig.settled()
    ((run, _),) = rig.store.checkpoints.find(bytes(32))
    for _ in range(10):
        reading = rig.store.checkpoints.read(run)
        np.testing.assert_array_equal(next(reading), numbers(1)[0])
        reading.close()  # type: ignore[attr-defined]
    while rig.path.prefetch._abandoned:
        rig.path.prefetch.finished()
    rig.check()
    rig.assert_all_disk_can_be_had()


def test_a_checkpoint_is_left_where_the_disk_is_in_use(tmp_path: Path) -> None:
    with rigged(tmp_path, disk_runs=1) as rig:
        known = stored(rig, RUN)
        rig.store.checkpoints.save(known.names[RUN], [1], 0, numbers(1))
        rig.settled()
        assert rig.store.checkpoints.find(known.names[RUN]) == []
        assert rig.store.spill_failure is None
        rig.check()


@pytest.mark.parametrize("call", ["pwritev", "fdatasync", "ftruncate"])
def test_a_checkpoint_that_cannot_be_written_is_absent(rig: Rig, call: str) -> None:
    known = stored(rig, RUN)
    rig.system.script[call].append(error(errno.ENOSPC))
    rig.store.checkpoints.save(known.names[RUN], [1], 0, numbers(1))
    rig.settled()
    assert rig.store.checkpoints.find(known.names[RUN]) == []
    assert rig.store.spill_failure is not None
    assert not rig.store.writing
    rig.check()


def test_a_checkpoint_goes_before_what_it_continues(tmp_path: Path) -> None:
    with rigged(tmp_path, disk_runs=3) as rig:
        known = stored(rig, RUN)
        rig.store.checkpoints.save(known.names[RUN], [1], 0, numbers(1))
        rig.settled()
        rig.forget(known)
        new = rig.open(2 * RUN)
        rig.fill(new, 2 * RUN)
        rig.store.save(new.table)
        rig.settled()
        assert rig.store.checkpoints.find(known.names[RUN]) == []
        assert [ref.blocks for ref in rig.store.find(known.names)] == [range(1, RUN + 1)]
        rig.check()


def test_without_a_disk_nothing_is_found_and_nothing_saved(tmp_path: Path) -> None:
    with rigged(tmp_path, disk_runs=0) as rig:
        known = rig.open(RUN)
        rig.fill(known, RUN)
        rig.store.write_behind()
        rig.store.save(known.table)
        rig.store.checkpoints.save(bytes(32), [1], 0, numbers(1))
        assert rig.store.find(known.names) == []
        assert rig.store.checkpoints.find(bytes(32)) == []
        rig.check()


# A broken index.


@pytest.mark.parametrize("damage", [OSError("disk I/O error"), "damaged"])
def test_an_index_that_cannot_be_asked_is_a_miss(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, damage: OSError | str
) -> None:
    known = stored(rig, 2 * RUN)

    def fail(*_: object) -> None:
        raise damage if isinstance(damage, OSError) else IndexDamaged(damage)

    with monkeypatch.context() as patched:
        patched.setattr("spilld.offload.disk.index.database.Database.rows", fail)
        assert rig.store.find(known.names) == []
        assert rig.store.checkpoints.find(known.names[RUN]) == []
    other = rig.open(RUN)
    rig.fill(other, RUN)
    rig.check()


def test_a_run_whose_row_stays_behind_is_not_found(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    known = stored(rig, RUN)
    (ref,) = known.table.runs

    def fail(*_: object) -> None:
        raise OSError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("spilld.offload.disk.index.index.Index.remove", fail)
        rig.path.cache.discard(ref.run)
    assert ref.run not in rig.path.tier
    assert rig.store.find(known.names) == []
    again = rig.open(RUN, like=known.names)
    assert rig.attach(again) == 0
    rig.fill(again, RUN)
    rig.store.spill(again.table, 1, RUN)
    rig.settled()
    rig.assert_scan(again, 1, range(1, RUN + 1))
    assert again.table.runs[0] != RunRef(ref.run, 1, 1, RUN)


# A write budget.


def computed(rig: Rig, blocks: int, like: list[bytes] | None = None) -> Known:
    """A request: blocks that are computed, offered to the disk as they come, and saved at its end."""
    known = rig.open(blocks, like or [])
    for _ in range(0, blocks, RUN):
        rig.fill(known, min(RUN, blocks + 1 - known.table.stop))
        for _ in range(3):
            rig.store.write_behind()
            rig.settled()
    rig.store.save(known.table)
    rig.settled()
    rig.check()
    rig.forget(known)
    return known


def test_a_repeated_prompt_is_written_when_bytes_are_short_and_a_new_one_is_not(tmp_path: Path) -> None:
    clock = Clock()
    with rigged(tmp_path, disk_runs=20, daily=10 * RUN_BYTES, clock=clock) as rig:
        assert rig.path.wear is not None
        rig.path.wear.spend(5 * RUN_BYTES)
        once = computed(rig, 2 * RUN)
        assert rig.store.find(once.names) == []
        assert rig.store.stats()["disk_writes_refused"] == 2
        again = computed(rig, 2 * RUN, once.names)
        assert [ref.blocks for ref in rig.store.find(again.names)] == [range(1, 5), range(5, 9)]
        computed(rig, 2 * RUN)
        assert written(rig) == 2 * RUN_BYTES
        stats = rig.store.stats()
        assert stats["disk_write_budget_bytes"] == 10 * RUN_BYTES
        assert stats["disk_write_left_bytes"] == 3 * RUN_BYTES
        assert stats["disk_writes_refused"] == 4
        clock.now += 86400
        late = computed(rig, 2 * RUN)
        assert len(rig.store.find(late.names)) == 2, "there is enough again"


def test_checkpoints_are_refused_likewise(tmp_path: Path) -> None:
    with rigged(tmp_path, disk_runs=20, daily=40 * RUN_BYTES, clock=Clock()) as rig:
        assert rig.path.wear is not None
        rig.path.wear.spend(20 * RUN_BYTES)
        anchor, values = bytes(32), numbers(1)
        rig.store.checkpoints.save(anchor, [1], 4, values)
        assert not rig.store.writing
        assert rig.store.stats()["disk_writes_refused"] == 1
        rig.store.checkpoints.save(anchor, [2], 4, values)
        rig.settled()
        assert [tokens for _, tokens in rig.store.checkpoints.find(anchor)] == [[2]]
        assert rig.store.stats()["disk_write_left_bytes"] == 20 * RUN_BYTES - rig.path.tier.used_bytes


def test_what_host_memory_has_no_room_for_is_written_whatever_is_left(tmp_path: Path) -> None:
    with rigged(tmp_path, disk_runs=20, daily=0, clock=Clock()) as rig:
        known = rig.open(2 * COLUMNS)
        for _ in range(2 * COLUMNS // RUN):
            rig.fill(known, RUN)
            rig.store.write_behind()
        rig.settled()
        rig.check()
        assert known.table.disk_blocks >= COLUMNS
        assert rig.path.wear is not None
        assert rig.path.wear._bucket.left == -written(rig)


def test_a_restart_remembers_what_was_spent(tmp_path: Path) -> None:
    with rigged(tmp_path, disk_runs=20, daily=10 * RUN_BYTES, clock=Clock()) as rig:
        computed(rig, 2 * RUN)
        assert rig.store.stats()["disk_write_left_bytes"] == 8 * RUN_BYTES
        rig.reopen()
        assert rig.store.stats()["disk_write_left_bytes"] == 8 * RUN_BYTES


def test_without_a_budget_everything_is_written(rig: Rig) -> None:
    known = computed(rig, 2 * RUN)
    assert len(rig.store.find(known.names)) == 2
    assert not [name for name in rig.store.stats() if name.startswith("disk_write_")]


# Transactions.


def commits(rig: Rig, work: Callable[[], object]) -> int:
    """How many transactions of the index the work takes."""
    seen: list[str] = []
    connection = rig.path.tier.index._db._db
    connection.set_trace_callback(seen.append)
    try:
        work()
    finally:
        connection.set_trace_callback(None)
    return seen.count("COMMIT")


def written_by_threads(rig: Rig, count: int) -> None:
    """Wait until so many writes have ended, of which the owner does not know yet."""
    rig.system.gate.set()
    until = time.monotonic() + 10
    while rig.path.spiller._outcomes.qsize() < count:
        assert time.monotonic() < until, "a write never ended"
        time.sleep(0.001)


def test_what_has_ended_since_the_last_step_is_one_transaction(tmp_path: Path) -> None:
    """With the uses and the writes that were noted meanwhile."""
    with rigged(tmp_path, disk_runs=20, daily=100 * RUN_BYTES) as rig:
        old = stored(rig, RUN)
        known = rig.open(3 * RUN)
        rig.fill(known, 3 * RUN)
        rig.system.gate.clear()
        before = rig.path.cache.cached_bytes
        rig.store.save(known.table)
        rig.attach(rig.open(RUN, like=old.names))
        written_by_threads(rig, 3)
        assert commits(rig, rig.store.settle) == 1
        assert rig.path.cache.cached_bytes == before + 3 * RUN_BYTES
        assert commits(rig, rig.store.settle) == 0
        rig.check()


def test_a_step_without_writes_notes_uses_in_one_transaction(rig: Rig) -> None:
    old = stored(rig, RUN)
    for _ in range(3):
        again = rig.open(RUN, like=old.names)
        rig.attach(again)
        rig.forget(again)
    assert commits(rig, rig.store.settle) == 1


def test_what_goes_for_one_run_goes_in_one_transaction(rig: Rig) -> None:
    for _ in range(4):
        rig.forget(stored(rig, RUN))
    rig.store.settle()
    assert commits(rig, rig.assert_all_disk_can_be_had) == 1
