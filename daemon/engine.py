"""The engine: admits requests, runs steps over packed batches, hands events back.

One thread calls everything here; service.py owns the threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from spilld.cuda_ext.window import WindowArena
from spilld.offload.errors import OffloadError
from spilld.offload.store import Store

from .attention import Slice
from .contexts import Context, Contexts, new_handle
from .errors import (
    Cancelled,
    ContextNotFound,
    DeadlineExceeded,
    InvalidRequest,
    PromptTooLong,
    SpilldError,
    StorageFailed,
)
from .generation import Generation
from .model import Model
from .protocol import Event, Generate, Message, PromptLogprob
from .runner import Runner
from .sampler import logprobs
from .scheduler import Job, Plan, Room, Scheduler
from .sequence import Sequence
from .visibility import BLOCK, CELL, highest_block, longest_with, sealed_by

log = logging.getLogger(__name__)

RECOMPUTES = 2
"""How often a request's lost KV is computed again before the request fails."""

PROMPT_LOGPROB_CHUNK = 64
"""Tokens a step where the logits of every token are wanted: they take 4 bytes * vocabulary each."""

Post = Callable[[bytes, Event], None]
Logits = np.ndarray[Any, np.dtype[np.float32]]


class Engine:
    """Owns every sequence. Each request that was added ends in exactly one Done or Failed event."""

    def __init__(
        self,
        model: Model,
        arena: WindowArena,
        store: Store,
        runner: Runner,
        post: Post,
        *,
        max_context: int,
        chunk_tokens: int = 512,
        context_ttl_s: float = 3600.0,
    ) -> None:
        self.model = model
        self.contexts = Contexts(context_ttl_s)
        self._arena = arena
        self._store = store
        self._runner = runner
        self._post = post
        self._max_context = max_context
        self._chunk_tokens = chunk_tokens
        self._scheduler = Scheduler(chunk_tokens)
        self._generations: dict[int, Generation] = {}
        self._jobs = 0

    @property
    def longest(self) -> int:
        """Tokens that one sequence may have: what the model allows and the store can hold."""
        return min(self._max_context, longest_with(self._store.capacity))

    def stats(self) -> dict[str, object]:
        """Requests and bytes; may be read from another thread."""
        return {
            "requests_running": self._scheduler.running,
            "requests_waiting": self._scheduler.waiting,
            "contexts_idle": len(self.contexts),
            "device_used_bytes": self._arena.used_bytes,
            "device_budget_bytes": self._arena.budget_bytes,
            "workspace_bytes": self._runner.workspace_bytes,
            **self._store.stats(),
        }

    def check_integrity(self) -> None:
        """Windows, rows and runs belong to running requests and idle contexts, and to nothing else."""
        running = [g.context.sequence for g in self._generations.values() if g.context is not None]
        sequences = running + [context.sequence for context in self.contexts]
        taken = sorted(sequence.window for sequence in sequences)
        assert len(set(taken)) == len(taken), "two sequences share a window"
        assert len(taken) + self._arena.free == self._arena.capacity, "a window is lost"
        self._store.check_integrity([sequence.table for sequence in sequences])

    # The loop is the table of contents.

    def turn(self) -> bool:
        """Admit, run one step, deal with its results; False if there was nothing to run."""
        self._expire()
        self._store.settle()
        plan = self._plan()
        for job in plan.admit:
            self._admit(self._generations[job])
        self._step(plan)
        return bool(plan.run)

    def rest(self) -> None:
        """There is nothing to run: stop reading ahead."""
        self._runner.rest()
        self._store.settle()

    def _expire(self) -> None:
        for context in self.contexts.expired():
            self._discard(context.sequence)
        for generation in [g for g in self._generations.values() if g.overdue]:
            self._abort(generation, DeadlineExceeded(f"not done after {generation.request.deadline_s} s"))

    def _plan(self) -> Plan:
        """What to admit and run; contexts make way for a request that finds no room beside them."""
        while self._scheduler.starved(self._room) and self._make_way():
            continue
        return self._scheduler.plan(self._room)

    def _make_way(self) -> bool:
        """Give up something for the request that is first in line; False if a running one will make room."""
        if (context := self.contexts.oldest()) is not None:
            log.info("context %s makes room", context.handle[:8])
            self._discard(context.sequence)
            return True
        if self._scheduler.running:
            return False
        first, *behind = self._generations.values()
        holders = [generation for generation in behind if generation.context is not None]
        if holders:  # idle from here on, so it goes next
            self._abort(holders[-1], ContextNotFound("the context made way for a request that came earlier"))
        else:
            lost = self._store.spill_failure
            self._abort(first, StorageFailed(f"it fits no more since the disk tier takes nothing: {lost}"))
        return True

    @property
    def _room(self) -> Room:
        return Room(windows=self._arena.free, blocks=self._store.unpromised)

    def _step(self, plan: Plan) -> None:
        began = time.monotonic()
        slices, generations = self._slices(plan)
        if not slices:
            return
        read, stalled = self._store.disk_read_bytes, self._store.stall_seconds
        kept = [self._kept(g, s) for g, s in zip(generations, slices, strict=True)]
        logits = self._runner.run(slices, kept)
        share = 1 / len(slices)
        read, stalled = self._store.disk_read_bytes - read, self._store.stall_seconds - stalled
        took = time.monotonic() - began
        for generation, part, rows in zip(generations, slices, logits, strict=True):
            generation.account(part.read_bytes, int(read * share), stalled * share, took)
            self._advance(generation, part, rows.numpy())
        prefilling = any(s.count > 1 for s in slices)
        self._store.make_room((self._chunk_tokens if prefilling else CELL) // BLOCK)

    # A request's way, from its arrival to its last event.

    def add(self, client: bytes, request: Generate, prompt: list[int]) -> None:
        """A request with its prompt in tokens. Raises the SpilldError that refuses it, leaving no trace."""
        context = None if request.context is None else self.contexts.look(request.context)
        self._jobs += 1
        generation = Generation(self._jobs, client, request, prompt)
        job = self._job(generation, context)
        if context is not None:
            generation.context = self.contexts.claim(context.handle)
        self._generations[generation.job] = generation
        self._scheduler.add(job)

    def _job(self, generation: Generation, context: Context | None) -> Job:
        """What the scheduler must know. max_tokens is cut to what the sequence may still hold."""
        position = context.sequence.computed if context else 0
        known = (len(context.sequence.tokens) if context else 0) + len(generation.prompt)
        if known == position:
            raise InvalidRequest("there is nothing to compute: the prompt has no tokens")
        if known >= self.longest:
            raise PromptTooLong(
                f"context and prompt have {known} tokens; at most {self.longest - 1} leave room to answer: "
                f"the model allows {self._max_context}, the host and disk budgets decide the rest"
            )
        generation.max_tokens = min(generation.request.max_tokens, self.longest - known)
        blocks = highest_block(known + generation.max_tokens)
        return Job(
            id=generation.job,
            position=position,
            known=known,
            chunk=self._chunk_tokens if generation.request.prompt_logprobs is None else PROMPT_LOGPROB_CHUNK,
            window=context is None,
            blocks=max(0, blocks - (context.sequence.table.promised if context else 0)),
        )

    def _admit(self, generation: Generation) -> None:
        context = generation.context
        if context is None:
            context = Context(new_handle(), Sequence(self._store.open(), self._arena.take()))
            generation.context = context
        sequence = context.sequence
        first = len(sequence.tokens)
        sequence.tokens.extend(generation.prompt)
        sequence.table.idle = False
        self._store.promise(sequence.table, highest_block(len(sequence.tokens) + generation.max_tokens))
        self._send(generation, generation.begin(first, sequence, self.model.tokenizer))

    def _slices(self, plan: Plan) -> tuple[list[Slice], list[Generation]]:
        """The plan as slices of a packed batch, with room for the blocks that they will seal."""
        slices: list[Slice] = []
        generations = []
        row = 0
        for job, count in plan.run:
            generation = self._generations[job]
            sequence = _sequence(generation)
            newest = sequence.computed + count - 1
            try:
                self._store.grow(
                    sequence.table, sequence.hashes(len(sequence.table.chain), sealed_by(newest))
                )
            except OffloadError as error:
                self._abort(generation, StorageFailed(f"{error}; raise the host or the disk budget"))
                continue
            slices.append(Slice(sequence, row, count, sequence.computed))
            generations.append(generation)
            row += count
        return slices, generations

    def _kept(self, generation: Generation, part: Slice) -> range:
        """Rows of the slice whose logits are needed."""
        if generation.request.prompt_logprobs is not None and not generation.produced:
            return range(part.count)
        last = part.last + 1 == len(part.sequence.tokens)
        return range(part.count - 1, part.count) if last else range(0)

    def _advance(self, generation: Generation, part: Slice, logits: Logits) -> None:
        """Take in a step's result for one request: progress, a token, or the end."""
        if part.failure is not None:
            self._recompute(generation, part.failure)
            return
        sequence = part.sequence
        sequence.computed += part.count
        complete = sequence.computed == len(sequence.tokens)
        self._scheduler.advance(generation.job, part.count, int(complete))
        if not generation.produced:
            self._note_prompt(generation, part, logits)
            self._send(generation, generation.progress(sequence))
        if complete:
            self._sample(generation, sequence, logits[-1])

    def _note_prompt(self, generation: Generation, part: Slice, logits: Logits) -> None:
        count = generation.request.prompt_logprobs
        if count is None:
            return
        tokens = part.sequence.tokens
        for position, row in enumerate(logits, part.position + 1):
            if generation.first <= position < len(tokens):
                logprob, top = logprobs(row, tokens[position], count)
                generation.prompt_logprobs.append(
                    PromptLogprob(token=tokens[position], logprob=logprob, top=top)
                )

    def _sample(self, generation: Generation, sequence: Sequence, logits: Logits) -> None:
        try:
            choice = generation.sampler.choose(logits, len(sequence.tokens), sequence.tokens)
        except SpilldError as error:
            self._abort(generation, error)
            return
        ends = choice.token in self.model.geometry.eos and not generation.request.ignore_eos
        event, stopped = generation.token(choice, silent=ends)
        self._send(generation, event)
        if not ends:  # an end-of-text is no part of the context: what is appended later goes on before it
            sequence.tokens.append(choice.token)
        if ends or stopped:
            self._finish(generation, "eos" if ends else "stop")
        elif len(generation.produced) >= generation.max_tokens:
            self._finish(generation, "length")

    def _recompute(self, generation: Generation, failure: Exception) -> None:
        """KV did not come back. It is never guessed: all of it is computed again, a few times at most."""
        if generation.recomputed >= RECOMPUTES:
            self._abort(
                generation, StorageFailed(f"KV was lost {RECOMPUTES + 1} times, the last time: {failure}")
            )
            return
        log.warning("request %s is computed again: %s", generation.request.request_id, failure)
        generation.recomputed += 1
        generation.restart()
        sequence = _sequence(generation)
        self._runner.rest()
        self._store.reset(sequence.table)
        sequence.computed = 0
        self._scheduler.rewind(generation.job)

    # Ends.

    def cancel(self, client: bytes, request_id: str) -> None:
        """End a request; one that has ended already is ignored."""
        for generation in list(self._generations.values()):
            if (generation.client, generation.request.request_id) == (client, request_id):
                self._abort(generation, Cancelled("cancelled by the client"))

    def release(self, handle: str) -> None:
        """Give an idle context back. Raises ContextNotFound."""
        self._discard(self.contexts.claim(handle).sequence)

    def fail_running(self, error: SpilldError) -> None:
        """A step broke: the KV of everything that ran in it is in doubt and goes with it."""
        for generation in list(self._generations.values()):
            if generation.started:
                self._abort(generation, error)

    def fail_all(self, error: SpilldError) -> None:
        for generation in list(self._generations.values()):
            self._abort(generation, error)

    def close(self) -> None:
        self._runner.rest()
        self._store.close()

    def _finish(self, generation: Generation, reason: str) -> None:
        context = generation.context
        assert context is not None
        kv_bytes = self._kv_bytes(context.sequence)
        kept = generation.request.keep or generation.request.context is not None
        event = generation.done(reason, kv_bytes, context.handle if kept else None)
        self._remove(generation, context if kept else None)
        self._send(generation, event)

    def _abort(self, generation: Generation, error: SpilldError) -> None:
        """Fail a request. A continued context survives a cancel, with what was appended so far."""
        harmless = isinstance(error, Cancelled | DeadlineExceeded) or not generation.started
        kept = generation.request.context is not None and harmless
        self._remove(generation, generation.context if kept else None)
        self._send(generation, generation.failed(error))

    def _remove(self, generation: Generation, keep: Context | None) -> None:
        self._runner.rest()
        self._scheduler.remove(generation.job)
        del self._generations[generation.job]
        if keep is not None:
            keep.messages = _chat(keep.messages, generation)
            keep.sequence.table.idle = True
            self._store.promise(keep.sequence.table, keep.sequence.table.stop - 1)
            self.contexts.keep(keep)
        elif generation.context is not None:
            self._discard(generation.context.sequence)

    def _discard(self, sequence: Sequence) -> None:
        self._store.forget(sequence.table)
        self._arena.give_back(sequence.window)

    def _kv_bytes(self, sequence: Sequence) -> dict[str, int]:
        """Where the KV lies: exact tokens on the device, records where they are served from."""
        shape = self._arena.shape
        exact = sequence.computed - (sequence.table.stop - 1) * BLOCK
        token = 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
        return {"device": exact * token, **self._store.usage(sequence.table)}

    def _send(self, generation: Generation, event: Event) -> None:
        self._post(generation.client, event)


def _sequence(generation: Generation) -> Sequence:
    assert generation.context is not None
    return generation.context.sequence


def _chat(before: tuple[Message, ...] | None, generation: Generation) -> tuple[Message, ...] | None:
    """The chat that a context holds after a request; None once anything but messages went into it."""
    asked = generation.request.prompt
    new = tuple(message for message in asked if isinstance(message, Message))
    if not generation.started:
        return before
    if not new or len(new) != len(asked) or (generation.request.context is not None and before is None):
        return None
    return (*(before or ()), *new, Message(role="assistant", content=generation.text))
