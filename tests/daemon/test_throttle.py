"""Token buckets, against ones that count their tokens."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from spilld.server.rate_limit import PRUNE, Throttle

RATES = [0.25, 0.5, 1.0, 2.0, 4.0, 32.0]
"""Powers of two, and times in 64ths: floats are exact."""


@dataclass
class Bucket:
    rate: float
    tokens: float
    seen: float

    def take(self, now: float) -> bool:
        most = max(1.0, self.rate)
        self.tokens = min(most, self.tokens + (now - self.seen) * self.rate)
        self.seen = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class ThrottleMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.throttle = Throttle()
        self.buckets: dict[str, Bucket] = {}
        self.now = 1000.0

    @rule(which=st.integers(0, len(RATES) - 1), times=st.integers(1, 40))
    def take(self, which: int, times: int) -> None:
        rate, name = RATES[which], str(which)
        bucket = self.buckets.setdefault(name, Bucket(rate, max(1.0, rate), self.now))
        for _ in range(times):
            assert self.throttle.take(name, rate, self.now) == bucket.take(self.now)

    @rule(ticks=st.integers(1, 640))
    def wait(self, ticks: int) -> None:
        self.now += ticks / 64

    @rule()
    def forget(self) -> None:
        """Whoever has a full bucket may be forgotten."""
        self.throttle._prune(self.now)
        kept = set(self.throttle._full_at)
        for name, bucket in self.buckets.items():
            tokens = bucket.tokens + (self.now - bucket.seen) * bucket.rate
            assert (name in kept) == (tokens < max(1.0, bucket.rate))

    @invariant()
    def names_are_those_that_took(self) -> None:
        assert len(self.throttle) <= len(self.buckets)


TestThrottle = ThrottleMachine.TestCase


@given(rate=st.floats(0.01, 1e6), gaps=st.lists(st.floats(0, 3), max_size=60), burst=st.integers(1, 20))
def test_never_more_than_a_second_and_the_rate(rate: float, gaps: list[float], burst: int) -> None:
    """In any time t, at most a bucket and t times the rate."""
    throttle, now, taken = Throttle(), 5.0, 0
    for gap in [0.0, *gaps]:
        now += gap
        taken += sum(throttle.take("a", rate, now) for _ in range(burst))
        assert taken <= max(1.0, rate) + rate * (now - 5.0) + 1e-3
    assert taken >= 1
    assert throttle.take("b", rate, now), "one name does not take from another"


@given(before=st.sampled_from(RATES), after=st.sampled_from(RATES))
def test_a_rate_that_changes(before: float, after: float) -> None:
    """What was taken is taken, and the rest comes by the new rate."""
    throttle, now = Throttle(), 1000.0
    taken = int(max(1.0, before))
    assert all(throttle.take("a", before, now) for _ in range(taken))
    left = max(0, int(max(1.0, after)) - taken)
    assert all(throttle.take("a", after, now) for _ in range(left))
    for _ in range(3):
        assert not throttle.take("a", after, now)
        now += 1 / after
        assert throttle.take("a", after, now)


def test_many_names_come_and_go() -> None:
    throttle = Throttle()
    for number in range(50_000):
        assert throttle.take(str(number).encode(), 1000.0, number / 100)
        assert len(throttle) <= PRUNE + 1
