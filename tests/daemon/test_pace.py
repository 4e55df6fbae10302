"""How long chunks may be: the arithmetic, and a machine that is learnt."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spilld.scheduler.prefill_budget import LEAST, PrefillBudget

GAP_S = 0.25


@given(
    position=st.integers(0, 10**6),
    budget=st.floats(0.0, 1e6),
    balance=st.floats(1.0, 1e6) | st.just(math.inf),
)
def test_the_longest_chunk_that_costs_no_more(position: int, budget: float, balance: float) -> None:
    prefill = PrefillBudget(GAP_S, balance)
    tokens = prefill.tokens(position, budget)
    assert prefill.cost(position, tokens) <= budget * (1 + 1e-9)
    assert prefill.cost(position, tokens + 2) > budget


def test_a_chunk_costs_what_its_pairs_and_products_do() -> None:
    prefill = PrefillBudget(GAP_S, 1000.0)
    assert prefill.cost(0, 100) == pytest.approx(105.0)
    assert prefill.cost(1000, 100) == pytest.approx(205.0)
    assert sum(prefill.cost(start, 10) for start in range(0, 100, 10)) == pytest.approx(prefill.cost(0, 100))


def test_nothing_is_known_before_the_first_step() -> None:
    assert PrefillBudget(GAP_S, 1000.0).of_a_step == 0.0
    assert PrefillBudget(GAP_S, 1000.0).tokens(0, -1.0) == 0


@pytest.mark.parametrize("fixed_s", [0.0, 0.02, 0.15])
def test_it_settles_where_the_gap_is_kept(fixed_s: float) -> None:
    """A machine whose steps take a fixed time besides, prefilling 8,000 tokens beside a decode."""
    prefill, position, gaps = PrefillBudget(GAP_S, 3000.0), 0, []
    while position < 8000:
        tokens = max(LEAST, min(512, prefill.tokens(position, prefill.of_a_step)))
        seconds = fixed_s + prefill.cost(position, tokens) / 1500
        prefill.took([(position, tokens)], seconds)
        position += tokens
        gaps.append(seconds)
    assert max(gaps) < 1.2 * GAP_S
    assert sorted(gaps)[len(gaps) // 2] > 0.8 * GAP_S, "the time that there is, is used"


def test_a_machine_that_swings_keeps_the_gap() -> None:
    """Steps take up to a fifth longer or shorter than the mean, as beside other processes."""
    prefill, draw, gaps = PrefillBudget(GAP_S, math.inf), random.Random(1), []
    for _ in range(400):
        tokens = max(LEAST, prefill.tokens(0, prefill.of_a_step))
        seconds = tokens / 1500 * draw.uniform(0.8, 1.2)
        prefill.took([(0, tokens)], seconds)
        gaps.append(seconds)
    gaps.sort()
    assert gaps[-4] < 1.2 * GAP_S, "the 99th percentile"
    assert gaps[len(gaps) // 2] > 0.7 * GAP_S


def test_a_machine_that_slows_down_is_followed() -> None:
    prefill = PrefillBudget(GAP_S, math.inf)
    gaps = []
    for step in range(40):
        tokens = max(LEAST, prefill.tokens(0, prefill.of_a_step))
        seconds = tokens / (2000 if step < 20 else 500)
        prefill.took([(0, tokens)], seconds)
        gaps.append(seconds)
    assert max(gaps[25:]) < 1.2 * GAP_S
