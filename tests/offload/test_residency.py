"""The planner of spills, a pure function, against a search for what it could have done."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from spilld.offload.host.residency import Holding, Spill, plan


@st.composite
def holdings(draw: st.DrawFn) -> Holding:
    """Up to five spans of up to 9 blocks, with gaps between them."""
    spans: list[range] = []
    at = 1
    for gap, length in draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), max_size=5)):
        spans.append(range(at + gap, at + gap + length))
        at += gap + length
    return Holding(tuple(spans), idle=draw(st.booleans()))


HOLDINGS = st.lists(holdings(), max_size=5)
COLUMNS = st.integers(0, 60)
RUN = st.integers(1, 6)


def size(spans: list[range]) -> int:
    return sum(map(len, spans))


def without(spans: list[range], first: int, count: int) -> list[range]:
    """The spans less blocks [first, first + count), which must lie in one of them."""
    taken = range(first, first + count)
    left: list[range] = []
    inside = False
    for span in spans:
        if span.start <= taken.start and taken.stop <= span.stop:
            inside = True
            pieces = (range(span.start, taken.start), range(taken.stop, span.stop))
            left += [piece for piece in pieces if len(piece)]
        else:
            left.append(span)
    assert inside, f"{taken} is in none of {spans}"
    return left


def whole_runs(spans: list[range], run: int) -> int:
    return sum(len(span) // run for span in spans)


@given(HOLDINGS, COLUMNS, RUN)
def test_it_frees_enough_or_everything(given: list[Holding], columns: int, run: int) -> None:
    spills = plan(given, columns, run)
    everything = sum(size(list(holding.blocks)) for holding in given)
    assert sum(spill.count for spill in spills) >= min(columns, everything)
    assert sum(spill.count for spill in spills[:-1]) < max(1, columns), "one spill fewer was enough"


@given(HOLDINGS, COLUMNS, RUN)
def test_spills_are_disjoint_runs_inside_the_spans(given: list[Holding], columns: int, run: int) -> None:
    left = [list(holding.blocks) for holding in given]
    for spill in plan(given, columns, run):
        assert 1 <= spill.count <= run
        left[spill.holding] = without(left[spill.holding], spill.first, spill.count)


@given(HOLDINGS, COLUMNS, RUN)
def test_every_spill_is_the_best_there_is(given: list[Holding], columns: int, run: int) -> None:
    """Brute force: at each spill, look at all sequences and all spans for what the rules prefer."""
    left = [list(holding.blocks) for holding in given]
    for spill in plan(given, columns, run):
        whole = [i for i, spans in enumerate(left) if whole_runs(spans, run)]
        idle = [i for i, spans in enumerate(left) if spans and given[i].idle]
        able = whole or idle or [i for i, spans in enumerate(left) if spans]
        assert spill.holding in able
        assert size(left[spill.holding]) == max(size(left[i]) for i in able)
        possible = [span for span in left[spill.holding] if not whole or len(span) >= run]
        assert spill.first == min(span.start for span in possible), "the oldest goes first"
        assert spill.count == (run if whole else len(possible[0]))
        left[spill.holding] = without(left[spill.holding], spill.first, spill.count)


@given(HOLDINGS, COLUMNS, RUN)
def test_runs_are_as_few_as_the_spans_allow(given: list[Holding], columns: int, run: int) -> None:
    """Whole runs come before short ones, so short ones mean that there is no whole one left anywhere."""
    spills = plan(given, columns, run)
    assert all(a.count == run or b.count < run for a, b in pairwise(spills))
    available = sum(whole_runs(list(holding.blocks), run) for holding in given)
    assert sum(spill.count == run for spill in spills) == min(available, -(-columns // run))


@given(HOLDINGS, COLUMNS, RUN)
def test_running_sequences_give_short_runs_only_when_no_idle_one_can(
    given: list[Holding], columns: int, run: int
) -> None:
    short = [spill for spill in plan(given, columns, run) if spill.count < run]
    assert all(given[a.holding].idle or not given[b.holding].idle for a, b in pairwise(short))


@given(HOLDINGS, COLUMNS, RUN)
def test_the_same_question_has_the_same_answer(given: list[Holding], columns: int, run: int) -> None:
    """A plan is repeatable, and asking for more only goes on from it."""
    spills = plan(given, columns, run)
    assert plan(given, columns, run) == spills
    assert plan(given, columns + 1, run)[: len(spills)] == spills


def test_nothing_is_spilled_for_nothing() -> None:
    full = Holding((range(1, 100),))
    assert plan([full], 0, 4) == []
    assert plan([full], -5, 4) == []
    assert plan([], 5, 4) == []
    assert plan([Holding(())], 5, 4) == []


def test_the_fullest_gives_whole_runs_first_whether_idle_or_not() -> None:
    idle, running = Holding((range(1, 9),), idle=True), Holding((range(1, 13),))
    assert plan([idle, running], 16, 4) == [
        Spill(1, 1, 4),
        Spill(0, 1, 4),  # a tie goes to the one that was there first
        Spill(1, 5, 4),
        Spill(0, 5, 4),
    ]


def test_short_runs_come_from_idle_sequences_first() -> None:
    running, idle = Holding((range(1, 4),)), Holding((range(1, 2), range(7, 8)), idle=True)
    assert plan([running, idle], 2, 4) == [Spill(1, 1, 1), Spill(1, 7, 1)]
    assert plan([running, idle], 3, 4) == [Spill(1, 1, 1), Spill(1, 7, 1), Spill(0, 1, 3)]


def test_an_older_span_that_is_too_short_is_skipped_for_a_whole_run() -> None:
    assert plan([Holding((range(1, 3), range(5, 10)))], 5, 4) == [Spill(0, 5, 4), Spill(0, 1, 2)]
