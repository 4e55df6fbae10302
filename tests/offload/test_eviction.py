"""Who is evicted: what both policies promise, with a dict as the oracle, and what each does by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from copy import deepcopy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from lru import Lru

from spilld.offload.prefix_cache.eviction import Eviction, Policy, S3Fifo
from spilld.offload.prefix_cache.eviction_queue import CacheEntry, EvictionQueue

Make = Callable[[], Policy]
Evictable = Callable[[bytes, Set[bytes]], bool]
"""(key, going): may it go once going are gone?"""
POLICIES = [S3Fifo, Lru]
EVERYTHING = 1 << 40


def key(n: int) -> bytes:
    return n.to_bytes(16, "big")


def content(n: int) -> bytes:
    return b"content of %d" % n


def anyone(_: bytes, __: Set[bytes]) -> bool:
    return True


def all_but(*pinned: int) -> Callable[[bytes, Set[bytes]], bool]:
    keys = set(map(key, pinned))
    return lambda k, going: k not in keys


def leaves(parents: Mapping[int, int]) -> Callable[[bytes, Set[bytes]], bool]:
    """Those that have no children (child: parent), or only such as are going."""
    return lambda k, going: all(key(c) in going for c, parent in parents.items() if key(parent) == k)


def filled(policy: Make, numbers: Iterable[int], nbytes: int = 10) -> Eviction:
    eviction = Eviction(policy)
    for n in numbers:
        eviction.insert(key(n), nbytes, content(n))
    return eviction


def hit(eviction: Eviction, *numbers: int) -> None:
    for n in numbers:
        eviction.hit(key(n))


def evict_keys(eviction: Eviction, needed: int, evictable: Evictable = anyone) -> list[bytes]:
    """Take entries until so many bytes are free, or none may go; what may not is held meanwhile."""
    gone: list[bytes] = []
    while needed > 0:
        for k in eviction._entries:
            (eviction.release if evictable(k, set(gone)) else eviction.hold)(k)
        if (entry := eviction.take()) is None:
            break
        gone.append(entry.key)
        needed -= entry.nbytes
    for k in eviction._entries:
        eviction.release(k)
    return gone


def evict(eviction: Eviction, needed: int, evictable: Evictable = anyone) -> list[int]:
    return [int.from_bytes(k, "big") for k in evict_keys(eviction, needed, evictable)]


def victims(eviction: Eviction, needed: int, evictable: Evictable = anyone) -> list[bytes]:
    """What evict_keys would take: it is asked of a copy."""
    return evict_keys(deepcopy(eviction), needed, evictable)


def order(eviction: Eviction, evictable: Evictable = anyone, needed: int = EVERYTHING) -> list[int]:
    """The numbers of the victims."""
    return [int.from_bytes(k, "big") for k in victims(eviction, needed, evictable)]


def evict_only(eviction: Eviction, k: bytes) -> None:
    """As if it were the only one that may go."""
    assert evict_keys(eviction, 1, lambda other, _: other == k) == [k]


@pytest.mark.parametrize("policy", POLICIES)
class TestContract:
    def test_it_counts_entries_and_bytes(self, policy: Make) -> None:
        eviction = Eviction(policy)
        assert (len(eviction), eviction.used_bytes) == (0, 0)
        eviction.insert(key(1), 7, content(1))
        eviction.insert(key(2), 5, content(2), priority=3)
        eviction.insert(key(3), 1, content(3), priority=-1)
        assert (len(eviction), eviction.used_bytes) == (3, 13)
        eviction.remove(key(1))
        assert (len(eviction), eviction.used_bytes) == (2, 6)
        eviction.prioritise(key(2), -1)
        assert (len(eviction), eviction.used_bytes) == (2, 6)
        evict_only(eviction, key(2))
        assert (len(eviction), eviction.used_bytes) == (1, 1)
        eviction.check_integrity()

    def test_an_empty_one_has_no_victims(self, policy: Make) -> None:
        assert Eviction(policy).take() is None

    def test_nothing_is_evicted_for_nothing(self, policy: Make) -> None:
        eviction = filled(policy, range(3))
        assert victims(eviction, 0) == []
        assert victims(eviction, -5) == []

    def test_victims_are_just_enough(self, policy: Make) -> None:
        eviction = filled(policy, range(5))
        assert order(eviction, needed=1) == [0]
        assert order(eviction, needed=10) == [0]
        assert order(eviction, needed=11) == [0, 1]
        assert order(eviction, needed=50) == order(eviction, needed=EVERYTHING) == [0, 1, 2, 3, 4]

    def test_asking_while_all_are_held_changes_nothing(self, policy: Make) -> None:
        eviction = filled(policy, range(6))
        hit(eviction, 0, 0, 0, 1, 3, 3)
        once = order(eviction)
        for n in range(6):
            eviction.hold(key(n))
        assert eviction.take() is None
        for n in range(6):
            eviction.release(key(n))
        assert order(eviction) == once
        assert len(eviction) == 6
        assert eviction.used_bytes == 60
        assert sorted(once) == list(range(6))

    def test_after_a_failure_half_way_the_rest_is_still_there(self, policy: Make) -> None:
        eviction = filled(policy, range(6))
        hit(eviction, 0, 0, 0, 1, 3, 3)
        wanted = victims(eviction, 40)
        assert evict_keys(eviction, 10) == wanted[:1]
        assert victims(eviction, 30) == wanted[1:]
        assert sorted(order(eviction)) == sorted(set(range(6)) - {int.from_bytes(wanted[0], "big")})

    def test_a_pinned_entry_stays_and_keeps_its_place(self, policy: Make) -> None:
        eviction = filled(policy, range(4))
        assert evict(eviction, 20, all_but(0, 2)) == [1, 3]
        assert order(eviction, all_but(0, 2)) == []
        assert order(eviction) == [0, 2]

    def test_a_chain_goes_from_its_end(self, policy: Make) -> None:
        eviction = filled(policy, range(6))
        chains = {1: 0, 2: 1, 4: 3, 5: 4}
        assert order(eviction, leaves(chains)) == [2, 1, 0, 5, 4, 3]
        assert evict(eviction, 35, leaves(chains)) == [2, 1, 0, 5]

    def test_an_ancestor_stays_while_a_child_is_pinned(self, policy: Make) -> None:
        eviction = filled(policy, range(4))
        chains = leaves({1: 0, 2: 0, 3: 2})
        assert order(eviction, lambda k, going: k != key(3) and chains(k, going)) == [1]

    def test_lower_priorities_go_first_whatever_their_age_and_use(self, policy: Make) -> None:
        eviction = Eviction(policy)
        for n, priority in enumerate([2, 0, 1, -1, 0, 2]):
            eviction.insert(key(n), 10, content(n), priority)
        hit(eviction, 1, 3, 3, 3)
        found = order(eviction)
        assert found[0] == 3
        assert sorted(found[1:3]) == [1, 4]
        assert found[3:] == [2, 0, 5]

    def test_a_pinned_lower_priority_does_not_protect_higher_ones(self, policy: Make) -> None:
        eviction = Eviction(policy)
        eviction.insert(key(0), 10, content(0), priority=0)
        eviction.insert(key(1), 10, content(1), priority=1)
        assert order(eviction, all_but(0)) == [1]

    def test_a_priority_can_be_changed(self, policy: Make) -> None:
        eviction = filled(policy, range(3))
        eviction.prioritise(key(0), 1)
        assert order(eviction) == [1, 2, 0]
        eviction.prioritise(key(2), -1)
        assert order(eviction) == [2, 1, 0]
        eviction.check_integrity()

    def test_a_change_of_priority_counts_as_a_use(self, policy: Make) -> None:
        eviction = filled(policy, range(3))
        eviction.prioritise(key(0), 0)
        assert order(eviction) == [0, 1, 2], "no change"
        eviction.prioritise(key(0), 1)
        eviction.prioritise(key(0), 0)
        assert order(eviction) == [1, 2, 0]

    def test_an_entry_may_go_without_having_been_a_victim(self, policy: Make) -> None:
        eviction = filled(policy, range(5))
        evict_only(eviction, key(3))
        eviction.remove(key(1))
        assert order(eviction) == [0, 2, 4]

    def test_a_key_is_inserted_once(self, policy: Make) -> None:
        eviction = filled(policy, [1])
        with pytest.raises(ValueError, match="here already"):
            eviction.insert(key(1), 10, content(2))
        assert eviction.used_bytes == 10

    @pytest.mark.parametrize("nbytes", [0, -1])
    def test_an_entry_has_bytes(self, policy: Make, nbytes: int) -> None:
        eviction = Eviction(policy)
        with pytest.raises(ValueError, match="no bytes"):
            eviction.insert(key(1), nbytes, content(1))
        assert len(eviction) == 0

    def test_an_unknown_key_is_an_error(self, policy: Make) -> None:
        eviction = filled(policy, [1])
        eviction.remove(key(1))
        calls: list[Callable[[bytes], None]] = [
            eviction.hit,
            eviction.hold,
            eviction.release,
            eviction.remove,
            lambda k: eviction.prioritise(k, 1),
        ]
        for call in calls:
            with pytest.raises(KeyError):
                call(key(1))
        eviction.check_integrity()


class TestS3Fifo:
    """What the paper says of the queues. 90 bytes in main and 10 in small make the small queue due."""

    def test_one_hit_wonders_leave_without_touching_main(self) -> None:
        eviction = self._with_main(range(9))
        hit(eviction, *range(9))
        for n in range(100, 120):
            eviction.insert(key(n), 10, content(n))
            assert evict(eviction, eviction.used_bytes - 90) == [n]
        self._add_to_main(eviction, 9)
        assert order(eviction) == [9, *range(9)], "the others still have their second chance"

    def test_one_use_is_not_enough_to_leave_the_small_queue(self) -> None:
        eviction = filled(S3Fifo, range(2))
        hit(eviction, 0)
        assert evict(eviction, 10) == [0]

    def test_two_uses_are(self) -> None:
        eviction = filled(S3Fifo, range(2))
        hit(eviction, 0, 0)
        assert evict(eviction, 10) == [1]
        eviction.insert(key(2), 10, content(2))
        assert evict(eviction, 10) == [2], "0 is in the main queue by now"

    def test_promotion_clears_the_frequency(self) -> None:
        eviction = self._with_main([0])
        eviction.insert(key(1), 10, content(1))
        hit(eviction, 0, 1, 1, 1)
        assert order(eviction) == [1, 0], "1 moves behind 0, which has a second chance and 1 has none"

    def test_a_ghost_that_comes_back_under_another_key_goes_to_main(self) -> None:
        eviction = filled(S3Fifo, range(2))
        assert evict(eviction, 10) == [0]
        eviction.insert(key(50), 10, content(0))
        eviction.insert(key(51), 10, content(51))
        assert evict(eviction, 20) == [1, 51], "50 is older than 51, but in main"

    def test_a_ghost_is_known_once(self) -> None:
        eviction = filled(S3Fifo, range(2))
        evict(eviction, 10)
        for again in (50, 51):
            eviction.insert(key(again), 10, content(0))
        assert order(eviction) == [1, 51, 50]

    def test_ghosts_are_as_many_as_entries_and_the_oldest_is_forgotten(self) -> None:
        eviction = filled(S3Fifo, range(9))
        assert evict(eviction, 60) == [0, 1, 2, 3, 4, 5]
        for n in range(6):
            eviction.insert(key(50 + n), 10, content(n))
        assert order(eviction) == [6, 7, 8, 50, 51, 52, 53, 54, 55], "the last four in main"
        hit(eviction, 50, 51, 52)
        assert order(eviction) == [6, 7, 8, 50, 51, 53, 54, 55, 52]

    def test_what_was_removed_is_no_ghost(self) -> None:
        eviction = filled(S3Fifo, range(2))
        eviction.remove(key(0))
        eviction.insert(key(50), 10, content(0))
        eviction.insert(key(51), 10, content(51))
        assert order(eviction) == [1, 50, 51]

    def test_what_leaves_main_is_no_ghost(self) -> None:
        eviction = self._with_main([0, 1])
        assert evict(eviction, 10) == [0]
        eviction.insert(key(50), 10, content(0))
        assert evict(eviction, 10) == [50]

    def test_each_use_up_to_three_is_a_second_chance(self) -> None:
        eviction = self._with_main(range(5))
        hit(eviction, *[0] * 9, *[1] * 3, *[2] * 2, 3)
        assert order(eviction) == [4, 3, 2, 0, 1]

    def test_a_second_chance_is_spent_when_the_hand_passes(self) -> None:
        eviction = self._with_main(range(3))
        hit(eviction, 0)
        assert evict(eviction, 10) == [1]
        self._add_to_main(eviction, 3)
        assert order(eviction) == [2, 0, 3], "0 was passed when 1 went, and is behind 2"

    def test_the_small_queue_is_spared_while_it_is_less_than_a_tenth_of_the_bytes(self) -> None:
        eviction = self._with_main(range(2), nbytes=455)
        eviction.insert(key(50), 100, content(50))
        assert order(eviction, needed=1) == [0]
        eviction.insert(key(51), 2, content(51))
        assert order(eviction, needed=1) == [50]

    def test_a_pinned_entry_in_the_small_queue_is_promoted_but_not_evicted(self) -> None:
        eviction = filled(S3Fifo, range(3))
        hit(eviction, 0, 0)
        assert evict(eviction, 10, all_but(0)) == [1]
        assert order(eviction) == [2, 0]

    def test_when_main_is_pinned_the_small_queue_gives(self) -> None:
        eviction = self._with_main(range(9), nbytes=100)
        eviction.insert(key(50), 1, content(50))
        assert order(eviction, all_but(*range(9))) == [50]
        hit(eviction, 50, 50, 50)
        assert order(eviction, all_but(*range(9))) == [50]

    def test_when_the_small_queue_is_pinned_main_gives(self) -> None:
        eviction = self._with_main(range(2))
        eviction.insert(key(50), 100, content(50))
        hit(eviction, 0, 0, 0)
        assert order(eviction, all_but(50)) == [1, 0]

    def test_a_change_of_priority_leads_to_main(self) -> None:
        eviction = filled(S3Fifo, range(2))
        eviction.prioritise(key(0), 1)
        eviction.prioritise(key(0), 0)
        eviction.insert(key(50), 10, content(50))
        assert order(eviction) == [1, 50, 0]

    def test_each_priority_has_its_own_queues_and_ghosts(self) -> None:
        eviction = filled(S3Fifo, range(2))
        assert evict(eviction, 10) == [0]
        eviction.insert(key(50), 10, content(0), priority=1)
        eviction.insert(key(51), 10, content(51), priority=1)
        assert order(eviction) == [1, 50, 51]

    @classmethod
    def _with_main(cls, numbers: Iterable[int], nbytes: int = 10) -> Eviction:
        eviction = Eviction(S3Fifo)
        for n in numbers:
            cls._add_to_main(eviction, n, nbytes)
        return eviction

    @staticmethod
    def _add_to_main(eviction: Eviction, n: int, nbytes: int = 10) -> None:
        """As a ghost that comes back: another run with its content was inserted, and evicted."""
        eviction.insert(key(1000 + n), nbytes, content(n))
        evict_only(eviction, key(1000 + n))
        eviction.insert(key(n), nbytes, content(n))


class TestLru:
    def test_the_least_recently_used_goes_first(self) -> None:
        eviction = filled(Lru, range(4))
        hit(eviction, 1, 0, 1)
        assert order(eviction) == [2, 3, 0, 1]

    def test_nothing_is_known_of_what_has_gone(self) -> None:
        eviction = filled(Lru, range(3))
        hit(eviction, 0)
        assert evict(eviction, 10) == [1]
        eviction.insert(key(50), 10, content(1))
        assert order(eviction) == [2, 0, 50]


def replay(policy: Make, trace: Iterable[Sequence[int]], quota: int) -> list[int]:
    """How many requests of each round hit; entries have 1 byte, and come back under new keys."""
    eviction = Eviction(policy)
    keys: dict[int, bytes] = {}
    hits = []
    for number, contents in enumerate(trace):
        hits.append(0)
        for i, n in enumerate(contents):
            if n in keys:
                eviction.hit(keys[n])
                hits[-1] += 1
                continue
            for k in evict_keys(eviction, eviction.used_bytes + 1 - quota):
                [gone] = [other for other, held in keys.items() if held == k]
                del keys[gone]
            keys[n] = key(number << 32 | i)
            eviction.insert(keys[n], 1, content(n))
            assert len(eviction) == eviction.used_bytes == len(keys) <= quota
    eviction.check_integrity()
    return hits


def test_a_scan_does_not_wash_out_what_is_used_again() -> None:
    """Rounds of 8 hot entries and 20 that are seen once, with room for 20: LRU never sees a hot one again."""
    trace = [[*range(8), *range(100 + 20 * i, 120 + 20 * i)] for i in range(10)]
    s3fifo, lru = replay(S3Fifo, trace, 20), replay(Lru, trace, 20)
    assert lru == [0] * 10
    assert s3fifo == [0, 0] + [8] * 8, "ghosts of the first round come back in the second, and stay"
    assert sum(s3fifo) > sum(lru)


def examined(policy: Make, numbers: int, hold: Callable[[int], bool]) -> int:
    """How many entries are looked at while every tenth of those that may go leaves, most of them held."""
    eviction = filled(policy, range(numbers))
    for n in range(numbers):
        if hold(n):
            eviction.hold(key(n))
        elif n % 3:
            hit(eviction, n, n)
    free = numbers - sum(map(hold, range(numbers)))
    for _ in range(free // 10):
        assert eviction.take() is not None
    queues = [q for q in vars(eviction._levels[0]).values() if isinstance(q, EvictionQueue)]
    return sum(q.examined for q in queues) // max(1, free // 10)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("hold", [lambda n: False, lambda n: n % 10 > 0], ids=["all free", "most held"])
def test_the_work_for_a_victim_does_not_grow(policy: Make, hold: Callable[[int], bool]) -> None:
    few, many = (examined(policy, numbers, hold) for numbers in (1_000, 20_000))
    assert many <= few + 5 <= 40


def test_what_leaves_without_being_evicted_leaves_no_trace() -> None:
    eviction = filled(S3Fifo, [0])
    for n in range(1, 10_000):
        eviction.insert(key(n), 10, content(n))
        eviction.remove(key(n))
    queues = [q for q in vars(eviction._levels[0]).values() if isinstance(q, EvictionQueue)]
    assert sum(len(q._heap) for q in queues) < 200
    assert order(eviction) == [0]


class EvictionMachine(RuleBasedStateMachine):
    """A caller with chains, leases, priorities, and deletions that fail. A dict is the oracle."""

    policy: Make

    def __init__(self) -> None:
        super().__init__()
        self.eviction = Eviction(self.policy)
        self.entries: dict[bytes, CacheEntry] = {}
        self.parents: dict[bytes, bytes | None] = {}
        self.leased: set[bytes] = set()
        self.next = 0

    def pick(self, which: int) -> bytes | None:
        return list(self.entries)[which % len(self.entries)] if self.entries else None

    def evictable(self, k: bytes, going: Set[bytes]) -> bool:
        children = {c for c, parent in self.parents.items() if parent == k}
        return k not in self.leased and children <= going

    def forget(self, k: bytes) -> None:
        del self.entries[k], self.parents[k]
        self.leased.discard(k)

    @initialize(sizes=st.lists(st.integers(1, 9), max_size=12))
    def begin(self, sizes: list[int]) -> None:
        for i, nbytes in enumerate(sizes):
            self.insert(nbytes, i, 0, i - 1 if i % 3 else None)

    @rule(
        nbytes=st.integers(1, 9),
        what=st.integers(0, 15),
        priority=st.integers(-1, 1),
        parent=st.none() | st.integers(0, 30),
    )
    def insert(self, nbytes: int, what: int, priority: int, parent: int | None) -> None:
        k = key(self.next)
        self.next += 1
        self.parents[k] = None if parent is None else self.pick(parent)
        self.entries[k] = CacheEntry(k, nbytes, content(what), priority)
        self.eviction.insert(k, nbytes, content(what), priority)

    @rule(which=st.integers(0, 30), times=st.integers(1, 4))
    def use(self, which: int, times: int) -> None:
        """A chain, from the end that was picked to its root."""
        k = self.pick(which)
        while k is not None:
            for _ in range(times):
                self.eviction.hit(k)
            k = self.parents[k]

    @rule(which=st.integers(0, 30), priority=st.integers(-1, 1))
    def prioritise(self, which: int, priority: int) -> None:
        if k := self.pick(which):
            old = self.entries[k]
            self.entries[k] = CacheEntry(k, old.nbytes, old.content, priority)
            self.eviction.prioritise(k, priority)

    @rule(which=st.integers(0, 30))
    def lease_or_release(self, which: int) -> None:
        if k := self.pick(which):
            self.leased ^= {k}

    @rule(which=st.integers(0, 30))
    def corrupt(self, which: int) -> None:
        """One is removed, and all that were reached through it."""
        lost = {k} if (k := self.pick(which)) else set()
        while more := {c for c, parent in self.parents.items() if parent in lost} - lost:
            lost |= more
        for k in lost:
            self.eviction.remove(k)
            self.forget(k)

    @rule(needed=st.integers(0, 60), fails_after=st.none() | st.integers(0, 4))
    def evict(self, needed: int, fails_after: int | None) -> None:
        wanted = victims(self.eviction, needed, self.evictable)
        self.judge(wanted, needed)
        assert victims(self.eviction, needed + 5, self.evictable)[: len(wanted)] == wanted
        for i, k in enumerate(wanted):
            if i == fails_after:
                return
            assert evict_keys(self.eviction, 1, self.evictable) == [k]
            needed -= self.entries[k].nbytes
            self.forget(k)
            assert victims(self.eviction, needed, self.evictable) == wanted[i + 1 :]

    @rule(which=st.integers(0, 30))
    def evict_out_of_turn(self, which: int) -> None:
        k = self.pick(which)
        if k is not None and self.evictable(k, set()):
            evict_only(self.eviction, k)
            self.forget(k)

    def judge(self, victims: list[bytes], needed: int) -> None:
        """Enough and no more, or all; each the lowest priority that could go at its turn."""
        sizes = [self.entries[k].nbytes for k in victims]
        going: set[bytes] = set()
        for k in victims:
            able = {other for other in self.entries if other not in going and self.evictable(other, going)}
            assert k in able
            assert self.entries[k].priority == min(self.entries[other].priority for other in able)
            going.add(k)
        if sum(sizes) < needed:
            assert not any(self.evictable(k, going) for k in self.entries.keys() - going)
        assert sum(sizes[:-1]) < max(needed, 1), "one fewer was enough"

    @invariant()
    def the_books_are_right(self) -> None:
        self.eviction.check_integrity()
        assert len(self.eviction) == len(self.entries)
        assert self.eviction.used_bytes == sum(entry.nbytes for entry in self.entries.values())
        everyone = victims(self.eviction, EVERYTHING)
        assert len(everyone) == len(self.entries)
        assert set(everyone) == self.entries.keys()


class S3FifoMachine(EvictionMachine):
    policy = S3Fifo


class LruMachine(EvictionMachine):
    policy = Lru


TestS3FifoMachine = S3FifoMachine.TestCase
TestLruMachine = LruMachine.TestCase
TestS3FifoMachine.settings = TestLruMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
