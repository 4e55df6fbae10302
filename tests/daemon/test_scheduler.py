"""The scheduler, as pure state: no engine, no clock."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spilld.kv.attention_span import CELL
from spilld.scheduler.fair_share import WEIGHTS, Flow, shares
from spilld.scheduler.prefill_budget import LEAST, PrefillBudget
from spilld.scheduler.scheduler import (
    QUANTUM_S,
    Capacity,
    Job,
    Plan,
    Scheduler,
)

PLENTY = Capacity(windows=100, blocks=10**6)


def job(
    number: int,
    known: int,
    position: int = 0,
    chunk: int = 512,
    client: str = "a",
    priority: str = "normal",
    **fields: int,
) -> Job:
    needs = {"window": 1, "blocks": 0, **fields}
    return Job(number, position, known, chunk, bool(needs["window"]), needs["blocks"], Flow(client, priority))


def unhurried() -> PrefillBudget:
    """For which every chunk is short enough."""
    pace = PrefillBudget(1.0, 1e9)
    pace.took([(0, 10**6)], 1.0)
    return pace


def scheduler(
    *jobs: Job, chunk_tokens: int = 512, max_running: int = 16, pace: PrefillBudget | None = None
) -> Scheduler:
    made = Scheduler(chunk_tokens, pace or unhurried(), max_running)
    for each in jobs:
        made.add(each)
    return made


@pytest.mark.parametrize("grid", [64, 128, 256, 300])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside decoding"])
@pytest.mark.parametrize(("known", "alone"), [(1500, 0), (1500, 1), (1537, 6), (2, 1), (65, 0)])
def test_chunks_end_on_the_grid_of_the_model(grid: int, beside: bool, known: int, alone: int) -> None:
    """But where the prompt ends; the last tokens are computed one by one if that is wanted."""
    pace = PrefillBudget(0.001, 1e9)
    pace.took([(0, 40_000)], 1.0)  # 40 tokens beside one that decodes
    made = Scheduler(512, pace, grid=grid)
    made.add(replace(job(1, known), alone=alone))
    if beside:
        made.add(job(2, 10, position=9))
    ends, position = [], 0
    while position < known:
        for number, tokens in planned(made):
            made.advance(number, tokens, int(number == 2))
            position += tokens * (number == 1)
        ends.append(position)
    assert ends[-1] == known
    assert [end for end in ends if end >= known - alone] == [*range(known - alone, known + 1)]
    assert all(end % grid == 0 for end in ends if end < known - alone)


def admitted(scheduler: Scheduler, capacity: Capacity) -> tuple[int, ...]:
    """Start what is admitted; admission itself changes nothing."""
    jobs = scheduler.admit(capacity)
    assert scheduler.admit(capacity) == jobs
    for number in jobs:
        scheduler.start(number)
    return jobs


def planned(scheduler: Scheduler) -> Plan:
    """The next step once all that may run does; to plan it changes nothing."""
    admitted(scheduler, PLENTY)
    plan = scheduler.plan()
    assert scheduler.plan() == plan
    return plan


def test_admission_is_in_order_even_where_a_later_job_would_fit() -> None:
    waiting = scheduler(job(1, 100, blocks=5), job(2, 100, blocks=50), job(3, 100, blocks=1))
    assert admitted(waiting, Capacity(windows=3, blocks=40)) == (1,)
    assert waiting.starved(Capacity(windows=3, blocks=40))
    assert admitted(waiting, Capacity(windows=3, blocks=49)) == ()
    assert admitted(waiting, Capacity(windows=3, blocks=51)) == (2, 3)
    assert (len(waiting.running), waiting.waiting) == (3, 0)


def test_admission_needs_windows_for_new_contexts_only() -> None:
    waiting = scheduler(job(1, 10), job(2, 10, window=0), job(3, 10), job(4, 10, window=0))
    assert admitted(waiting, Capacity(windows=1, blocks=0)) == (1, 2)
    assert waiting.starved(Capacity(windows=0, blocks=0))
    assert admitted(waiting, Capacity(windows=1, blocks=0)) == (3, 4)


def test_a_job_that_waits_for_its_turn_is_not_starved() -> None:
    waiting = scheduler(job(1, 10), job(2, 10), max_running=1)
    assert admitted(waiting, PLENTY) == (1,)
    assert not waiting.starved(Capacity(windows=0, blocks=0))
    assert admitted(waiting, PLENTY) == ()
    waiting.remove(1)
    assert waiting.starved(Capacity(windows=0, blocks=0))
    assert admitted(waiting, PLENTY) == (2,)


def test_prefill_chunks_end_on_the_grid_beside_decodes() -> None:
    running = scheduler(job(1, 700, position=699), job(2, 1000, position=100), job(3, 300))
    assert planned(running) == ((1, 1), (2, 412), (3, 100))
    for number, tokens in ((1, 1), (2, 412), (3, 100)):
        running.advance(number, tokens, sampled=int(number == 1))
    assert planned(running) == ((1, 1), (2, 488), (3, 24))
    running.advance(2, 488, 1)
    running.advance(3, 24, 0)
    running.advance(1, 1, 1)
    assert planned(running) == ((1, 1), (2, 1), (3, 176))


def test_prefill_beside_decodes_is_as_short_as_the_pace_asks() -> None:
    pace = PrefillBudget(0.25, 1e9)
    running = scheduler(job(1, 700, position=699), job(2, 5000), job(3, 5000), pace=pace)
    assert planned(running) == ((1, 1), (2, LEAST)), "nothing is known of the machine"
    pace.took([(0, 400)], 1.0)
    assert planned(running) == ((1, 1), (2, 100))
    running.remove(1)
    assert planned(running) == ((2, 512),), "nobody waits for a token"


def test_a_short_prompt_leaves_its_time_to_the_next() -> None:
    pace = PrefillBudget(0.25, 1e9)
    pace.took([(0, 400)], 1.0)
    running = scheduler(job(1, 700, position=699), job(2, 60), job(3, 5000), pace=pace)
    assert planned(running) == ((1, 1), (2, 60), (3, 40))


def test_a_job_with_small_chunks_leaves_the_budget_to_others() -> None:
    running = scheduler(job(1, 300, chunk=64), job(2, 900))
    assert planned(running) == ((1, 64), (2, 256))


def test_who_has_had_least_is_admitted_first() -> None:
    waiting = scheduler(*(job(n, 100) for n in range(1, 9)), job(9, 100, client="b"), max_running=2)
    assert admitted(waiting, PLENTY) == (1, 9), "a prompt that runs counts before it is computed"
    waiting.charge(1, 1.0)
    waiting.charge(9, 2.0)
    waiting.remove(9)
    waiting.add(job(10, 100, client="b"))
    assert admitted(waiting, PLENTY) == (2,)


def test_the_next_job_is_not_passed_by() -> None:
    waiting = scheduler(job(1, 100, client="a"), job(2, 100, client="b", blocks=50), job(3, 100, client="c"))
    assert admitted(waiting, Capacity(windows=1, blocks=10)) == (1,)
    waiting.charge(1, 5.0)
    assert admitted(waiting, Capacity(windows=5, blocks=10)) == ()
    assert waiting.starved(Capacity(windows=5, blocks=10))
    assert admitted(waiting, Capacity(windows=5, blocks=50)) == (2, 3)


def test_prefills_of_who_has_had_least_come_first() -> None:
    running = scheduler(job(1, 5000, client="a"), job(2, 300, client="b"))
    admitted(running, PLENTY)
    running.charge(1, 1.0)
    assert planned(running) == ((2, 300), (1, 212 // CELL * CELL or 212))


@pytest.mark.parametrize("others", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_greedy_client_gets_its_share_and_no_more(seed: int, others: int) -> None:
    """One client keeps 100 requests of random lengths in line, each other one 10: all are backlogged."""
    draw, pace, numbers = random.Random(seed), PrefillBudget(0.25, 3000.0), count()
    had: dict[str, float] = defaultdict(float)
    shared, jobs, ends = Scheduler(512, pace, max_running=8), dict[int, Job](), dict[int, int]()
    wanted = {"greedy": 100} | {f"other {i}": 10 for i in range(others)}
    for _ in range(6000):
        for client, most in wanted.items():
            for _ in range(most - sum(each.flow.client == client for each in jobs.values())):
                number, known = next(numbers), draw.randint(1, 4000)
                jobs[number], ends[number] = job(number, known, client=client), known + draw.randint(1, 200)
                shared.add(jobs[number])
        run = planned(shared)
        chunks = [(jobs[number].position, tokens) for number, tokens in run]
        costs = [pace.cost(*chunk) for chunk in chunks]
        seconds = 0.01 + sum(costs) / 500
        pace.took(chunks, seconds)
        for (number, tokens), share in zip(run, shares(seconds, 0.0, costs, [0] * len(run)), strict=True):
            had[jobs[number].flow.client] += share
            shared.charge(number, share)
            shared.advance(number, tokens, int(jobs[number].left == tokens))
            if jobs[number].known >= ends[number]:
                shared.remove(number)
                del jobs[number], ends[number]
    fair = sum(had.values()) / len(wanted)
    assert all(abs(part - fair) <= 0.1 * fair for part in had.values()), had


def test_of_two_prefills_that_have_had_as_much_the_older_comes_first() -> None:
    """As in the line: whoever made way and came back is the older one."""
    running = scheduler(job(2, 5000, client="b"), pace=PrefillBudget(0.25, 1e9))
    admitted(running, PLENTY)
    running.add(job(1, 5000, client="a"))
    running.add(job(3, 700, position=699, client="b"))
    assert planned(running) == ((1, LEAST), (3, 1))


def served(flow: Flow, seconds: float, *others: Job) -> Scheduler:
    """One job of a flow runs alone on the only window and has had so much since the others came."""
    made = scheduler(job(0, 10**6, client=flow.client, priority=flow.priority))
    admitted(made, PLENTY)
    made.advance(0, CELL, 0)
    for other in others:
        made.add(other)
    made.charge(0, seconds)
    return made


def test_who_has_had_too_much_makes_way() -> None:
    ahead = job(1, 100, client="b")
    assert served(Flow("a"), QUANTUM_S + 0.1, ahead).to_preempt() == 0
    assert served(Flow("a"), QUANTUM_S - 0.1, ahead).to_preempt() is None
    assert served(Flow("a"), 1000.0, job(1, 100, client="a")).to_preempt() is None, "a client's own line"
    assert served(Flow("a"), 1000.0).to_preempt() is None, "nobody waits"


def test_priority_makes_others_give_way_sooner() -> None:
    high, low = job(1, 100, client="b", priority="high"), job(1, 100, client="b", priority="low")
    assert served(Flow("a"), QUANTUM_S / 7.9, high).to_preempt() == 0
    assert served(Flow("a", "low"), QUANTUM_S / 63, high).to_preempt() == 0
    assert served(Flow("a"), 7.9 * QUANTUM_S, low).to_preempt() is None
    assert served(Flow("a"), 8.1 * QUANTUM_S, low).to_preempt() == 0


def test_a_job_that_cannot_move_does_not() -> None:
    running = served(Flow("a"), 1000.0, job(1, 100, client="b"))
    running.forbid_preemption(0)
    assert running.to_preempt() is None


def test_a_job_runs_some_way_before_it_makes_way() -> None:
    running = scheduler(job(0, 5000))
    admitted(running, PLENTY)
    running.reuse(0, 1000)
    running.add(job(1, 100, client="b"))
    running.charge(0, 1000.0)
    assert running.to_preempt() is None, "nothing was gained"
    running.advance(0, 1, 0)
    assert running.to_preempt() == 0
    running.rewind(0)
    running.advance(0, CELL - 1, 0)
    assert running.to_preempt() is None, "it would be lost"


def test_a_paused_job_is_not_computed_and_makes_way_first() -> None:
    running = scheduler(job(1, 700, position=699), job(2, 700, position=699, client="b"))
    admitted(running, PLENTY)
    running.advance(1, 1, 1)
    running.pause({1, 99})
    assert running.plan() == ((2, 1),)
    running.charge(2, 1.0)
    running.add(job(3, 100, client="a"))
    assert running.to_preempt() == 1
    running.pause(set())
    assert running.to_preempt() is None
    assert set(running.plan()) == {(1, 1), (2, 1)}


def test_a_low_request_ends_however_many_high_ones_arrive() -> None:
    """One window; five clients have a high request in line at all times, which the low one makes way for."""
    shared, numbers = scheduler(job(0, 400, position=300, client="z", priority="low")), count(1)
    left, free, moved = {0: 60.0}, 1, 0
    waiting: dict[int, Job] = {}
    for _ in range(100_000):
        for client in "abcde":
            if not any(each.flow.client == client for each in waiting.values()):
                number = next(numbers)
                waiting[number] = job(number, 100, client=client, priority="high")
                left[number] = 3.0
                shared.add(waiting[number])
        if shared.starved(Capacity(free, 0)) and (displaced := shared.to_preempt()) is not None:
            shared.remove(displaced)
            shared.add(waiting.get(displaced) or job(0, 400, position=300, client="z", priority="low"))
            free, moved = 1, moved + 1
        free -= len(admitted(shared, Capacity(free, 0)))
        for number, _ in shared.plan():
            shared.charge(number, 0.5)
            shared.advance(number, 1, 1)
            left[number] -= 0.5
            if left[number] <= 0:
                shared.remove(number)
                waiting.pop(number, None)
                free += 1
                if number == 0:
                    assert moved > 5
                    return
    raise AssertionError("the low request starves")


def test_a_first_token_is_expected_after_the_prompts_before_it() -> None:
    pace = PrefillBudget(0.25, 1e9)
    running = scheduler(job(1, 400), job(2, 1000, client="b"), job(3, 200), pace=pace)
    admitted(running, PLENTY)
    assert running.first_token_s(1) is None, "nothing is known of the machine"
    pace.took([(0, 100)], 1.0)
    running.charge(2, 1.0)
    assert running.first_token_s(2) == pytest.approx(16.0), "all have had less"
    assert running.first_token_s(3) == pytest.approx(6.0)
    assert running.first_token_s(1) == pytest.approx(4.0)


def test_a_rewound_job_computes_everything_again() -> None:
    running = scheduler(job(1, 3, position=2))
    admitted(running, PLENTY)
    running.advance(1, 1, 1)
    running.rewind(1)
    assert planned(running) == ((1, 4),)


def test_unknown_jobs_may_be_removed() -> None:
    running = scheduler(job(1, 5))
    running.remove(7)
    running.remove(1)
    assert planned(running) == ()


@dataclass
class Mirror:
    """What the test knows of a job."""

    position: int
    known: int
    ends: int
    chunk: int
    window: bool
    blocks: int
    flow: Flow
    admitted: bool = False


class Scheduling(RuleBasedStateMachine):
    """Jobs come, are cancelled, lose their KV and end; the capacity is what windows and blocks leave over."""

    chunk_tokens = 512
    max_running = 3
    windows = 2
    blocks = 40

    def __init__(self) -> None:
        super().__init__()
        self.pace = PrefillBudget(0.25, 3000.0)
        self.scheduler = Scheduler(self.chunk_tokens, self.pace, self.max_running)
        self.jobs: dict[int, Mirror] = {}
        self.count = 0

    @property
    def capacity(self) -> Capacity:
        admitted = [mirror for mirror in self.jobs.values() if mirror.admitted]
        return Capacity(
            self.windows - sum(m.window for m in admitted), self.blocks - sum(m.blocks for m in admitted)
        )

    @rule(
        known=st.integers(1, 2000),
        cached=st.integers(0, 1999),
        answer=st.integers(1, 5),
        chunk=st.sampled_from([64, 512]),
        window=st.booleans(),
        blocks=st.integers(0, 40),
        flow=st.builds(Flow, st.sampled_from("abc"), st.sampled_from(tuple(WEIGHTS))),
    )
    def arrive(
        self, known: int, cached: int, answer: int, chunk: int, window: bool, blocks: int, flow: Flow
    ) -> None:
        self.count += 1
        position = min(cached, known - 1) if not window else 0
        self.jobs[self.count] = Mirror(position, known, known + answer, chunk, window, blocks, flow)
        self.scheduler.add(Job(self.count, position, known, chunk, window, blocks, flow))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.jobs)))
        self.scheduler.remove(number)
        del self.jobs[number]

    @precondition(lambda self: any(m.admitted for m in self.jobs.values()))
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(n for n, m in self.jobs.items() if m.admitted)))
        self.scheduler.rewind(number)
        self.jobs[number].position = 0

    @rule(seconds=st.floats(1e-3, 10.0))
    def learn(self, seconds: float) -> None:
        self.pace.took([(100, 512)], seconds)

    @rule()
    def step(self) -> None:
        self._preempt()
        self._admit(admitted(self.scheduler, self.capacity))
        self._run(self.scheduler.plan())

    def _preempt(self) -> None:
        """Jobs make way as the engine lets them."""
        while self.scheduler.starved(self.capacity) or self.scheduler.full:
            if (displaced := self.scheduler.to_preempt()) is None:
                return
            mirror, ahead = self.jobs[displaced], self.scheduler.next
            assert mirror.admitted
            assert ahead is not None
            owed = self.scheduler._fair_share.owed(mirror.flow, self.jobs[ahead.id].flow)
            assert owed > QUANTUM_S, "it makes way for who has had enough"
            assert mirror.position >= CELL
            mirror.admitted, mirror.window = False, True
            self.scheduler.remove(displaced)
            again = Job(
                displaced, mirror.position, mirror.known, mirror.chunk, True, mirror.blocks, mirror.flow
            )
            self.scheduler.add(again)

    def _admit(self, started: tuple[int, ...]) -> None:
        line = [n for n, mirror in self.jobs.items() if not mirror.admitted]
        for flow in {mirror.flow for mirror in self.jobs.values()}:
            theirs, admitted = ([n for n in some if self.jobs[n].flow == flow] for some in (line, started))
            assert admitted == theirs[: len(admitted)], "a flow's requests are admitted out of order"
        for number in started:
            self.jobs[number].admitted = True
        assert self.capacity.windows >= 0, "more windows are used than there are"
        assert self.capacity.blocks >= 0, "more blocks are reserved than there are"
        if len(started) < len(line) and sum(m.admitted for m in self.jobs.values()) < self.max_running:
            following = self.scheduler.next
            assert following is not None
            head = self.jobs[following.id]
            assert head.window > self.capacity.windows or head.blocks > self.capacity.blocks, (
                "it waits for nothing"
            )
            assert self.scheduler.starved(self.capacity)

    def _run(self, plan: Plan) -> None:
        run = dict(plan)
        assert len(run) == len(plan)
        assert all(self.jobs[n].admitted for n in run), "a job runs before it is admitted"
        decodes = [n for n, m in self.jobs.items() if m.admitted and m.known - m.position == 1]
        assert all(run.get(n) == 1 for n in decodes), "a decoding job got no token"
        assert sum(run.values()) <= self.chunk_tokens + len(decodes)
        chunks = [(self.jobs[n].position, tokens) for n, tokens in run.items() if n not in decodes]
        if decodes and sum(tokens for _, tokens in chunks) > LEAST:
            assert sum(self.pace.cost(*chunk) for chunk in chunks) <= 1.001 * self.pace.of_a_step, "late"
        prefills = [n for n, m in self.jobs.items() if m.admitted and n not in decodes]
        if prefills:
            first = min(prefills, key=lambda n: (self.scheduler._fair_share.used(self.jobs[n].flow), n))
            assert first in run, "the prefill of who has had least stands still"
        for number, tokens in run.items():
            mirror = self.jobs[number]
            end = mirror.position + tokens
            assert 1 <= tokens <= max(1, mirror.chunk)
            assert end <= mirror.known
            crossed = mirror.position // CELL != end // CELL
            assert end == mirror.known or end % CELL == 0 or not crossed, "a chunk ends off the grid"
            seconds = self.pace.cost(mirror.position, tokens)
            self.scheduler.charge(number, seconds)
            mirror.position, sampled = end, int(end == mirror.known)
            mirror.known += sampled
            self.scheduler.advance(number, tokens, sampled)
            if mirror.known == mirror.ends:
                self.scheduler.remove(number)
                del self.jobs[number]

    @invariant()
    def counts(self) -> None:
        admitted = sum(mirror.admitted for mirror in self.jobs.values())
        assert len(self.scheduler.running) == admitted <= self.max_running
        assert self.scheduler.waiting == len(self.jobs) - admitted

    def teardown(self) -> None:
        """No admitted job starves: without new arrivals, all that can ever be admitted ends."""
        for _ in range(2000):
            if not self.jobs:
                return
            self.step()
        raise AssertionError(f"jobs never end: {self.jobs}")


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
