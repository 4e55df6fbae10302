"""The engine: admits requests, runs steps over packed batches, hands events back.

One thread calls everything here; service.py owns the threads.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from spilld.config.config import Config
from spilld.cuda_ext.errors import OutOfMemory
from spilld.cuda_ext.memory.windows import Windows
from spilld.engine.sessions.archive_transfers import Courier
from spilld.engine.sessions.commands import SessionDesk
from spilld.engine.sessions.manager import Chat, SessionKeeper
from spilld.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    InternalError,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    RequestNotFound,
    SpilldError,
    StorageFailed,
)
from spilld.kv import checkpoint
from spilld.kv.batch import BatchItem
from spilld.kv.sequence import Sequence
from spilld.kv.visibility import (
    BLOCK,
    CELL,
    highest_block,
    longest_with,
    sealed_by,
)
from spilld.models.model import Model
from spilld.monitoring.counters import Tally
from spilld.monitoring.failures import is_lost, logged, typed
from spilld.monitoring.memory import MemoryWatch
from spilld.monitoring.metrics import Metrics
from spilld.offload.disk.files.extent import RunKey
from spilld.offload.errors import ExtentCorrupt, OffloadError
from spilld.offload.store import Store
from spilld.protocol.messages import (
    ChangeSession,
    Event,
    Failed,
    Generate,
    ListSessions,
    PromptLogprob,
    Release,
    Reply,
    Resume,
    is_last,
)
from spilld.requests.request_state import NOBODY, Generation
from spilld.runner.runner import Runner
from spilld.runner.sampler import logprobs
from spilld.runner.sequence_manager import Sequences
from spilld.scheduler.fair_share import shares
from spilld.scheduler.latency import LatencyModel
from spilld.scheduler.prefill_budget import PrefillBudget
from spilld.scheduler.scheduler import (
    Capacity,
    Job,
    Plan,
    Scheduler,
)
from spilld.sessions.idle_contexts import Contexts, Key, new_handle
from spilld.sessions.journal import Entry, Journal, Unfinished
from spilld.sessions.store import Session, SessionBook
from spilld.sessions.transfers import Transfers

log = logging.getLogger(__name__)

RECOMPUTES = 2
"""How often a request's lost KV is computed again before the request fails."""

HOPELESS = 2.0
"""A prompt that is expected to take so many times what its deadline leaves is not begun."""

PROMPT_LOGPROB_CHUNK = 64
"""Tokens a step where the logits of every token are wanted: they take 4 bytes * vocabulary each."""

LIVES = 3
"""Daemons in a row that may end, not in order, before a request gets any further: then it is set aside."""

TICK_S = 1.0
"""How often sessions are looked at: which have expired, which are still to be pinned."""

Post = Callable[[bytes, Reply], None]
Composed = Callable[[tuple[list[int], list[int]] | SpilldError], None]
Compose = Callable[[Chat, Composed], None]
Logits = np.ndarray[Any, np.dtype[np.float32]]


