"""Writes on an I/O thread: a run is reported once, durable and committed, or absent."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spilld.offload.disk import spiller as writer
from spilld.offload.disk.files.extent import RunPlace
from spilld.offload.disk.spiller import Spilled, Spiller
from spilld.offload.errors import ExtentMissing, FolderInUse
from spilld.offload.host.slab import HostSlab
from spilld.offload.system import Rows

from .faults import Fault, ScriptedSystem, Stall, error
from .run_tier import RunTier
from .tier_contract import BUDGET, FINGERPRINT, LAYERS, LAYOUT, LAYOUTS, assert_tier, blocks, chain, key


@pytest.fixture
def system() -> ScriptedSystem:
    return ScriptedSystem(durable=True)


@pytest.fixture
def tier(tmp_path: Path, system: ScriptedSystem) -> Iterator[RunTier]:
    tier = RunTier(tmp_path / "kv", BUDGET, LAYOUTS, FINGERPRINT, system)
    yield tier
    tier.check_integrity()
    tier.close()


@pytest.fixture
def spiller(tier: RunTier) -> Iterator[Spiller]:
    spiller = Spiller(tier, 4 * LAYOUT.record_bytes + 256)
    yield spiller
    spiller.close()
    assert spiller.pending == 0


@pytest.fixture
def slab() -> HostSlab:
    return HostSlab(100 * LAYOUTS.column_bytes, LAYOUTS.record_bytes)


def fill(slab: HostSlab, n: int, count: int) -> Rows:
    """Records of run n in rows that are neither adjacent nor ascending, int64[layers, count]."""
    rows = slab.allocate(2 * count)[:, ::-2]
    for layer, records in enumerate(blocks(n, count)):
        slab.records[layer][rows[layer]] = records
    return rows


def submit(tier: RunTier, spiller: Spiller, slab: HostSlab, n: int, count: int = 2) -> RunPlace:
    place = tier.reserve(key(n), first=n, count=count, chain_hash=chain(n))
    spiller.submit(place, slab.records, fill(slab, n, count))
    return place


def until_ended(spiller: Spiller, count: int) -> list[Spilled]:
    ended: list[Spilled] = []
    while len(ended) < count:
        more = spiller.wait(10)
        assert more, "the write never ended"
        ended += more
    return ended


def test_what_is_spilled_can_be_read(tier: RunTier, spiller: Spiller, slab: HostSlab) -> None:
    runs = {1: 2, 2: 4, 3: 1}
    for n, count in runs.items():
        submit(tier, spiller, slab, n, count)
    ended = until_ended(spiller, 3)
    assert [(spilled.run, spilled.error) for spilled in ended] == [(key(n), None) for n in runs]
    assert_tier(tier, runs)
    assert spiller.finished() == []
    assert spiller.wait(10) == []
    assert spiller.bytes_written == tier.used_bytes
    assert spiller.scratch_bytes == 12288


def test_nothing_of_an_earlier_run_is_left_behind_a_shorter_one(
    tier: RunTier, spiller: Spiller, slab: HostSlab, tmp_path: Path
) -> None:
    """The scratch buffer is used again: its old bytes must not reach the padding of an extent."""
    submit(tier, spiller, slab, 1, 4)
    short = submit(tier, spiller, slab, 2, 1)
    assert all(spilled.ok for spilled in until_ended(spiller, 2))
    raw = (tmp_path / "kv" / f"{short.range.segment:08}.segment").read_bytes()
    for layer in range(LAYERS):
        begin, end = (
            short.offset(layer) + 256 + LAYOUT.record_bytes,
            short.offset(layer) + short.identity.largest_extent,
        )
        assert begin < end
        assert not any(raw[begin:end])


def test_a_run_exists_only_once_it_is_durable(
    tier: RunTier, spiller: Spiller, slab: HostSlab, system: ScriptedSystem
) -> None:
    stall = Stall()
    system.script["fdatasync"].append(stall)
    submit(tier, spiller, slab, 1)
    assert stall.begun.wait(5)
    assert system.calls["pwritev"] == LAYERS + 1
    assert spiller.finished() == []
    assert spiller.wait(0.01) == []
    assert key(1) not in tier
    stall.over.set()
    assert until_ended(spiller, 1)[0].ok
    assert_tier(tier, {1: 2})


def test_writes_that_succeed_tell_how_long_they_took(
    tier: RunTier, slab: HostSlab, system: ScriptedSystem
) -> None:
    took: list[float] = []
    spiller = Spiller(tier, 4 * LAYOUT.record_bytes + 256, took.append)
    system.script["fdatasync"].extend([None, error(errno.EIO)])
    for n in (1, 2):
        submit(tier, spiller, slab, n)
    assert [spilled.ok for spilled in until_ended(spiller, 2)] == [True, False]
    assert len(took) == 1
    assert 0 < took[0] < spiller.write_seconds
    spiller.close()


@pytest.mark.parametrize("call", ["pwritev", "fdatasync", "fsync_folder"])
@pytest.mark.parametrize("fault", [error(errno.EIO), error(errno.ENOSPC), MemoryError("unexpected")])
def test_a_failed_write_leaves_nothing_and_the_thread_alive(
    tier: RunTier, spiller: Spiller, slab: HostSlab, system: ScriptedSystem, call: str, fault: Fault
) -> None:
    system.script[call].extend([None, fault] if call == "pwritev" else [fault])
    submit(tier, spiller, slab, 1)
    (failed,) = until_ended(spiller, 1)
    assert failed.run == key(1)
    assert failed.error is not None
    assert failed.error.__cause__ is fault
    assert not failed.ok
    assert_tier(tier, {})
    with pytest.raises(ExtentMissing):
        tier.locate(key(1))
    submit(tier, spiller, slab, 2)
    submit(tier, spiller, slab, 3)
    assert all(spilled.ok for spilled in until_ended(spiller, 2))
    assert_tier(tier, {2: 2, 3: 2})
    assert spiller.failures == 1


def test_a_run_abandoned_in_flight_gives_its_space_back_when_the_thread_is_done(
    tier: RunTier, spiller: Spiller, slab: HostSlab, system: ScriptedSystem
) -> None:
    stall = Stall()
    system.script["pwritev"].extend([None, stall])
    place = submit(tier, spiller, slab, 1)
    assert stall.begun.wait(5)
    tier.abandon(place)
    other = tier.reserve(key(2), first=0, count=2, chain_hash=chain(2))
    assert other.range != place.range
    tier.abandon(other)
    assert tier.used_bytes == place.range.nbytes
    stall.over.set()
    (spilled,) = until_ended(spiller, 1)
    assert spilled.error is not None
    assert_tier(tier, {})


def test_the_rows_may_be_changed_by_the_caller_after_submit(
    tier: RunTier, spiller: Spiller, slab: HostSlab, system: ScriptedSystem
) -> None:
    stall = Stall()
    system.script["pwritev"].append(stall)
    place = tier.reserve(key(1), first=1, count=2, chain_hash=chain(1))
    rows = fill(slab, 1, 2)
    spiller.submit(place, slab.records, rows)
    assert stall.begun.wait(5)
    rows[:] = 0
    stall.over.set()
    assert until_ended(spiller, 1)[0].ok
    assert_tier(tier, {1: 2})


def test_misuse_is_told_and_leaves_no_lease(tier: RunTier, spiller: Spiller, slab: HostSlab) -> None:
    place = tier.reserve(key(1), first=1, count=9, chain_hash=chain(1))
    with pytest.raises(ValueError, match="rows of shape"):
        spiller.submit(place, slab.records, np.zeros((LAYERS, 8), np.int64))
    with pytest.raises(ValueError, match="does not fit"):
        spiller.submit(place, slab.records, np.zeros((LAYERS, 9), np.int64))
    tier.abandon(place)
    assert tier.used_bytes == 0
    outside = np.full((LAYERS, 1), len(slab.records[0]))
    place = tier.reserve(key(2), first=1, count=1, chain_hash=chain(2))
    spiller.submit(place, slab.records, outside)
    assert not until_ended(spiller, 1)[0].ok
    assert_tier(tier, {})


def test_close_fails_what_is_not_written_and_does_not_wait_for_ever(
    tier: RunTier, slab: HostSlab, system: ScriptedSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "CLOSE_S", 0.1)
    spiller = Spiller(tier, 4 * LAYOUT.record_bytes + 256)
    stall = Stall()
    system.script["pwritev"].append(stall)
    for n in range(3):
        submit(tier, spiller, slab, n)
    assert stall.begun.wait(5)
    began = time.monotonic()
    spiller.close()
    assert time.monotonic() - began < 1
    assert spiller.pending == 3
    assert tier.used_bytes > 0
    stall.over.set()
    spiller.close()
    assert spiller.pending == 0
    assert_tier(tier, {})


def test_the_tier_keeps_files_open_that_a_stuck_thread_writes_to(
    tmp_path: Path, slab: HostSlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor closed under a stalled write could come to mean another file, and what it writes could
    land in one of the next daemon: that one has to wait."""
    monkeypatch.setattr(writer, "CLOSE_S", 0.1)
    system = ScriptedSystem()
    tier = RunTier(tmp_path / "stuck", BUDGET, LAYOUTS, FINGERPRINT, system)
    spiller = Spiller(tier, 4 * LAYOUT.record_bytes + 256)
    stall = Stall()
    system.script["pwritev"].append(stall)
    place = submit(tier, spiller, slab, 1)
    assert stall.begun.wait(5)
    spiller.close()
    tier.close()
    victim = (tmp_path / "victim").open("wb")
    assert victim.fileno() != place.file
    with pytest.raises(FolderInUse):
        RunTier(tmp_path / "stuck", BUDGET, LAYOUTS, FINGERPRINT)
    stall.over.set()
    spiller.close()
    assert spiller.pending == 0
    victim.close()
    assert (tmp_path / "victim").read_bytes() == b""
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(place.file)
    again = RunTier(tmp_path / "stuck", BUDGET, LAYOUTS, FINGERPRINT)
    assert place.run not in again
    again.close()
