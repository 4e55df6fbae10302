"""Reads ahead of need: order, deadlines, leases and the ring, with a disk that stalls on command."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spilld.offload.disk import prefetch
from spilld.offload.disk.prefetch import Prefetcher
from spilld.offload.disk.read_ticket import ExtentRead, ReadState, Ticket
from spilld.offload.errors import (
    BudgetTooSmall,
    ExtentCorrupt,
    ExtentMissing,
    ReadCancelled,
    ReadError,
    ReadFailed,
    ReadTimeout,
)

from .faults import Fault, ScriptedSystem, Stall, error
from .run_tier import RunTier
from .tier_contract import BUDGET, FINGERPRINT, LAYERS, LAYOUT, LAYOUTS, blocks, chain, key

RUNS = {n: 1 + n % 3 for n in range(8)}
BUFFERS = 3


@pytest.fixture
def system() -> ScriptedSystem:
    return ScriptedSystem()


@pytest.fixture
def tier(tmp_path: Path, system: ScriptedSystem) -> Iterator[RunTier]:
    """Holds RUNS. Whatever a test did, no lease may be left at its end."""
    tier = RunTier(tmp_path / "kv", BUDGET, LAYOUTS, FINGERPRINT, system)
    for n, count in RUNS.items():
        tier.put(key(n), n, chain(n), blocks(n, count))
    yield tier
    tier.check_integrity()
    for n in RUNS:
        if key(n) in tier:
            tier.delete(key(n))
    assert tier.used_bytes == 0, "a lease outlived its read"
    tier.close()


def make(tier: RunTier, threads: int = 2, deadline_s: float = 20.0) -> Prefetcher:
    return Prefetcher(tier, BUFFERS, 3 * LAYOUT.record_bytes + 256, threads, deadline_s)


@pytest.fixture
def ring(tier: RunTier) -> Iterator[Prefetcher]:
    ring = make(tier)
    yield ring
    finish(ring)


def finish(ring: Prefetcher) -> None:
    """Every buffer of the ring can still be used at the same time, and the books are right."""
    ring.check_integrity()
    tickets = ring.submit([ExtentRead(key(7), layer) for layer in range(BUFFERS)])
    for layer, ticket in enumerate(tickets):
        np.testing.assert_array_equal(ring.wait(ticket), blocks(7, RUNS[7])[layer])
    ring.check_integrity()
    ring.cancel(tickets)
    ring.close()
    ring.check_integrity()


def assert_records(ring: Prefetcher, ticket: Ticket) -> None:
    n = int.from_bytes(ticket.read.run, "big")
    np.testing.assert_array_equal(ring.wait(ticket), blocks(n, RUNS[n])[ticket.read.layer])


def until_ended(ring: Prefetcher, count: int) -> list[Ticket]:
    ended: list[Ticket] = []
    give_up = time.monotonic() + 10
    while len(ended) < count and time.monotonic() < give_up:
        ended += ring.finished()
        time.sleep(0.001)
    return ended


class TestReading:
    @pytest.mark.parametrize("threads", [1, 4])
    def test_a_scan_goes_round_the_ring(self, tier: RunTier, threads: int) -> None:
        ring = make(tier, threads)
        tickets = ring.submit([ExtentRead(key(n), layer) for layer in range(LAYERS) for n in RUNS] * 3)
        for ticket in tickets:
            assert_records(ring, ticket)
            ring.check_integrity()
            ring.release(ticket)
        assert ring.stats.reads == len(tickets)
        assert ring.stats.bytes_read == sum(tier.locate(t.read.run).identity.largest_extent for t in tickets)
        assert ring.stats.read_seconds > 0
        assert ring.stats.failures == 0
        assert ring.finished() == []
        finish(ring)

    def test_the_staging_memory_is_what_it_says(self, tier: RunTier) -> None:
        ring = make(tier)
        assert ring.staging_bytes == BUFFERS * 8192
        views = [
            ring.wait(ticket) for ticket in ring.submit([ExtentRead(key(2), layer) for layer in range(3)])
        ]
        assert not np.shares_memory(views[0], views[1])
        low = min(view.ctypes.data for view in views)
        high = max(view.ctypes.data + view.nbytes for view in views)
        assert high - low <= ring.staging_bytes
        assert all(view.ctypes.data % 64 == 0 for view in views)
        ring.close()
        with pytest.raises(BudgetTooSmall):
            Prefetcher(tier, 0, 4096)

    def test_reads_are_issued_in_submission_order(self, tier: RunTier, system: ScriptedSystem) -> None:
        ring = make(tier, threads=1)
        stall = Stall()
        system.script["preadv"].append(stall)
        tickets = ring.submit([ExtentRead(key(n), 0) for n in RUNS])
        assert stall.begun.wait(5)
        assert [t.state for t in tickets] == [ReadState.ISSUED] * BUFFERS + [ReadState.QUEUED] * (8 - BUFFERS)
        assert ring.finished() == []
        stall.over.set()
        assert until_ended(ring, BUFFERS) == tickets[:BUFFERS]
        ring.release(tickets[1])
        assert tickets[BUFFERS].state is ReadState.ISSUED
        assert tickets[BUFFERS + 1].state is ReadState.QUEUED
        ring.cancel(tickets)
        finish(ring)

    def test_finished_tells_once_and_not_what_the_caller_knows(self, ring: Prefetcher) -> None:
        tickets = ring.submit([ExtentRead(key(n), 0) for n in range(3)])
        ring.wait(tickets[1])
        assert sorted(until_ended(ring, 2), key=tickets.index) == [tickets[0], tickets[2]]
        assert ring.finished() == []
        for ticket in tickets:
            ring.release(ticket)

    def test_a_stall_is_accounted(self, ring: Prefetcher, system: ScriptedSystem) -> None:
        stall = Stall()
        system.script["preadv"].append(stall)
        (ticket,) = ring.submit([ExtentRead(key(1), 0)])
        assert stall.begun.wait(5)
        time.sleep(0.05)
        assert ring.stats.stall_seconds == 0
        stall.over.set()
        assert_records(ring, ticket)
        stalled = ring.stats.stall_seconds
        assert_records(ring, ticket)
        assert ring.stats.stall_seconds == stalled
        ring.release(ticket)

    def test_hits_and_stalls_are_told_apart(self, ring: Prefetcher, system: ScriptedSystem) -> None:
        stall = Stall()
        system.script["preadv"].append(stall)
        (slow,) = ring.submit([ExtentRead(key(1), 0)])
        assert stall.begun.wait(5)
        threading.Timer(0.2, stall.over.set).start()
        assert_records(ring, slow)
        (quick,) = ring.submit([ExtentRead(key(2), 0)])
        assert until_ended(ring, 1) == [quick]
        assert_records(ring, quick)
        assert (slow.stalled, quick.stalled) == (True, False)
        assert (ring.stats.hits, ring.stats.stalls) == (1, 1)
        ring.cancel([slow, quick])

    def test_reads_that_succeed_tell_how_long_they_took(self, tier: RunTier, system: ScriptedSystem) -> None:
        took: list[float] = []
        ring = Prefetcher(tier, BUFFERS, 3 * LAYOUT.record_bytes + 256, 1, on_read=took.append)
        system.script["preadv"].extend([None, error(errno.EIO)])
        tickets = ring.submit([ExtentRead(key(n), 0) for n in range(3)])
        until_ended(ring, 3)
        assert len(took) == ring.stats.reads == 2
        assert 0 < sum(took) < ring.stats.read_seconds
        ring.cancel(tickets)
        finish(ring)

    def test_misuse_is_told(self, ring: Prefetcher, tier: RunTier) -> None:
        for read in (ExtentRead(key(1), LAYERS), ExtentRead(key(1), -1)):
            with pytest.raises(ValueError, match="layer"):
                ring.submit([ExtentRead(key(0), 0), read])
        tier.put(key(100), 0, chain(0), blocks(100, 9))
        with pytest.raises(ValueError, match="does not fit"):
            ring.submit([ExtentRead(key(0), 0), ExtentRead(key(100), 0)])
        tier.delete(key(100))
        (ticket,) = ring.submit([ExtentRead(key(1), 0)])
        ring.wait(ticket)
        ring.release(ticket)
        with pytest.raises(ValueError, match="release"):
            ring.release(ticket)
        with pytest.raises(ValueError, match="released"):
            ring.wait(ticket)


class TestFailing:
    def test_every_failure_is_typed_and_costs_no_buffer(
        self, ring: Prefetcher, tier: RunTier, system: ScriptedSystem, tmp_path: Path
    ) -> None:
        place = tier.locate(key(3))
        with (tmp_path / "kv" / "00000000.segment").open("r+b") as file:
            file.seek(place.offset(1) + 300)
            file.write(bytes(8))
        cases: list[tuple[ExtentRead, Fault, type[ReadFailed]]] = [
            (ExtentRead(key(1), 0), error(errno.EIO), ReadError),
            (ExtentRead(key(50), 0), None, ExtentMissing),
            (ExtentRead(key(3), 1), None, ExtentCorrupt),
            (ExtentRead(key(1), 0), MemoryError("unexpected"), ReadError),
            (ExtentRead(key(1), 0), ZeroDivisionError(), ReadError),
        ]
        for round_ in range(3):
            for i, (read, fault, kind) in enumerate(cases):
                if fault is not None:
                    system.script["preadv"].append(fault)
                (ticket,) = ring.submit([read])
                with pytest.raises(kind) as caught:
                    ring.wait(ticket)
                assert fault is None or caught.value.__cause__ is fault
                assert ticket.state is ReadState.FAILED
                ring.release(ticket)
                assert ring.stats.failures == round_ * len(cases) + i + 1
                ring.check_integrity()
        assert ring.finished() == []
        assert ring.stats.corrupt == 3

    def test_a_failure_nobody_waits_for_is_reported(self, ring: Prefetcher, system: ScriptedSystem) -> None:
        system.script["preadv"].append(error(errno.EIO))
        tickets = ring.submit([ExtentRead(key(50), 0), ExtentRead(key(1), 0)])
        assert until_ended(ring, 2) == tickets
        assert [type(ticket.error) for ticket in tickets] == [ExtentMissing, ReadError]

    def test_a_failure_lets_the_next_read_have_the_buffer(
        self, ring: Prefetcher, system: ScriptedSystem
    ) -> None:
        system.script["preadv"].extend([error(errno.EIO)] * 5)
        tickets = ring.submit([ExtentRead(key(n), 0) for n in range(6)])
        for ticket in tickets[:5]:
            with pytest.raises(ReadError):
                ring.wait(ticket)
        assert_records(ring, tickets[5])
        ring.release(tickets[5])


class TestDeadline:
    def test_a_stalled_read_times_out_and_its_buffer_comes_back_later(
        self, tier: RunTier, system: ScriptedSystem
    ) -> None:
        ring = make(tier, deadline_s=0.15)
        stall = Stall()
        system.script["preadv"].append(stall)
        (ticket,) = ring.submit([ExtentRead(key(1), 0)])
        began = time.monotonic()
        with pytest.raises(ReadTimeout):
            ring.wait(ticket)
        assert 0.1 < time.monotonic() - began < 1
        assert ring.stats.stall_seconds > 0.1
        ring.release(ticket)
        tier.delete(key(1))
        range_ = tier.locate(key(0)).range
        tier.delete(key(0))
        tier.put(key(0), 0, chain(0), blocks(0, RUNS[0]))
        assert tier.locate(key(0)).range == range_, "the space of a stuck read must not be given away"
        two = ring.submit([ExtentRead(key(n), 0) for n in (2, 3, 4)])
        for t in two[:2]:
            assert_records(ring, t)
        assert two[2].state is ReadState.QUEUED
        ring.check_integrity()
        stall.over.set()
        assert_records(ring, two[2])
        ring.cancel(two)
        assert ring.stats.failures == 1
        finish(ring)

    def test_a_stalled_read_ends_even_if_nobody_waits(self, tier: RunTier, system: ScriptedSystem) -> None:
        ring = make(tier, deadline_s=0.05)
        stall = Stall()
        system.script["preadv"].append(stall)
        (ticket,) = ring.submit([ExtentRead(key(1), 0)])
        assert until_ended(ring, 1) == [ticket]
        assert isinstance(ticket.error, ReadTimeout)
        stall.over.set()
        ring.close()
        ring.check_integrity()

    def test_the_deadline_counts_from_the_issue(self, tier: RunTier, system: ScriptedSystem) -> None:
        ring = make(tier, deadline_s=0.4)
        stall = Stall()
        system.script["preadv"].append(stall)
        (ticket,) = ring.submit([ExtentRead(key(1), 0)])
        time.sleep(0.3)
        began = time.monotonic()
        with pytest.raises(ReadTimeout):
            ring.wait(ticket)
        assert time.monotonic() - began < 0.3
        stall.over.set()
        ring.close()

    def test_a_queued_read_behind_stalled_ones_times_out(self, tier: RunTier, system: ScriptedSystem) -> None:
        ring = make(tier, deadline_s=0.1)
        stalls = [Stall() for _ in range(2)]
        system.script["preadv"].extend(stalls)
        tickets = ring.submit([ExtentRead(key(n), 0) for n in range(BUFFERS)])
        assert all(stall.begun.wait(5) for stall in stalls)
        time.sleep(0.12)
        assert len(ring.finished()) == BUFFERS
        assert all(isinstance(ticket.error, ReadTimeout) for ticket in tickets)
        (late,) = ring.submit([ExtentRead(key(5), 0)])
        assert late.state is ReadState.QUEUED
        with pytest.raises(ReadTimeout):
            ring.wait(late)
        ring.check_integrity()
        for stall in stalls:
            stall.over.set()
        finish_after_quarantine(ring)

    def test_close_does_not_wait_for_ever(
        self, tier: RunTier, system: ScriptedSystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prefetch, "CLOSE_S", 0.1)
        ring = make(tier)
        stall = Stall()
        system.script["preadv"].append(stall)
        ring.submit([ExtentRead(key(n), 0) for n in RUNS])
        assert stall.begun.wait(5)
        began = time.monotonic()
        ring.close()
        assert time.monotonic() - began < 1
        stall.over.set()
        ring.close()


def finish_after_quarantine(ring: Prefetcher) -> None:
    """The threads are free again: wait until they took the unwanted work off the list."""
    give_up = time.monotonic() + 5
    while time.monotonic() < give_up:
        tickets = ring.submit([ExtentRead(key(7), 0)] * BUFFERS)
        issued = all(ticket.state is not ReadState.QUEUED for ticket in tickets)
        ring.cancel(tickets)
        if issued:
            break
        time.sleep(0.001)
    ring.close()
    ring.check_integrity()


class TestRing:
    def test_a_wait_that_only_the_waiter_could_end_is_refused(self, ring: Prefetcher) -> None:
        tickets = ring.submit([ExtentRead(key(n), 0) for n in range(BUFFERS + 2)])
        for ticket in tickets[:BUFFERS]:
            ring.wait(ticket)
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="held by the caller"):
            ring.wait(tickets[BUFFERS])
        assert time.monotonic() - began < 1
        ring.release(tickets[0])
        with pytest.raises(RuntimeError, match="held by the caller"):
            ring.wait(tickets[BUFFERS + 1])
        assert_records(ring, tickets[BUFFERS])
        ring.cancel(tickets)

    def test_it_is_refused_before_the_buffers_are_even_loaded(
        self, ring: Prefetcher, system: ScriptedSystem
    ) -> None:
        stalls = [Stall() for _ in range(2)]
        system.script["preadv"].extend(stalls)
        tickets = ring.submit([ExtentRead(key(n), 0) for n in range(BUFFERS + 1)])
        with pytest.raises(RuntimeError, match="held by the caller"):
            ring.wait(tickets[BUFFERS])
        for stall in stalls:
            stall.over.set()
        for ticket in tickets:
            assert_records(ring, ticket)
            ring.release(ticket)

    def test_waiting_out_of_order_is_fine_within_the_ring(self, ring: Prefetcher) -> None:
        tickets = ring.submit([ExtentRead(key(n), 0) for n in range(BUFFERS)])
        for ticket in reversed(tickets):
            assert_records(ring, ticket)
        for ticket in tickets:
            ring.release(ticket)


class TestCancel:
    def test_at_every_stage(self, tier: RunTier, system: ScriptedSystem) -> None:
        ring = make(tier, threads=1)
        (loaded,) = ring.submit([ExtentRead(key(0), 0)])
        ring.wait(loaded)
        (failed,) = ring.submit([ExtentRead(key(50), 0)])
        stall = Stall()
        system.script["preadv"].append(stall)
        running, issued, queued = ring.submit([ExtentRead(key(n), 0) for n in (1, 2, 3)])
        assert stall.begun.wait(5)
        assert [t.state for t in (running, issued, queued)] == [
            ReadState.ISSUED,
            ReadState.ISSUED,
            ReadState.QUEUED,
        ]
        reads = system.calls["preadv"]
        for ticket in (queued, issued, running, failed, loaded):
            ring.cancel([ticket])
            ring.check_integrity()
        ring.cancel([queued, issued, running, failed, loaded])
        for ticket in (queued, issued, running, loaded):
            assert ticket.state is ReadState.CANCELLED
            with pytest.raises(ReadCancelled):
                ring.wait(ticket)
        with pytest.raises(ExtentMissing):
            ring.wait(failed)
        used = tier.used_bytes
        tier.delete(key(1))
        assert tier.used_bytes == used
        stall.over.set()
        finish(ring)
        assert system.calls["preadv"] == reads + BUFFERS, "a cancelled read was begun"
        assert ring.stats.failures == 1

    def test_the_queue_moves_up(self, ring: Prefetcher) -> None:
        tickets = ring.submit([ExtentRead(key(n), 0) for n in RUNS])
        for ticket in tickets[:BUFFERS]:
            ring.wait(ticket)
        ring.cancel(tickets[: BUFFERS + 1])
        for ticket in tickets[BUFFERS + 1 :]:
            assert_records(ring, ticket)
            ring.release(ticket)

    def test_a_deleted_run_is_still_read_by_whoever_asked_before(
        self, ring: Prefetcher, tier: RunTier, system: ScriptedSystem
    ) -> None:
        stalls = [Stall() for _ in range(2)]
        system.script["preadv"].extend(stalls)
        tickets = ring.submit([ExtentRead(key(n), 1) for n in range(5)])
        for n in range(5):
            tier.delete(key(n))
        tier.put(key(60), 0, chain(60), blocks(60, 3))
        for stall in stalls:
            stall.over.set()
        for ticket in tickets:
            assert_records(ring, ticket)
            ring.release(ticket)
        tier.delete(key(60))


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_calls_keeps_the_books(tier: RunTier, system: ScriptedSystem, seed: int) -> None:
    """Random calls on a failing disk: right records or a typed error, and nothing is lost at the end."""
    choose = random.Random(seed)
    ring = make(tier, threads=1 + seed % 3)
    live: list[Ticket] = []
    for _ in range(400):
        action = choose.choice(["submit", "wait", "wait", "release", "cancel", "finished", "fault"])
        if action == "submit" and len(live) < 20:
            numbers = choose.choices([*RUNS, 50], k=choose.randint(1, 4))
            live += ring.submit([ExtentRead(key(n), choose.randrange(LAYERS)) for n in numbers])
        elif action == "wait" and live:
            try:
                assert_records(ring, live[0])
            except ReadFailed:
                assert live.pop(0).state is ReadState.FAILED
        elif action == "release" and live and live[0].state is ReadState.LOADED:
            ring.release(live.pop(0))
        elif action == "cancel" and live:
            ring.cancel([live.pop(choose.randrange(len(live)))])
        elif action == "finished":
            ring.finished()
        elif action == "fault":
            system.script["preadv"].append(choose.choice([error(errno.EIO), InterruptedError(), KeyError()]))
        ring.check_integrity()
        tier.check_integrity()
    ring.cancel(live)
    system.script.clear()
    finish_after_quarantine(ring)
