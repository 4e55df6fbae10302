"""Which requests run in the next step, and how many tokens of each. Pure: no clocks, no tensors, no I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from spilld.kv.visibility import CELL

from .fair_share import Flow, Ledger
from .prefill_budget import LEAST, Pace

JobId = int

MAX_RUNNING = 16
"""Requests that are computed at a time."""

QUANTUM_S = 10.0
"""Seconds of the engine that a request which finds no room must be owed before a running one makes way: many
times what it takes to bring its context back from disk."""


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
    """Needs a new window (a continued context has its own)."""
    blocks: int
    """Block columns it must be promised before it starts."""
    flow: Flow
    """Whose it is, and how urgent."""
    movable: bool = True
    """Where it runs it may make way for others, to go on later where it was."""
    paused: bool = False
    """Nobody takes what it has produced: it is not computed."""
    began: int = 0
    """Its position when it was admitted."""

    @property
    def left(self) -> int:
        return self.known - self.position

    @property
    def gains(self) -> bool:
        """To have run was of use, even if it makes way now: less than a cell is not kept."""
        return self.movable and self.position >= CELL and self.position > self.began


@dataclass(frozen=True)
class Room:
    """What is free now."""

    windows: int
    blocks: int


@dataclass(frozen=True)
class Plan:
    """Jobs to admit, in order, then (job, tokens) to run in one packed step."""

    admit: tuple[JobId, ...]
    run: tuple[tuple[JobId, int], ...]


class Scheduler:
    """Admits jobs of the flow that has had least of the engine first, each flow's in order of arrival; every
    step decodes all running jobs and prefills one chunk, as short as the decoding ones need it.

    A job is admitted only when everything that it can grow to has been promised, so no admitted job
    waits for another to finish. Nobody passes by the job that is next: it waits for running ones alone, and
    they make way for it, one after the other, once their flows have had QUANTUM_S more than its own. Who
    has had least makes way for nobody, and is next; who makes way has come further: so all end, whatever
    arrives.
    """

    def __init__(self, chunk_tokens: int, pace: Pace, max_running: int = MAX_RUNNING) -> None:
        self._chunk_tokens = chunk_tokens
        self._pace = pace
        self._max_running = max_running
        self._ledger = Ledger()
        self._waiting: dict[JobId, Job] = {}
        self._running: dict[JobId, Job] = {}

    def add(self, job: Job) -> None:
        self._waiting[job.id] = job
        self._ledger.enter(job.flow)

    def replace(self, job: Job) -> None:
        """A waiting job needs something else than before; it keeps its place in the line."""
        self._waiting[job.id] = job

    def remove(self, job: JobId) -> None:
        """The job has ended, in whatever state; unknown ids are ignored."""
        ended = self._waiting.pop(job, None) or self._running.pop(job, None)
        if ended is not None:
            self._ledger.leave(ended.flow)

    def displaced(self) -> JobId | None:
        """The running job that shall make way for the next one, which finds no room: one that is paused, else
        the last of the flow that has had most, if that owes the next one's flow enough."""
        candidates = [job for job in self._running.values() if job.gains]
        if (ahead := self.next) is None or not candidates:
            return None
        last = max(candidates, key=lambda job: (job.paused, self._ledger.had(job.flow), job.id))
        overdue = last.paused or self._ledger.owed(last.flow, ahead.flow) > QUANTUM_S
        return last.id if overdue else None

    def fix(self, job: JobId) -> None:
        """A running job cannot make way."""
        self._running[job].movable = False

    def pause(self, jobs: Collection[JobId]) -> None:
        """Compute these no further for now, and all others."""
        for job in self._running.values():
            job.paused = job.id in jobs

    def advance(self, job: JobId, tokens: int, sampled: int) -> None:
        """A step computed `tokens` of the job and then sampled so many new ones (0 or 1)."""
        self._running[job].position += tokens
        self._running[job].known += sampled

    def first_token_s(self, job: JobId) -> float | None:
        """Seconds until a running job's first token is expected: of its own prompt, and of those that have
        their turn before it. None as long as nothing is known of the machine."""
        if not self._pace.seen:
            return None
        turn = self._turn(self._running[job])
        ahead = (each for each in self._running.values() if self._turn(each) <= turn)
        return sum(self._pace.seconds(each.position, each.left) for each in ahead)

    def charge(self, job: JobId, seconds: float) -> None:
        """A running job has taken so much of the engine."""
        self._ledger.charge(self._running[job].flow, seconds)

    def resume(self, job: JobId, position: int) -> None:
        """So many tokens of the job, just admitted, were computed before."""
        self._running[job].position = self._running[job].began = position

    def rewind(self, job: JobId) -> None:
        """The job's K/V was lost: compute all its known tokens again."""
        self._running[job].position = 0

    def starved(self, room: Room) -> bool:
        """Whether the next job in line waits for windows or blocks, and not for its turn."""
        job = self.next
        return job is not None and not self.full and not _fits(job, room)

    def plan(self, room: Room) -> Plan:
        """Admit what fits and fill a step. Admitted jobs run in the same step."""
        admitted = self._admit(room)
        return Plan(tuple(job.id for job in admitted), tuple(self._fill(self._running.values())))

    def _admit(self, room: Room) -> list[Job]:
        admitted = []
        while not self.full and (job := self.next) is not None:
            if not _fits(job, room):
                break  # strictly in order: a large request is not starved by small ones behind it
            room = Room(room.windows - job.window, room.blocks - job.blocks)
            self._running[job.id] = self._waiting.pop(job.id)
            job.began = job.position
            admitted.append(job)
        return admitted

    @property
    def next(self) -> Job | None:
        """The waiting job to be admitted first: the oldest one of the flow that has had least, or will have
        once its running prompts are computed."""
        taken = {flow: self._taken(flow) for flow in {job.flow for job in self._waiting.values()}}
        return min(self._waiting.values(), key=lambda job: (taken[job.flow], job.id), default=None)

    def _taken(self, flow: Flow) -> float:
        running = (job for job in self._running.values() if job.flow == flow)
        prompts = sum(self._pace.seconds(job.position, job.left) for job in running)
        return self._ledger.had(flow) + prompts / flow.weight

    def _turn(self, job: Job) -> tuple[float, JobId]:
        """Running jobs go in this order: whose flow has had least, then the older one."""
        return self._ledger.had(job.flow), job.id

    def _fill(self, jobs: Iterable[Job]) -> list[tuple[JobId, int]]:
        """One token for each decoding job, and prefill chunks, each in its turn."""
        jobs = sorted((job for job in jobs if not job.paused), key=self._turn)
        left, cost = self._chunk_tokens, self._pace.budget
        hurried = any(job.left == 1 for job in jobs)
        run = []
        for job in jobs:
            if job.left == 1:
                run.append((job.id, 1))
                continue
            tokens = min(job.chunk, left, job.left)
            if hurried:
                least = LEAST if left == self._chunk_tokens else 0
                tokens = min(tokens, max(least, self._pace.tokens(job.position, cost)))
            if tokens:
                tokens = _end_on_grid(job, tokens)
                run.append((job.id, tokens))
                left -= tokens
                cost -= self._pace.cost(job.position, tokens)
        return run

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def jobs(self) -> tuple[JobId, ...]:
        """Those that run."""
        return tuple(self._running)

    @property
    def full(self) -> bool:
        """As many run as may."""
        return len(self._running) >= self._max_running


def _fits(job: Job, room: Room) -> bool:
    return job.window <= room.windows and job.blocks <= room.blocks


def _end_on_grid(job: Job, tokens: int) -> int:
    """Shorten a chunk that is not the last to end on the visibility grid, unless that leaves nothing."""
    if tokens == job.left:
        return tokens
    end = (job.position + tokens) // CELL * CELL
    return end - job.position if end > job.position else tokens
