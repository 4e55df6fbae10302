"""Decides which requests run in the next step, and how many tokens of each.

Pure: no clocks, no tensors, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from spilld.kv.attention_span import CELL

from .fair_share import FairShare, Flow
from .prefill_budget import LEAST, PrefillBudget

JobId = int

MAX_RUNNING = 16
"""The most requests that run at a time."""

QUANTUM_S = 10.0
"""Seconds of the engine by which a running request must be ahead of one that finds no capacity before it is
preempted: many times what it takes to bring its context back from disk."""

Plan = tuple[tuple[JobId, int], ...]
"""(job, tokens) of each job that takes part in a step."""


@dataclass
class Job:
    """A request as the scheduler sees it."""

    id: JobId
    position: int
    """Tokens whose K/V exist."""
    known: int
    """Tokens that are known, computed or not: a decode step computes the one that was sampled last."""
    chunk: int
    """Most tokens of this job in one step."""
    window: bool
    """Needs a new KV window; a continued context has its own."""
    blocks: int
    """Block columns that must be reserved for it before it starts."""
    flow: Flow
    """The client that it belongs to, and its priority."""
    alone: int = 0
    """Known tokens at the end that are computed one by one, as are those that follow; 0 for any together."""
    stop: int = 0
    """A position where a chunk ends, on the way; 0 for none."""
    preemptible: bool = True
    """It may be preempted, and continue later where it was."""
    paused: bool = False
    """Its client does not take what it has produced: it is not computed."""
    began: int = 0
    """Its position when it was started."""

    @property
    def left(self) -> int:
        """Number of known tokens that are not computed."""
        return self.known - self.position

    @property
    def is_single(self) -> bool:
        """Whether its next token is computed by itself, as in decoding."""
        return self.left <= max(1, self.alone)

    @property
    def has_gained(self) -> bool:
        """Whether preempting it now keeps something that it has computed: less than a cell is not kept."""
        return self.preemptible and self.position >= CELL and self.position > self.began


@dataclass(frozen=True)
class Capacity:
    """What is free: KV windows, and block columns that may be reserved."""

    windows: int
    blocks: int

    def holds(self, job: Job) -> bool:
        """Return whether the job can be started."""
        return job.window <= self.windows and job.blocks <= self.blocks

    def without(self, job: Job) -> Capacity:
        """Return what is left when the job was started."""
        return Capacity(self.windows - job.window, self.blocks - job.blocks)


class Scheduler:
    """Decides which jobs run, and how many tokens of each a step computes.

    It admits jobs of the flow that has used least of the engine, each flow's in order of arrival. Every step
    decodes all running jobs and prefills some prompts, in chunks as short as the decoding jobs need.

    A job is admitted only when everything that it can grow to can be reserved, so no running job waits for
    another to end. The next job is never passed by: it waits for running jobs, and these are preempted, one
    after the other, once their flows are QUANTUM_S ahead of its own. The flow that has used least is never
    preempted for another and is next, and a preempted job has made progress, so every job ends, whatever
    arrives.

    `admit` and `plan` change nothing; `start`, `advance` and the others report what was done.
    """

    def __init__(
        self, chunk_tokens: int, prefill: PrefillBudget, max_running: int = MAX_RUNNING, grid: int = 1
    ) -> None:
        """Create a scheduler without jobs.

        Args:
            chunk_tokens: Most prompt tokens of a step, at least `grid`.
            prefill: Bounds chunks beside decoding jobs.
            max_running: The most jobs that run at a time.
            grid: Chunks end at multiples of so many tokens, but where the prompt ends.
        """
        self._chunk_tokens = chunk_tokens
        self._prefill = prefill
        self._max_running = max_running
        self._grid = grid
        self._fair_share = FairShare()
        self._waiting: dict[JobId, Job] = {}
        self._running: dict[JobId, Job] = {}

    # Decisions.

    def admit(self, capacity: Capacity) -> tuple[JobId, ...]:
        """Return the waiting jobs to start now, in order."""
        waiting, running = dict(self._waiting), list(self._running.values())
        admitted = []
        while len(running) < self._max_running and (job := self._first(waiting.values(), running)):
            if not capacity.holds(job):
                break  # strictly in order: small jobs behind a large one would starve it
            capacity = capacity.without(job)
            running.append(waiting.pop(job.id))
            admitted.append(job.id)
        return tuple(admitted)

    def plan(self) -> Plan:
        """Return the next step: a token of each decoding job, and chunks of prompts in order of `_turn`."""
        jobs = sorted((job for job in self._running.values() if not job.paused), key=self._turn)
        left, cost = self._chunk_tokens, self._prefill.of_a_step
        decoding = any(job.is_single for job in jobs)
        parts = []
        for job in jobs:
            if job.is_single:
                parts.append((job.id, 1))
                continue
            tokens = min(job.chunk, left, job.left - job.alone)
            if job.position < job.stop:
                tokens = min(tokens, job.stop - job.position)
            if decoding:
                least = LEAST if left == self._chunk_tokens else 0
                tokens = min(tokens, max(least, self._prefill.tokens(job.position, cost)))
            tokens = _end_on_grid(job, tokens, self._grid) if tokens else 0
            if 0 < tokens <= left:
                parts.append((job.id, tokens))
                left -= tokens
                cost -= self._prefill.cost(job.position, tokens)
        return tuple(parts)

    def to_preempt(self) -> JobId | None:
        """Return the running job to preempt for the next one, which finds no capacity.

        It is a paused one, else the newest of the flow that has used most, if that is far enough ahead.

        Returns:
            None if the next job is to wait.
        """
        candidates = [job for job in self._running.values() if job.has_gained]
        if (ahead := self.next) is None or not candidates:
            return None
        last = max(candidates, key=lambda job: (job.paused, self._fair_share.used(job.flow), job.id))
        overdue = last.paused or self._fair_share.owed(last.flow, ahead.flow) > QUANTUM_S
        return last.id if overdue else None

    def starved(self, capacity: Capacity) -> bool:
        """Return whether the next job waits for capacity, and not for its turn."""
        job = self.next
        return job is not None and not self.full and not capacity.holds(job)

    def first_token_s(self, job: JobId) -> float | None:
        """Return the expected seconds until the first token of a running job.

        They are those of its own prompt and of the prompts computed before it.

        Returns:
            None before any step was measured.
        """
        if not self._prefill.measured:
            return None
        turn = self._turn(self._running[job])
        ahead = (each for each in self._running.values() if self._turn(each) <= turn)
        return sum(self._prefill.seconds(each.position, each.left) for each in ahead)

    @property
    def next(self) -> Job | None:
        """The waiting job to be admitted first."""
        return self._first(self._waiting.values(), self._running.values())

    def _first(self, waiting: Iterable[Job], running: Collection[Job]) -> Job | None:
        """Return the oldest job of the flow that has used least, counting prompts that it is computing."""
        line = list(waiting)
        used = {flow: self._committed(flow, running) for flow in {job.flow for job in line}}
        return min(line, key=lambda job: (used[job.flow], job.id), default=None)

    def _committed(self, flow: Flow, running: Iterable[Job]) -> float:
        prompts = sum(self._prefill.seconds(job.position, job.left) for job in running if job.flow == flow)
        return self._fair_share.used(flow) + prompts / flow.weight

    def _turn(self, job: Job) -> tuple[float, JobId]:
        """Return the sort key of running jobs: the flow that has used least first, then the older job."""
        return self._fair_share.used(job.flow), job.id

    # Reports.

    def add(self, job: Job) -> None:
        """Queue a job."""
        self._waiting[job.id] = job
        self._fair_share.enter(job.flow)

    def update(self, job: Job) -> None:
        """Replace a waiting job whose needs have changed; it keeps its place."""
        self._waiting[job.id] = job

    def remove(self, job: JobId) -> None:
        """Forget a job that has ended, whether it waits or runs; unknown ids are ignored."""
        ended = self._waiting.pop(job, None) or self._running.pop(job, None)
        if ended is not None:
            self._fair_share.leave(ended.flow)

    def start(self, job: JobId) -> None:
        """Note that a waiting job runs from now on."""
        started = self._running[job] = self._waiting.pop(job)
        started.began = started.position

    def reuse(self, job: JobId, position: int, stop: int = 0) -> None:
        """Note that the first `position` tokens of a job that was just started had been computed before.

        Args:
            job: The job.
            position: So many tokens.
            stop: Where a chunk is to end, a position where one may; 0 for none.
        """
        self._running[job].position = self._running[job].began = position
        self._running[job].stop = stop

    def advance(self, job: JobId, tokens: int, sampled: int) -> None:
        """Note that a step has computed `tokens` of the job, and then sampled `sampled` new ones (0 or 1)."""
        advanced = self._running[job]
        advanced.position += tokens
        advanced.known += sampled
        advanced.alone += sampled if advanced.alone else 0

    def charge(self, job: JobId, seconds: float) -> None:
        """Charge a running job's flow for seconds of the engine."""
        self._fair_share.charge(self._running[job].flow, seconds)

    def rewind(self, job: JobId) -> None:
        """Note that the K/V of a running job is lost: all its known tokens are to be computed again."""
        self._running[job].position = 0

    def pause(self, jobs: Collection[JobId]) -> None:
        """Compute all running jobs but these from now on."""
        for job in self._running.values():
            job.paused = job.id in jobs

    def forbid_preemption(self, job: JobId) -> None:
        """Note that a running job cannot be preempted."""
        self._running[job].preemptible = False

    @property
    def waiting(self) -> int:
        """Number of waiting jobs."""
        return len(self._waiting)

    @property
    def running(self) -> tuple[JobId, ...]:
        """Running jobs, paused or not."""
        return tuple(self._running)

    @property
    def full(self) -> bool:
        """Whether as many jobs run as may."""
        return len(self._running) >= self._max_running


def _end_on_grid(job: Job, tokens: int, grid: int) -> int:
    """Return the length of a chunk of about so many tokens that ends where it may.

    That is where the prompt ends, or at a multiple of `grid`: of the visibility grid, too, unless that leaves
    nothing, and if that leaves nothing, either, the next one.
    """
    whole = job.left - job.alone
    if tokens == whole:
        return tokens
    for unit in (math.lcm(CELL, grid), grid):
        if (end := (job.position + tokens) // unit * unit) > job.position:
            return end - job.position
    return min(whole, grid - job.position % grid)
