"""Space in segment files against a list of ranges: pure, no files."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spilld.offload.disk.files.segment import Range, SegmentSpace
from spilld.offload.errors import TierFull

PAGE = 4096


class SpaceMachine(RuleBasedStateMachine):
    """A caller whose files sometimes refuse to shrink. `files` is what du would say."""

    def __init__(self) -> None:
        super().__init__()
        self.space = SegmentSpace(budget_bytes=40 * PAGE + 100, segment_bytes=16 * PAGE)
        self.taken: list[Range] = []
        self.files: dict[int, int] = {}
        self.units: dict[int, int] = {}

    @rule(nbytes=st.integers(1, 20 * PAGE))
    def take(self, nbytes: int) -> None:
        pages = -(-nbytes // PAGE)
        try:
            found = self.space.find(nbytes)
        except TierFull:
            assert self._longest_hole(pages * PAGE) < pages
            assert sum(self.files.values()) + pages * PAGE > self.space.budget_bytes
            return
        assert found.nbytes == pages * PAGE
        if self._empty(found.segment):
            self.units[found.segment] = found.nbytes
        assert self.units[found.segment] == found.nbytes
        self.files[found.segment] = max(self.files.get(found.segment, 0), found.end)
        self.space.take(found)
        self.taken.append(found)

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), shrinks=st.booleans())
    def give_back(self, data: st.DataObject, shrinks: bool) -> None:
        place = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.space.give_back(place)
        with pytest.raises(ValueError, match=r"twice|no segment"):
            self.space.give_back(place)
        spare = self.space.spare(place.segment)
        last = max((p.end for p in self.taken if p.segment == place.segment), default=0)
        assert spare == last
        if shrinks and spare < self.files[place.segment]:
            self.space.cut(place.segment)
            self.files[place.segment] = spare
            if not spare:
                del self.files[place.segment], self.units[place.segment]

    @precondition(lambda self: self.taken)
    @rule(most=st.integers(1, 20))
    def move(self, most: int) -> None:
        """Moving ends, each move makes one file shorter and none longer, and at the end no hole fits."""
        for _ in range(most):
            moves = dict(self.space.moves())
            if not moves:
                assert not any(self._inner_hole(number) for number in self.files)
                return
            number, hole = next(iter(moves.items()))
            last = max((p for p in self.taken if p.segment == number), key=lambda place: place.offset)
            before = self.space.sizes()
            self.space.take(hole)
            self.space.give_back(last)
            self.space.cut(number)
            self.taken[self.taken.index(last)] = hole
            after = self.space.sizes()
            assert last.nbytes == hole.nbytes
            assert after.get(number, 0) < before.pop(number)
            assert all(after[other] == nbytes for other, nbytes in before.items())
            self.files = after

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def take_again(self, data: st.DataObject) -> None:
        with pytest.raises(ValueError, match="not free"):
            self.space.take(data.draw(st.sampled_from(self.taken)))

    @invariant()
    def the_books_are_right(self) -> None:
        self.space.check_integrity(self.taken)
        assert self.space.sizes() == self.files
        assert self.space.used_bytes == sum(self.files.values()) <= self.space.budget_bytes
        assert self.space.hole_bytes == sum(self.files.values()) - sum(p.nbytes for p in self.taken)

    def _inner_hole(self, segment: int) -> bool:
        """Whether a range fits before the last one of its file."""
        ends = sorted((p.offset, p.end) for p in self.taken if p.segment == segment)
        return any(a > b for (_, b), (a, _) in itertools.pairwise([(0, 0), *ends]))

    def _empty(self, segment: int) -> bool:
        return not any(place.segment == segment for place in self.taken)

    def _longest_hole(self, unit: int) -> int:
        """Pages of the longest hole in a file for ranges of this size."""
        used = {(p.segment, at) for p in self.taken for at in range(p.offset, p.end, PAGE)}
        longest = 0
        for segment, size in self.files.items():
            if self.units[segment] != unit and not self._empty(segment):
                continue
            hole = 0
            for at in range(0, size, PAGE):
                hole = 0 if (segment, at) in used else hole + 1
                longest = max(longest, hole)
        return longest

    def teardown(self) -> None:
        for place in self.taken:
            self.space.give_back(place)
        for number in list(self.space.sizes()):
            assert self.space.spare(number) == 0
            self.space.cut(number)
        assert self.space.used_bytes == 0


SpaceMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSpace = SpaceMachine.TestCase


def test_a_run_longer_than_a_segment_has_one_of_its_own() -> None:
    space = SegmentSpace(budget_bytes=100 * PAGE, segment_bytes=4 * PAGE)
    for nbytes, segment in ((PAGE, 0), (9 * PAGE, 1), (PAGE, 0), (4 * PAGE, 2), (9 * PAGE, 3)):
        found = space.find(nbytes)
        assert found.segment == segment
        space.take(found)
    assert space.sizes() == {0: 2 * PAGE, 1: 9 * PAGE, 2: 4 * PAGE, 3: 9 * PAGE}


def test_a_hole_takes_the_next_of_its_size_before_a_file_grows() -> None:
    space = SegmentSpace(budget_bytes=100 * PAGE)
    places = []
    for _ in range(5):
        places.append(space.find(2 * PAGE))
        space.take(places[-1])
    for i in (1, 3, 2):
        space.give_back(places[i])
    for i in (1, 2, 3):
        assert space.find(2 * PAGE) == places[i]
        space.take(places[i])
    assert space.find(2 * PAGE) == Range(0, 10 * PAGE, 2 * PAGE)


def test_ranges_of_another_size_lie_elsewhere() -> None:
    """Else what is evicted between them would leave holes that nothing fits."""
    space = SegmentSpace(budget_bytes=14 * PAGE)
    first, second, third = Range(0, 0, 4 * PAGE), Range(0, 4 * PAGE, 4 * PAGE), Range(1, 0, 6 * PAGE)
    for place in (first, second, third):
        assert space.find(place.nbytes) == place
        space.take(place)
    space.give_back(first)
    with pytest.raises(TierFull):
        space.find(2 * PAGE)
    space.give_back(second)
    assert space.find(2 * PAGE) == Range(0, 0, 2 * PAGE), "an empty file is for any size"


def test_a_file_that_could_not_shrink_is_filled_from_its_free_tail() -> None:
    space = SegmentSpace(budget_bytes=10 * PAGE)
    first, second = Range(0, 0, 4 * PAGE), Range(0, 4 * PAGE, 4 * PAGE)
    space.take(first)
    space.take(second)
    space.give_back(second)
    assert space.find(4 * PAGE) == second
    space.take(second)
    assert space.sizes() == {0: 8 * PAGE}
    space.check_integrity([first, second])


def test_find_promises_nothing_until_take() -> None:
    space = SegmentSpace(budget_bytes=2 * PAGE)
    assert space.find(PAGE) == space.find(PAGE)
    assert space.used_bytes == 0


def test_a_file_that_could_not_be_cut_has_no_run_to_move() -> None:
    space = SegmentSpace(1 << 20, segment_bytes=1 << 20)
    places = []
    for _ in range(3):
        places.append(space.find(PAGE))
        space.take(places[-1])
    for place in places:
        space.give_back(place)
    assert list(space.moves()) == []
