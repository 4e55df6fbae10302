"""The write budget: what is left of a day's bytes, who may still write, and what a restart remembers."""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from spilld.offload.disk.index.index import Index
from spilld.offload.errors import IndexDamaged
from spilld.offload.maintenance.compaction import Compaction
from spilld.offload.maintenance.wear import DAY_S, WriteBudget
from spilld.offload.prefix_cache.frequency_sketch import MOST, Sketch

from .test_compaction import FAST, RUN_BYTES, WIDEST, Clock
from .test_compaction import Rig as CompactionRig

DAILY = 86_400


def name(n: int) -> bytes:
    return n.to_bytes(32, "big")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    index = Index(tmp_path / "index.sqlite")
    yield index
    index.check_integrity()
    index.close()


class TestSketch:
    @pytest.mark.parametrize("seed", range(3))
    def test_a_count_is_never_too_low_and_seldom_too_high(self, seed: int) -> None:
        choose, sketch, sample = random.Random(seed), Sketch(sample=1000), 1000
        door: set[int] = set()
        counts: Counter[int] = Counter()
        wrong = asked = 0
        for sighting in range(1, 5001):
            n = int(choose.paretovariate(0.4)) % 100_000
            sketch.add(name(n))
            if n in door:
                counts[n] = min(counts[n] + 1, MOST)
            door.add(n)
            if sighting % sample == 0:
                door.clear()
                counts = Counter({m: count // 2 for m, count in counts.items()})
            for m in (n, choose.randrange(100_000)):
                exact = (m in door) + counts[m]
                assert sketch.count(name(m)) >= exact
                wrong += sketch.count(name(m)) != exact
                asked += 1
        assert wrong < asked / 500

    def test_what_was_seen_once_is_not_taken_for_seen_twice(self) -> None:
        """At its fullest: as many contents as there are sightings between two ageings."""
        sketch, wrong = Sketch(), 0
        for n in range((1 << 14) - 1):
            sketch.add(name(n))
            wrong += sketch.count(name(n)) > 1
        assert wrong < (1 << 14) / 1000

    def test_what_is_no_longer_seen_is_forgotten(self) -> None:
        sketch = Sketch(sample=100)
        for _ in range(50):
            sketch.add(name(1))
        assert sketch.count(name(1)) == MOST + 1
        counts = []
        for n in range(50, 550):
            sketch.add(name(n))
            counts.append(sketch.count(name(1)))
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == 0


class TestBudget:
    def test_three_regimes(self, index: Index, clock: Clock) -> None:
        budget = WriteBudget(DAILY, index, clock)
        assert budget.admits(name(1), DAILY)
        budget.spend(DAILY // 2 - 1)
        assert budget.comfortable
        assert budget.admits(name(2), 1000), "seen once, while enough is left"
        budget.spend(1)
        assert not budget.comfortable
        assert not budget.admits(name(3), 1000)
        assert budget.refused == 1
        assert not budget.admits(name(3), 1000, again=True), "the same request, asking again"
        assert budget.refused == 1
        assert budget.admits(name(3), 1000), "another request"
        assert budget.admits(name(2), 1000), "seen while enough was left"
        assert not budget.admits(name(2), DAILY // 2 + 1), "more than is left"
        budget.spend(DAILY // 2)
        assert budget.left_bytes == 0
        assert not budget.admits(name(3), 1)
        assert budget.refused == 3

    def test_a_debt_is_paid_off_first(self, index: Index, clock: Clock) -> None:
        budget = WriteBudget(DAILY, index, clock)
        budget.spend(3 * DAILY)
        clock.now += 2 * DAY_S
        assert budget.left_bytes == 0
        clock.now += 100
        assert budget.left_bytes == 100
        clock.now += 10 * DAY_S
        assert budget.left_bytes == DAILY, "no more than a day's bytes at once"

    def test_nothing_a_day_is_nothing(self, index: Index, clock: Clock) -> None:
        budget = WriteBudget(0, index, clock)
        for _ in range(3):
            assert not budget.admits(name(1), 1)
        assert not budget.comfortable
        budget.spend(10)
        clock.now += DAY_S
        assert budget.left_bytes == 0

    @pytest.mark.parametrize("seed", range(3))
    def test_no_more_is_admitted_than_comes(self, index: Index, clock: Clock, seed: int) -> None:
        """Whatever is asked: a budget at the start and one a day."""
        choose, budget = random.Random(seed), WriteBudget(DAILY, index, clock)
        began, written = clock.now, 0
        for _ in range(2000):
            clock.now += choose.randrange(300)
            nbytes = choose.randrange(1, DAILY // 20)
            if budget.admits(name(choose.randrange(50)), nbytes):
                budget.spend(nbytes)
                written += nbytes
            assert written <= DAILY * (1 + (clock.now - began) / DAY_S) + 1

    def test_a_restart_keeps_what_was_spent(self, tmp_path: Path, clock: Clock) -> None:
        """And the time in between brings bytes back."""
        for seconds, spent, left in ((0, 50_000, 36_400), (100, 0, 36_500), (0, 100_000, -63_500)):
            index = Index(tmp_path / "index.sqlite")
            clock.now += seconds
            budget = WriteBudget(DAILY, index, clock)
            budget.spend(spent)
            assert budget.left_bytes == max(0, left)
            index.write_notes()
            index.close()
        index = Index(tmp_path / "index.sqlite")
        clock.now += 63_600
        assert WriteBudget(DAILY, index, clock).left_bytes == 100
        clock.now += DAY_S
        assert WriteBudget(DAILY, index, clock).left_bytes == DAILY
        clock.now -= 20 * DAY_S
        assert WriteBudget(DAILY, index, clock).left_bytes == 0, "a clock that was set back brings nothing"
        index.close()

    def test_another_budget_after_a_restart(self, index: Index, clock: Clock) -> None:
        WriteBudget(DAILY, index, clock).spend(80_000)
        assert WriteBudget(2 * DAILY, index, clock).left_bytes == 2 * DAILY - 80_000
        assert WriteBudget(DAILY // 2, index, clock).left_bytes == 0

    @pytest.mark.parametrize(
        "change", ["spent = 7", "spent = 'x'", "at = at + 1", "at = 0.5", "seal = x'00'"]
    )
    def test_a_note_that_makes_no_sense_says_nothing(self, index: Index, clock: Clock, change: str) -> None:
        WriteBudget(DAILY, index, clock).spend(80_000)
        index.write_notes()
        assert index._db.run(f"UPDATE wear SET {change}") == 1
        assert WriteBudget(DAILY, index, clock).left_bytes == DAILY

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), IndexDamaged("malformed")])
    def test_an_index_that_fails_ends_nothing(
        self,
        index: Index,
        clock: Clock,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        error: Exception,
    ) -> None:
        def fail(*_: object) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(index, "spent", fail)
            budget = WriteBudget(DAILY, index, clock)
            budget.spend(1000)
        assert budget.left_bytes == DAILY - 1000
        assert "not known" in caplog.text


def test_a_note_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = CompactionRig(tmp_path)
    budget = WriteBudget(DAILY, rig.tier.index, rig.clock)
    budget.spend(1000)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr("spilld.offload.disk.index.database.Database.transaction", fail)
        rig.tier.write_notes()
    assert "not noted" in caplog.text
    assert budget.left_bytes == DAILY - 1000
    assert rig.tier.index.spent() == (0, 0)
    rig.close()


def test_moves_count_and_wait_while_little_is_left(tmp_path: Path) -> None:
    rig = CompactionRig(tmp_path)
    runs = rig.sparse()
    budget = WriteBudget(3 * RUN_BYTES, rig.tier.index, rig.clock)
    rig.compaction.close()
    rig.compaction = Compaction(rig.tier, rig.cache, WIDEST, FAST, rig.clock, wear=budget)
    assert rig.compact() == 2
    assert budget.left_bytes == RUN_BYTES
    rig.clock.now += DAY_S / 3
    assert rig.compact() == 1
    assert rig.tier.hole_bytes == 0
    rig.check(runs)
    rig.close()
