"""Who has had how much: the counters alone, against a slow account of the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spilld.daemon.ledger import Ledger, shares


def test_a_newcomer_begins_with_the_least_of_those_who_are_there() -> None:
    ledger = Ledger()
    for client, seconds in (("a", 5.0), ("b", 7.0)):
        ledger.enter(client)
        ledger.charge(client, seconds - ledger.had(client))
    ledger.enter("c")
    assert ledger.had("c") == 5.0


def test_time_left_to_others_is_not_owed() -> None:
    ledger = Ledger()
    ledger.enter("a")
    ledger.enter("b")
    ledger.leave("b")
    ledger.charge("a", 9.0)
    ledger.enter("b")
    assert ledger.had("b") == 9.0


def test_who_had_more_is_not_forgiven_by_leaving() -> None:
    ledger = Ledger()
    ledger.enter("a")
    ledger.enter("b")
    ledger.charge("b", 9.0)
    ledger.leave("b")
    ledger.enter("b")
    assert (ledger.had("a"), ledger.had("b")) == (0.0, 9.0)


def test_an_idle_time_keeps_what_was() -> None:
    ledger = Ledger()
    ledger.enter("a")
    ledger.charge("a", 3.0)
    ledger.leave("a")
    ledger.enter("b")
    assert ledger.had("b") == 3.0


def test_connections_that_come_and_go_are_forgotten() -> None:
    ledger = Ledger()
    for number in range(1000):
        ledger.enter(str(number))
        ledger.charge(str(number), 1.0)
        ledger.leave(str(number))
    assert len(ledger._had) <= 1


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
