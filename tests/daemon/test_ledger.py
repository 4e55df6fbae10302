"""Who has had how much: the counters alone, against a slow account of the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spilld.protocol.messages import PRIORITIES
from spilld.scheduler.fair_share import (
    WEIGHTS,
    FairShare,
    Flow,
    shares,
)

A, B, C = Flow("a"), Flow("b"), Flow("c")


def test_a_newcomer_begins_with_the_least_of_those_who_are_there() -> None:
    fair = FairShare()
    for client, seconds in ((A, 5.0), (B, 7.0)):
        fair.enter(client)
        fair.charge(client, seconds - fair.used(client))
    fair.enter(C)
    assert fair.used(C) == 5.0


def test_time_left_to_others_is_not_owed() -> None:
    fair = FairShare()
    fair.enter(A)
    fair.enter(B)
    fair.leave(B)
    fair.charge(A, 9.0)
    fair.enter(B)
    assert fair.used(B) == 9.0


def test_who_had_more_is_not_forgiven_by_leaving() -> None:
    fair = FairShare()
    fair.enter(A)
    fair.enter(B)
    fair.charge(B, 9.0)
    fair.leave(B)
    fair.enter(B)
    assert (fair.used(A), fair.used(B)) == (0.0, 9.0)


def test_time_counts_the_less_the_higher_the_priority() -> None:
    fair = FairShare()
    low, high = Flow("a", "low"), Flow("b", "high")
    for flow in (low, high):
        fair.enter(flow)
    for flow in (low, high):
        fair.charge(flow, 4.0)
    assert fair.used(low) == pytest.approx(64 * fair.used(high))
    assert fair.owed(low, high) == pytest.approx(8 * 32.0 - 4.0)
    assert fair.owed(high, low) < 0


def test_every_priority_of_the_protocol_has_a_weight() -> None:
    assert tuple(WEIGHTS) == PRIORITIES
    assert sorted(WEIGHTS.values()) == list(WEIGHTS.values())


def test_an_idle_time_keeps_what_was() -> None:
    fair = FairShare()
    fair.enter(A)
    fair.charge(A, 3.0)
    fair.leave(A)
    fair.enter(B)
    assert fair.used(B) == 3.0


def test_connections_that_come_and_go_are_forgotten() -> None:
    fair = FairShare()
    for number in range(1000):
        fair.enter(Flow(str(number)))
        fair.charge(Flow(str(number)), 1.0)
        fair.leave(Flow(str(number)))
    assert len(fair._used) <= 1


@given(
    seconds=st.floats(0.001, 100.0),
    waited=st.floats(0.0, 200.0),
    parts=st.lists(st.tuples(st.floats(0.1, 1e6), st.integers(0, 10**9)), min_size=1, max_size=16),
)
def test_a_step_is_paid_for_wholly(seconds: float, waited: float, parts: list[tuple[float, int]]) -> None:
    costs, reads = [cost for cost, _ in parts], [nbytes for _, nbytes in parts]
    paid = shares(seconds, waited, costs, reads)
    assert sum(paid) == pytest.approx(seconds)
    assert min(paid) >= 0


def test_who_reads_pays_for_the_wait() -> None:
    assert shares(10.0, 6.0, [1.0, 1.0], [300, 100]) == pytest.approx([2.0 + 4.5, 2.0 + 1.5])
    assert shares(10.0, 6.0, [1.0, 3.0], [0, 0]) == pytest.approx([2.5, 7.5])