class Engine:
    """Owns every sequence. Each request that was added ends in exactly one Done or Failed event, in this
    process or, after `suspend`, in one that restores it."""

    def __init__(
        self,
        model: Model,
        windows: Windows,
        store: Store,
        runner: Runner,
        book: SessionBook,
        journal: Journal,
        transfers: Transfers,
        prefill: PrefillBudget,
        metrics: Metrics,
        memory: MemoryWatch,
        post: Post,
        *,
        max_context: int,
        chunk_tokens: int = 512,
        context_ttl_s: float = 3600.0,
        retention_s: float = 120.0,
    ) -> None:
        self.model = model
        self.contexts = Contexts()
        self._sequences = Sequences(windows, store, runner)
        self._keeper = SessionKeeper(book, store, model, context_ttl_s)
        self._desk = SessionDesk(self._keeper, self.contexts, self._sequences, self._all)
        self._journal = journal
        self._retention_s = retention_s
        self.courier = Courier(
            transfers, self._keeper, store, model, self._desk.refuse_if_busy, lambda: self.longest
        )
        self._store = store
        self._runner = runner
        self._metrics = metrics
        self._memory = memory
        self._tally = Tally()
        self._post = post
        self._max_context = max_context
        self._chunk_tokens = chunk_tokens
        self._prefill = prefill
        self._latency = LatencyModel(
            model.geometry.sliding_windows, store.layout.record_bytes, store.host_budget_bytes
        )
        self._scheduler = Scheduler(chunk_tokens, prefill)
        self.compose: Compose | None = None
        """Has prompts made of messages, which may take long, and calls back in this thread; without it they
        are made here."""
        self._generations: dict[int, Generation] = {}
        self._composing: dict[int, Generation] = {}
        """Whose prompts are being made of messages: each is the one that runs on its session."""
        self._behind: defaultdict[Key, deque[Generation]] = defaultdict(deque)
        self._away: dict[int, RunKey | None] = {}
        """Jobs that made way for others, and what is being written of each."""
        self._jobs = 0
        self._ticked = 0.0

    @property
    def longest(self) -> int:
        """Tokens that one sequence may have: what the model allows and the store can hold."""
        return min(self._max_context, longest_with(self._store.capacity))

    def adjust(self, config: Config) -> None:
        """Take the settings that may change between two steps. What is under way keeps what it began with: a
        context its lifetime."""
        self._prefill.gap_s = config.max_gap_ms / 1e3
        self._keeper.context_ttl_s = config.context_ttl_s
        self._retention_s = config.retention_s
        if self._store.disk is not None:
            self._store.disk.prefetch.deadline_s = config.read_deadline_s

    @property
    def progress(self) -> int:
        """Grows as long as a step goes on: with layers attended to, bytes read and written. May be read from
        another thread."""
        return self._runner.attended + self._store.disk_read_bytes + self._store.disk_written_bytes

    def stats(self) -> dict[str, object]:
        """Requests and bytes; may be read from another thread."""
        behind = sum(len(waiting) for waiting in list(self._behind.values()))
        return {
            "requests_running": len(self._scheduler.running),
            "requests_paused": sum(g.unread for g in list(self._generations.values())),
            "requests_waiting": self._scheduler.waiting + len(self._away) + len(self._composing) + behind,
            "memory_short": int(self._memory.short),
            "contexts_idle": len(self.contexts),
            "workspace_bytes": self._runner.workspace_bytes,
            **self._tally.stats(),
            **self._sequences.stats(),
        }

    def check_integrity(self) -> None:
        """Windows, rows and runs belong to running requests and idle contexts, and to nothing else."""
        running = [g.sequence for g in self._generations.values() if g.sequence is not None]
        self._sequences.check_integrity([*running, *self.contexts])

    def warm_up(self) -> None:
        """Compute something before the first request, so that it need not wait for what comes only once."""
        self._sequences.warm_up(self._chunk_tokens)
        self.check_integrity()

    # The loop is the table of contents.

    def turn(self) -> bool:
        """Admit, run one step, deal with its results; False if there was nothing to run."""
        self._expire()
        self._store.settle()
        with logged("archives are not tended"):
            self.courier.tend()
        self._bring_back()
        admitted = self._to_admit()
        for job in admitted:
            self._scheduler.start(job)
        for generation in [self._generations[job] for job in admitted]:
            with self._blaming(generation):
                self._admit(generation)
        plan = self._scheduler.plan()
        for batch in self._batches(plan):
            self._step(batch)
            self._store.settle()
        return bool(admitted or plan)

    @contextmanager
    def _blaming(self, generation: Generation) -> Iterator[None]:
        """What goes wrong inside ends this request, and no other. A lost device is raised."""
        try:
            yield
        except Exception as error:
            if is_lost(error):
                raise
            self._abort(generation, typed(error, "the request failed"))

    def _batches(self, plan: Plan) -> list[Plan]:
        """What is computed together: all but those under suspicion, each of which goes alone."""
        alone = [part for part in plan if self._generations[part[0]].suspect]
        together = tuple(part for part in plan if part not in alone)
        return [batch for batch in (together, *((part,) for part in alone)) if batch]

    @property
    def writing(self) -> bool:
        """Something is on its way to disk, or to an archive, and is to be settled soon."""
        return self._store.writing or self.courier.busy

    def rest(self) -> None:
        """There is nothing to run: stop reading ahead."""
        self._runner.rest()
        self._store.settle()

    def _expire(self) -> None:
        for generation in [g for g in self._all() if g.left_s < 0]:
            self._abort(generation, DeadlineExceeded(f"not done after {generation.request.deadline_s} s"))
        for generation in [g for g in self._all() if g.unheard_s > self._retention_s]:
            self._abort(generation, Cancelled(f"no client asked for it within {self._retention_s:g} s"))
        if time.monotonic() - self._ticked >= TICK_S:
            self._ticked = time.monotonic()
            self._memory.look()
            self._store.promotes = not self._memory.short
            if self._memory.short:
                self._relieve()
            with logged("sessions are in memory only"):
                self._write_held()
            with logged("sessions are not tended"):
                self._desk.tend()
            self._journal.sweep(self._retention_s)

    def _write_held(self) -> None:
        """Sessions that could not be written, with the ends of their requests, if that can be done now."""
        with self._journal.transaction():
            self._keeper.book.write_held()
        self._keeper.book.let_go()

    def _all(self) -> list[Generation]:
        """Requests that wait for another on their session first, so that to end one begins no other."""
        waiting = (g for waiting in self._behind.values() for g in waiting)
        return [*waiting, *self._composing.values(), *self._generations.values()]

    def _to_admit(self) -> tuple[int, ...]:
        """Requests to start; contexts make way for one that finds no capacity beside them."""
        self._scheduler.pause({g.job for g in self._generations.values() if g.unread})
        if self._memory.short and self._scheduler.plan():
            return ()
        while self._scheduler.starved(self._capacity) and self._make_way():
            continue
        if self._scheduler.full:
            self._preempt()
        return self._scheduler.admit(self._capacity)

    def _relieve(self) -> None:
        """Memory is short: give some back, all of it soon if it stays short."""
        self._runner.rest()
        self._store.settle()
        if (idle := self.contexts.oldest()) is not None:
            self._sequences.discard(idle)
        self._sequences.relieve()
        self._store.relieve()

    def _make_way(self) -> bool:
        """Give up something for the request that is next; False if it is to wait for running ones."""
        if (idle := self.contexts.oldest()) is not None:
            log.info("an idle context makes room")
            self._sequences.discard(idle)
            return True
        if self._scheduler.running:
            return self._preempt()
        job = self._scheduler.next
        assert job is not None
        first = self._generations[job.id]
        holders = [g for g in self._generations.values() if g is not first and g.sequence is not None]
        if holders:
            self._dispossess(holders[-1])
        else:
            lost = self._store.spill_failure
            self._abort(first, StorageFailed(f"it fits no more since the disk tier takes nothing: {lost}"))
        return True

    def _dispossess(self, generation: Generation) -> None:
        """Take the context of a waiting request: another needs its room. It comes back from disk."""
        sequence = _sequence(generation)
        generation.history = list(sequence.tokens)
        self._sequences.discard(sequence)
        generation.sequence = None
        self._scheduler.update(self._job(generation))

    def _preempt(self) -> bool:
        """Let a running request make way if one is to: what was computed of it goes to disk. False if none
        is."""
        job = self._scheduler.to_preempt()
        if job is None:
            return False
        generation = self._generations[job]
        with self._blaming(generation):
            self._send_away(generation)
        return True

    def _send_away(self, generation: Generation) -> None:
        sequence = _sequence(generation)
        saved = self._sequences.save(sequence, generation.milestone)
        generation.milestone = saved if generation.produced else None
        if not self._sequences.saved(sequence, saved):
            self._scheduler.forbid_preemption(generation.job)  # its KV would be lost
            return
        log.info("request %s makes way for another", generation.request.request_id)
        self._tally.preemptions += 1
        self._runner.rest()
        generation.history = sequence.tokens[: generation.first]
        generation.sequence = None
        self._sequences.discard(sequence)
        self._scheduler.remove(generation.job)
        self._away[generation.job] = saved

    def _bring_back(self) -> None:
        """Queue requests again that made way, once they are on disk and somebody takes what they produce."""
        for job, saved in list(self._away.items()):
            generation = self._generations[job]
            if generation.unread or (saved is not None and self._store.saving(saved)):
                continue
            with self._blaming(generation):
                queued = self._job(generation)
                del self._away[job]
                self._scheduler.add(queued)

    @property
    def _capacity(self) -> Capacity:
        windows = self._sequences.windows
        return Capacity(min(windows, 1) if self._memory.short else windows, self._store.unpromised)

    def _step(self, plan: Plan) -> None:
        began = time.monotonic()
        slices, generations = self._slices(plan)
        if not slices:
            return
        self._note_first_steps(generations)
        read, stalled = self._store.disk_read_bytes, self._store.stall_seconds
        kept = [self._kept(g, s) for g, s in zip(generations, slices, strict=True)]
        try:
            logits = self._runner.run(slices, kept)
        except Exception as error:
            if is_lost(error):
                raise
            self._suspect(generations, typed(error, "a step failed"))
            return
        share = 1 / len(slices)
        read, stalled = self._store.disk_read_bytes - read, self._store.stall_seconds - stalled
        took = time.monotonic() - began
        self._charge(generations, slices, took, stalled)
        self._metrics.step.observe(took)
        self._metrics.rows.observe(sum(part.count for part in slices))
        for generation, part, rows in zip(generations, slices, logits, strict=True):
            with self._blaming(generation):
                generation.account(part, int(read * share), stalled * share, took)
                self._tally.attended(part.read_bytes)
                self._advance(generation, part, rows.numpy())
        chunks = [(part.position, part.count) for part in slices if part.count > 1]
        self._store.make_room((self._chunk_tokens if chunks else CELL) // BLOCK)
        self._store.write_behind()
        if chunks:
            self._prefill.took(chunks, time.monotonic() - began)
        else:
            host, disk = (sum(part.read_bytes[tier] for part in slices) for tier in ("host", "disk"))
            self._latency.took(len(slices), host, disk, time.monotonic() - began)

    def _suspect(self, generations: list[Generation], error: SpilldError) -> None:
        """A step broke. Where several took part in it each goes on alone, and so fails alone if it was the
        cause. What was to be sealed is in doubt and is computed again; all else a step writes once more."""
        if len(generations) == 1:
            self._abort(generations[0], error)
            return
        for generation in generations:
            generation.suspect = True
            sequence = _sequence(generation)
            if sequence.table.sealed < sequence.table.stop:
                with self._blaming(generation):
                    self._begin_anew(generation)

    def _charge(
        self, generations: list[Generation], slices: list[BatchItem], seconds: float, stalled: float
    ) -> None:
        """Let each client pay for its share of a step."""
        costs = [self._prefill.cost(part.position, part.count) for part in slices]
        reads = [part.read_bytes["disk"] for part in slices]
        for generation, share in zip(generations, shares(seconds, stalled, costs, reads), strict=True):
            self._scheduler.charge(generation.job, share)
            generation.engine_s += share

    def _note_first_steps(self, generations: list[Generation]) -> None:
        for generation in generations:
            if generation.queue_s is None:
                generation.queue_s = generation.waited_s
                self._metrics.queue.observe(generation.queue_s)

    # A request's way, from its arrival to its last event.

    def add(self, client: bytes, request: Generate, prompt: list[int], arrived: float | None = None) -> None:
        """A request with its prompt in tokens; none yet if it is messages that go on with a session.

        arrived: seconds since 1970, None for now. Requests on one session run one after the other. Raises the
        SpilldError that refuses it, leaving no trace.
        """
        if any(generation.request.request_id == request.request_id for generation in self._all()):
            raise InvalidRequest(
                f"id is {request.request_id!r}, which is in flight; allowed: 128 random bits"
            )
        if self._journal.is_anothers(request.tenant, request.request_id):
            raise InvalidRequest(
                f"id is {request.request_id!r}, which is another's; allowed: 128 random bits"
            )
        entry = Entry(
            request=_seeded(request),
            prompt=tuple(prompt),
            handle=new_handle() if request.keep else None,
            fingerprint=self.model.fingerprint,
            arrived=time.time() if arrived is None else arrived,
        )
        generation = self._generation(client, entry)
        self._queue(generation)
        try:
            generation.number = self._journal.begin(entry)
        except BaseException:
            self._remove(generation, keep=True)
            raise

    def left_behind(self) -> list[Unfinished]:
        """Requests of the last process, in order of arrival, each to be restored. To be asked once."""
        return self._journal.unfinished()

    def restore(self, left: Unfinished) -> None:
        """Go on with a request of the last process, or fail it for good. Nobody listens to it until its
        client resumes it."""
        try:
            self._restore(left)
        except Exception as error:
            request_id, failure = left.entry.request.request_id, typed(error, "the request cannot go on")
            log.error("request %s is set aside: %s", request_id, failure)
            event = Failed.because(failure, request_id, len(left.events))
            self._tally.event(event, 0)
            with logged("a request is not set aside"):
                self._journal.note(left.number, event)
            self._post(NOBODY, event)
            if is_lost(error):
                raise

    def _restore(self, left: Unfinished) -> None:
        if left.lives > LIVES:
            raise InternalError(f"{LIVES} daemons in a row ended before it got any further; send it again")
        if left.entry.fingerprint != self.model.fingerprint:
            raise StorageFailed("the daemon came back with another model; send the request again")
        generation = self._generation(NOBODY, left.entry)
        generation.number = left.number
        self._queue(generation, left.events)

    def _generation(self, client: bytes, entry: Entry) -> Generation:
        self._jobs += 1
        return Generation(self._jobs, client, entry)

    def _queue(self, generation: Generation, told: list[Event] | None = None) -> None:
        key = generation.key
        if key is not None and any(other.key == key for other in self._holders):
            self._behind[key].append(generation)
        else:
            self._begin(generation, told or [])

    @property
    def _holders(self) -> list[Generation]:
        """Those of which no other on the same session may begin."""
        return [*self._composing.values(), *self._generations.values()]

    def _begin(self, generation: Generation, told: list[Event]) -> None:
        request = generation.request
        generation.session = self._keeper.session(request, generation.handle)
        generation.told = told[-1].seq + 1 if told else 0
        session, chat = generation.session, None
        if session is not None:
            generation.prompt = self._keeper.prompt(request, generation.prompt, session)
            chat = self._keeper.chat(request, session, self.longest)
        if chat is None:
            self._enter(generation, told)
        elif self.compose is None:
            generation.prompt, generation.turns = chat()
            self._enter(generation, told)
        else:
            self._composing[generation.job] = generation
            self.compose(chat, partial(self._composed, generation, told))

    def _composed(
        self, generation: Generation, told: list[Event], made: tuple[list[int], list[int]] | SpilldError
    ) -> None:
        """The prompt of a request is there, or why there is none; nothing if it has ended meanwhile."""
        if self._composing.pop(generation.job, None) is None:
            return
        try:
            if isinstance(made, SpilldError):
                raise made
            generation.prompt, generation.turns = made
            self._enter(generation, told)
        except Exception as error:  # noqa: BLE001 (it is told, or raised)
            self._never_begins(generation, error)
            self._begin_next(generation.key)

    def _enter(self, generation: Generation, told: list[Event]) -> None:
        """Have a request wait for its admission; its prompt is known."""
        key = generation.key
        sequence = None if key is None else self.contexts.get(key)
        if generation.session is not None:
            generation.history = [] if sequence else list(generation.session.tokens)
            if sequence is not None and self._is_computed(sequence, generation):
                self._sequences.discard(self.contexts.claim(generation.session.key) or sequence)
                sequence, generation.history = None, list(generation.session.tokens)
        before = sequence.tokens if sequence else generation.history
        self._refuse_unknown("the session", before)
        self._refuse_unknown("the prompt", generation.prompt)
        generation.prepare(before, self.model.tokenizer, self.model.geometry.eos, told)
        generation.sequence = sequence
        try:
            job = self._job(generation)
        except SpilldError:
            generation.sequence = None
            raise
        if key is not None:
            self.contexts.claim(key)
        self._generations[generation.job] = generation
        self._scheduler.add(job)

    def _is_computed(self, sequence: Sequence, generation: Generation) -> bool:
        """Nothing is left of which there would be logits: what is on disk is without the last token."""
        return not (generation.prompt or generation.appends or sequence.computed < len(sequence.tokens))

    def _refuse_unknown(self, what: str, tokens: list[int]) -> None:
        """Raises InvalidRequest for ids that the model has no embedding of."""
        vocabulary = self.model.geometry.vocab
        if (largest := max(tokens, default=0)) >= vocabulary:
            raise InvalidRequest(
                f"{what} holds token {largest}, which is not below the vocabulary of {vocabulary}"
            )

    def _lengthen(self, *, of_session: bool) -> str:
        """What decides that `longest` is no longer, and what to do about it."""
        instead = "fork the session with fewer tokens, or begin another" if of_session else "shorten it"
        allowed = self.model.geometry.max_positions
        if self.longest < self._max_context:
            return f"the host and disk budgets hold no more; {instead}, or raise host_budget or disk_budget"
        if self._max_context < allowed:
            return f"max_context is {self._max_context}; {instead}, or raise max_context"
        return f"the model allows {allowed}; {instead}, or serve a model with a longer context"

    def _job(self, generation: Generation) -> Job:
        """What the scheduler must know. max_tokens is cut to what the sequence may still hold."""
        sequence = generation.sequence
        position = 0 if sequence is None else sequence.computed
        before = generation.history if sequence is None else sequence.tokens
        known = len(before) + len(generation.prompt)
        if known == position and not generation.appends:
            raise InvalidRequest("there is nothing to compute: the prompt has no tokens")
        longest, room = (
            (self.longest, "fit") if generation.appends else (self.longest - 1, "leave room to answer")
        )
        if known > longest:
            raise PromptTooLong(
                f"context and prompt have {known} tokens; at most {longest} {room}: "
                f"{self._lengthen(of_session=bool(generation.request.session and before))}"
            )
        generation.max_tokens = min(generation.request.max_tokens, self.longest - known)
        blocks = highest_block(known + generation.max_tokens)
        return Job(
            id=generation.job,
            position=position,
            known=max(position, known + len(generation.answer) - generation.held_back),
            chunk=self._chunk_tokens if generation.request.prompt_logprobs is None else PROMPT_LOGPROB_CHUNK,
            window=sequence is None,
            blocks=max(0, blocks - (sequence.table.promised if sequence else 0)),
            flow=generation.flow,
            preemptible=self._store.disk is not None and generation.request.prompt_logprobs is None,
        )

    def _admit(self, generation: Generation) -> None:
        sequence, token_s = generation.sequence, self._token_s()
        if sequence is None:
            root = self._keeper.root(generation.request.tenant)
            try:
                sequence = generation.sequence = self._sequences.open(root, generation.history)
            except OutOfMemory as error:
                raise Overloaded(f"there is no memory for its window: {error}") from error
        first = len(sequence.tokens)
        sequence.table.idle = False  # from here on it is no more what the session is
        sequence.tokens.extend(generation.prompt)
        self._store.promise(sequence.table, highest_block(len(sequence.tokens) + generation.max_tokens))
        sequence.tokens.extend(generation.answer)
        if not sequence.computed and generation.request.prompt_logprobs is None:
            found = self._sequences.find(sequence)
            self._tally.prefix_hits += found
            self._tally.prefix_misses += not found
            self._scheduler.reuse(generation.job, sequence.computed)
        first_token_s = self._scheduler.first_token_s(generation.job)
        for event in generation.begin(first, sequence, first_token_s, token_s):
            self._tell(generation, event)
        if (hopeless := self._hopeless(generation, sequence)) is not None:
            self._abort(generation, hopeless)
        elif generation.complete(sequence) or (generation.reason and not generation.appends):
            self._finish(generation)

    def _token_s(self) -> float | None:
        """What a decode step is expected to take once the prompts of all that run are computed."""
        return self._latency.token_s([len(self._generations[job].tokens) for job in self._scheduler.running])

    def _hopeless(self, generation: Generation, sequence: Sequence) -> DeadlineExceeded | None:
        """Why its deadline cannot be met, by far, if that is known. An idle engine tries: what it knows may
        be of a worse time, and only steps tell."""
        alone = self._prefill.seconds(sequence.computed, len(sequence.tokens) - sequence.computed)
        idle = len(self._scheduler.running) == 1
        if idle or not self._prefill.measured or alone <= HOPELESS * generation.left_s:
            return None
        left = max(generation.left_s, 0.0)
        return DeadlineExceeded(
            f"its prompt alone would take about {alone:.1f} s, {left:.1f} are left; give it more"
        )

    def _slices(self, plan: Plan) -> tuple[list[BatchItem], list[Generation]]:
        """The plan as slices, with room for the blocks that they will seal."""
        slices: list[BatchItem] = []
        generations = []
        for job, count in plan:
            generation = self._generations[job]
            sequence = _sequence(generation)
            newest = sequence.computed + count - 1
            with self._blaming(generation):
                hashes = sequence.hashes(len(sequence.table.chain), sealed_by(newest))
                try:
                    self._store.grow(sequence.table, hashes)
                except OffloadError as error:
                    raise StorageFailed(f"{error}; raise the host or the disk budget") from error
                slices.append(BatchItem(sequence, count, sequence.computed))
                generations.append(generation)
        return slices, generations

    def _kept(self, generation: Generation, part: BatchItem) -> range:
        """Rows of the slice whose logits are needed."""
        if generation.wants_prompt:
            return range(part.count)
        last = part.last + 1 == len(part.sequence.tokens)
        return range(part.count - 1, part.count) if last else range(0)

    def _advance(self, generation: Generation, part: BatchItem, logits: Logits) -> None:
        """Take in a step's result for one request: progress, a token, or the end."""
        if part.failure is not None:
            self._recompute(generation, part.failure)
            return
        sequence = part.sequence
        sequence.computed += part.count
        generation.uncounted += part.count
        complete = generation.complete(sequence)
        self._scheduler.advance(generation.job, part.count, int(complete and not generation.appends))
        if generation.wants_prompt:
            self._note_prompt(generation, part, logits)
        if not generation.produced:
            self._tell(generation, generation.progress(sequence))
        if complete and generation.appends:
            self._finish(generation)
            return
        if self._is_milestone(generation, sequence, complete):
            saved = self._sequences.save(sequence, generation.milestone)
            generation.milestone = saved if generation.produced else None
        if complete:
            self._sample(generation, sequence, logits[-1])

    def _is_milestone(self, generation: Generation, sequence: Sequence, complete: bool) -> bool:
        """A restart should not lose this much again: some cells of a prompt, a cell of an answer."""
        cells = 1 if complete else checkpoint.ANCHOR_CELLS
        return sequence.computed % (cells * CELL) == 0 or (complete and not generation.produced)

    def _note_prompt(self, generation: Generation, part: BatchItem, logits: Logits) -> None:
        count = generation.request.prompt_logprobs or 0
        tokens = part.sequence.tokens
        for position, row in enumerate(logits, part.position + 1):
            if 0 <= position - generation.first < len(generation.prompt):
                logprob, top = logprobs(row, tokens[position], count)
                generation.prompt_logprobs.append(
                    PromptLogprob(token=tokens[position], logprob=logprob, top=top)
                )

    def _sample(self, generation: Generation, sequence: Sequence, logits: Logits) -> None:
        choice = generation.sampler.choose(logits, len(sequence.tokens), sequence.tokens)
        waits = self._metrics.next_token if generation.produced else self._metrics.first_token
        waits.observe(generation.waited_s)
        self._tell(generation, generation.token(choice))
        if generation.reason != "eos":
            sequence.tokens.append(choice.token)
        if generation.reason:
            self._finish(generation)

    def _recompute(self, generation: Generation, failure: Exception) -> None:
        """KV did not come back. It is never guessed: all of it is computed again, a few times at most."""
        if generation.recomputed >= RECOMPUTES:
            times = f"{RECOMPUTES + 1} times, the last time: {failure}"
            if isinstance(failure, OutOfMemory):
                self._abort(generation, Overloaded(f"the device had no memory {times}"))
            else:
                self._abort(generation, StorageFailed(f"KV was lost {times}"))
            return
        log.warning("request %s is computed again: %s", generation.request.request_id, failure)
        self._tally.recomputations += 1
        generation.recomputed += 1
        self._begin_anew(generation, damaged=isinstance(failure, ExtentCorrupt))

    def _begin_anew(self, generation: Generation, *, damaged: bool = False) -> None:
        generation.restart()
        self._sequences.restart(_sequence(generation), damaged=damaged)
        self._scheduler.rewind(generation.job)

    # Ends.

    def cancel(self, request_id: str, tenant: str | None = None) -> None:
        """End a request; one that has ended already, or is of another tenant if one is given, is ignored."""
        if (generation := self._running(request_id, tenant)) is not None:
            self._abort(generation, Cancelled("cancelled by the client"))

    def acknowledge(self, request_id: str, next_seq: int, tenant: str | None = None) -> None:
        """Its client has all events of a request before next_seq. Ignored as in `cancel`."""
        if (generation := self._running(request_id, tenant)) is not None:
            generation.acknowledged = max(generation.acknowledged, next_seq)

    def leave(self, client: bytes, request_id: str) -> None:
        """A client is gone; if the request is its, it may resume it later."""
        generation = self._running(request_id)
        if generation is not None and generation.client == client:
            generation.listen(NOBODY)

    def resume(self, client: bytes, request: Resume) -> list[Event]:
        """The events of a request that a client has missed; those to come will be its, too. Raises
        RequestNotFound, or StorageFailed if some of them are lost."""
        generation = self._running(request.request_id)
        number = self._journal.find(request.tenant, request.request_id)
        if number is None:
            raise RequestNotFound(
                f"no request {request.request_id!r} is known here: it never arrived, or ended long ago"
            )
        missed = self._journal.events(number, request.next_seq)
        if generation is None and not (missed and is_last(missed[-1])):
            raise StorageFailed("the end of this request could not be written to disk and is lost")
        if generation is not None:
            if request.next_seq + len(missed) < generation.told:
                raise StorageFailed("events of this request could not be written to disk and are lost")
            generation.listen(client)
            generation.acknowledged = request.next_seq
        return missed

    def _running(self, request_id: str, tenant: str | None = None) -> Generation | None:
        found = next((g for g in self._all() if g.request.request_id == request_id), None)
        return found if found is None or tenant in (None, found.request.tenant) else None

    def lose(self) -> None:
        """The device is lost, in a step whose KV nobody has: nothing may be saved any more, nothing computed.
        What runs is computed again by the next process."""
        self._sequences.lost = True

    def suspend(self) -> frozenset[str]:
        """The process is about to end: save what runs. The ids of the requests that go on at the next start;
        the others fail."""
        for generation in self._all():
            if not generation.number:
                self._abort(generation, Draining("the daemon has stopped, and could not save this request"))
            elif generation.started and generation.sequence is not None:
                with logged("what was computed of a request is not saved, and is computed again"):
                    self._sequences.save(generation.sequence, generation.milestone)
        with logged("sessions that were held in memory are lost"):
            self._write_held()
        if not self._sequences.lost:
            self._journal.end_life()
        left = frozenset(generation.request.request_id for generation in self._all())
        if left:
            log.info("%d requests are saved: they go on at the next start", len(left))
        return left

    def fail_running(self, error: SpilldError) -> None:
        """A step broke: the KV of everything that ran in it is in doubt and goes with it."""
        for generation in list(self._generations.values()):
            if generation.started and generation.sequence is not None:
                self._abort(generation, error)

    def fail_all(self, error: SpilldError) -> None:
        """Fail every request, whether it runs or waits."""
        for generation in self._all():
            self._abort(generation, error)

    def close(self) -> None:
        """Every part is closed, whatever becomes of the others."""
        with ExitStack() as stack:
            stack.callback(self._journal.close)
            stack.callback(self._store.close)
            stack.callback(self.courier.close)
            stack.callback(self._runner.close)
            stack.callback(self._runner.rest)

    def _finish(self, generation: Generation) -> None:
        generation.conclude()
        sequence, session, held = _sequence(generation), generation.session, self._keeper.held(generation)
        after = None if session is None else self._keeper.after(session, generation, held)
        goes_on = self._leave(generation, held)
        form, handle = str(self._store.layout.format), session.name if session else None
        event = generation.done(self._keeper.kv_bytes(sequence), form, handle)
        if not self._note(generation, event, after):
            event = replace(event, saved=session is None)
        self._remove(generation, keep=goes_on and session is not None)
        self._send(generation, event)

    def _abort(self, generation: Generation, error: SpilldError) -> None:
        """Fail a request, whatever else fails with it. Its session survives a cancel, with what was appended
        and what was told of the answer; after an error of ours it is what it was before."""
        session, after = generation.session, None
        known = session is not None and (session.listed or bool(session.tokens))
        harmless = isinstance(error, Cancelled | DeadlineExceeded | Draining)
        keep = known and generation.sequence is not None and generation.sequence.table.idle
        if harmless and generation.started:
            try:
                held = self._keeper.held(generation)
                if session is not None and known:
                    after = self._keeper.after(session, generation, held)
                keep = self._leave(generation, held) and known
            except Exception as failure:
                if is_lost(failure):
                    raise
                log.exception("what request %s had appended is lost", generation.request.request_id)
                after, keep = None, False
        event = generation.failed(error)
        self._note(generation, event, after)
        self._remove(generation, keep=keep)
        self._send(generation, event)

    def _leave(self, generation: Generation, held: list[int]) -> bool:
        """Save what was computed of a request that ends; its sequence holds these tokens from now on. False
        if it cannot be gone on with."""
        if (sequence := generation.sequence) is None:
            return False
        goes_on = self._sequences.reaches(sequence, held)
        self._sequences.save(sequence, generation.milestone if goes_on else None)
        self._sequences.end(sequence, held)
        return goes_on

    def _note(self, generation: Generation, event: Event, after: Session | None = None) -> bool:
        """Count an event and make it durable, and with the last what its session is now: both or neither.
        False if that failed; the session then waits in memory to be saved."""
        self._tally.event(event, generation.uncounted)
        generation.uncounted = 0
        try:
            with self._journal.transaction():
                if after is not None:
                    self._keeper.put(after)
                self._journal.note(generation.number, event)
        except Exception as error:  # noqa: BLE001 (it is logged)
            if after is not None:
                self._keeper.hold(after)
            if is_last(event):
                self._journal.owe(generation.number, event)
            request_id, failure = generation.request.request_id, typed(error, "the state folder")
            log.error("an event of request %s will not outlive this process: %s", request_id, failure)
            return False
        return True

    def _remove(self, generation: Generation, keep: bool) -> None:
        key = generation.key
        if key is not None and generation in self._behind.get(key, ()):
            self._behind[key].remove(generation)
            self._forget_if_empty(key)
            return
        self._scheduler.remove(generation.job)
        self._away.pop(generation.job, None)
        self._generations.pop(generation.job, None)
        self._composing.pop(generation.job, None)
        with logged("what a request held is not given back"):
            self._runner.rest()
            self._give_back(generation, keep)
        self._begin_next(key)

    def _give_back(self, generation: Generation, keep: bool) -> None:
        sequence, session = generation.sequence, generation.session
        if sequence is not None and keep and session is not None:
            sequence.table.idle = True
            self._store.promise(sequence.table, sequence.table.stop - 1)
            self.contexts.keep(sequence, session.key)
        elif sequence is not None:
            self._sequences.discard(sequence)

    def _begin_next(self, key: Key | None) -> None:
        """Begin the request that has waited longest for others on this session; one that cannot begin ends,
        and the next is due."""
        while key is not None and key in self._behind:
            generation = self._behind[key].popleft()
            self._forget_if_empty(key)
            try:
                self._begin(generation, [])
            except Exception as error:  # noqa: BLE001 (it is told, or raised)
                self._never_begins(generation, error)
            else:
                return

    def _forget_if_empty(self, key: Key) -> None:
        if not self._behind[key]:
            del self._behind[key]

    def _never_begins(self, generation: Generation, error: Exception) -> None:
        self._tell(generation, generation.failed(typed(error, "the request cannot begin")))
        if is_lost(error):
            raise error

    # The rest.

    def manage(self, request: Release | ListSessions | ChangeSession) -> Reply:
        """List or change sessions. Raises ContextNotFound or InvalidRequest."""
        return self._desk.manage(request)

    def _tell(self, generation: Generation, event: Event) -> None:
        self._note(generation, event)
        self._send(generation, event)

    def _send(self, generation: Generation, event: Event) -> None:
        generation.told = event.seq + 1
        self._post(generation.client, event)


def _sequence(generation: Generation) -> Sequence:
    assert generation.sequence is not None
    return generation.sequence


def _seeded(request: Generate) -> Generate:
    """With a seed, so that it can be continued by another process."""
    if request.sampling.seed is not None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=secrets.randbits(64)))
