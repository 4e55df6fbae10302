"""Steps: a packed batch of requests is computed, and each request takes its part of the results."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from spilld.cuda_ext.errors import OutOfMemory
from spilld.errors import Overloaded, SpilldError, StorageFailed
from spilld.kv.attention_span import BLOCK, CELL, sealed_by
from spilld.kv.batch import BatchItem
from spilld.kv.sequence import KVSequence
from spilld.monitoring.failures import is_lost, typed
from spilld.monitoring.metrics import Metrics
from spilld.monitoring.stats import Counters
from spilld.offload.errors import ExtentCorrupt, OffloadError
from spilld.offload.store.store import Store
from spilld.protocol.messages import PromptLogprob
from spilld.requests.request_state import RequestState
from spilld.requests.requests import Requests
from spilld.runner.runner import Runner
from spilld.runner.sampler import logprobs
from spilld.runner.sequence_manager import SequenceManager
from spilld.scheduler.fair_share import shares
from spilld.scheduler.latency import LatencyModel
from spilld.scheduler.prefill_budget import PrefillBudget
from spilld.scheduler.scheduler import Plan, Scheduler

from .finisher import Finisher
from .outbox import Outbox

log = logging.getLogger(__name__)

RECOMPUTES = 2
"""How often a request's lost KV is computed again before the request fails."""

Logits = np.ndarray[Any, np.dtype[np.float32]]
Part = tuple[RequestState, BatchItem]
"""A request and its tokens in the step."""


class StepExecutor:
    """Runs planned batches; an error with one request ends that request, and no other."""

    def __init__(
        self,
        requests: Requests,
        scheduler: Scheduler,
        sequences: SequenceManager,
        store: Store,
        runner: Runner,
        finisher: Finisher,
        outbox: Outbox,
        counters: Counters,
        metrics: Metrics,
        prefill: PrefillBudget,
        latency: LatencyModel,
        *,
        chunk_tokens: int,
    ) -> None:
        self._requests = requests
        self._scheduler = scheduler
        self._sequences = sequences
        self._store = store
        self._runner = runner
        self._finisher = finisher
        self._outbox = outbox
        self._counters = counters
        self._metrics = metrics
        self._prefill = prefill
        self._latency = latency
        self._chunk_tokens = chunk_tokens

    def batches(self, plan: Plan) -> list[Plan]:
        """Split a plan into what is computed together: all but suspects, each of which is computed alone."""
        alone = [part for part in plan if self._requests[part[0]].suspect]
        together = tuple(part for part in plan if part not in alone)
        return [batch for batch in (together, *((part,) for part in alone)) if batch]

    def run(self, batch: Plan) -> None:
        """Compute a batch, and send the resulting events."""
        began = time.monotonic()
        parts = self._parts(batch)
        if not parts:
            return
        slices = [part for _, part in parts]
        read, stalled = self._store.disk_read_bytes, self._store.stall_seconds
        self._note_first_steps(parts)
        try:
            logits = self._runner.run(slices, [_rows(state, part) for state, part in parts])
        except Exception as error:
            if is_lost(error):
                raise
            self._suspect([state for state, _ in parts], typed(error, "a step failed"))
            return
        read, stalled = self._store.disk_read_bytes - read, self._store.stall_seconds - stalled
        took = time.monotonic() - began
        self._charge(parts, took, stalled)
        self._metrics.step.observe(took)
        self._metrics.rows.observe(sum(part.count for part in slices))
        share = 1 / len(parts)
        for (state, part), rows in zip(parts, logits, strict=True):
            with self._finisher.blaming(state):
                state.account(part, int(read * share), stalled * share, took)
                self._counters.attended(part.read_bytes)
                self._advance(state, part, rows.numpy())
        self._outbox.flush()
        self._prepare_next(slices)
        self._learn(slices, time.monotonic() - began)

    # Before and after a batch.

    def _parts(self, batch: Plan) -> list[Part]:
        """Return the batch as items, with room in the store for the blocks that they will seal."""
        parts: list[Part] = []
        for job, count in batch:
            state = self._requests[job]
            sequence = state.running_sequence
            newest = sequence.computed + count - 1
            with self._finisher.blaming(state):
                hashes = sequence.hashes(len(sequence.table.chain), sealed_by(newest))
                try:
                    self._store.grow(sequence.table, hashes)
                except OffloadError as error:
                    raise StorageFailed(f"{error}; raise the host or the disk budget") from error
                parts.append((state, BatchItem(sequence, count, sequence.computed)))
        return parts

    def _note_first_steps(self, parts: Sequence[Part]) -> None:
        for state, _ in parts:
            if state.use.queue_s is None:
                state.use.queue_s = state.waited_s
                self._metrics.queue.observe(state.use.queue_s)

    def _charge(self, parts: Sequence[Part], seconds: float, stalled: float) -> None:
        """Charge each flow for its share of a step."""
        costs = [self._prefill.cost(part.position, part.count) for _, part in parts]
        reads = [part.read_bytes["disk"] for _, part in parts]
        for (state, _), share in zip(parts, shares(seconds, stalled, costs, reads), strict=True):
            self._scheduler.charge(state.job, share)
            state.use.engine_s += share

    def _prepare_next(self, slices: Sequence[BatchItem]) -> None:
        """Free host memory for what a step like this one seals."""
        prefills = any(part.count > 1 for part in slices)
        self._store.make_room((self._chunk_tokens if prefills else CELL) // BLOCK)
        self._store.write_behind()

    def _learn(self, slices: Sequence[BatchItem], seconds: float) -> None:
        """Report the step's time to the prefill budget or the latency model."""
        if chunks := [(part.position, part.count) for part in slices if part.count > 1]:
            self._prefill.took(chunks, seconds)
        else:
            host, disk = (sum(part.read_bytes[tier] for part in slices) for tier in ("host", "disk"))
            self._latency.took(len(slices), host, disk, seconds)

    # A request's part.

    def _advance(self, state: RequestState, part: BatchItem, logits: Logits) -> None:
        """Take a step's result for one request: progress, a token, or the end."""
        if part.failure is not None:
            self._recompute(state, part.failure)
            return
        sequence = part.sequence
        sequence.advance(part.count)
        state.uncounted += part.count
        complete = state.complete(sequence)
        self._scheduler.advance(state.job, part.count, int(complete and not state.appends))
        if state.wants_prompt:
            _note_prompt(state, part, logits)
        if not state.completion.tokens:
            self._outbox.put(state, state.progress(sequence))
        if complete and state.appends:
            self._finisher.finish(state)
            return
        if self._is_checkpoint(state, part, complete=complete):
            saved = self._sequences.save(sequence, state.checkpoint)
            state.checkpoint = saved if state.completion.tokens else None
        if complete:
            self._sample(state, sequence, logits[-1])

    def _is_checkpoint(self, state: RequestState, part: BatchItem, *, complete: bool) -> bool:
        """Return whether a checkpoint is due: after and amid a prompt, and in every cell of an answer.

        Those with a state are where a later prompt can go on: before the last token of the prompt, which is
        computed again for its logits, and where it parts from an earlier one. They are as rare in answers.
        """
        sequence, every = part.sequence, self._sequences.checkpoint_tokens
        now, answered = sequence.computed, bool(state.completion.tokens)
        if sequence.state is None:
            return now % (CELL if complete else every) == 0 or (complete and not answered)
        before_last = not answered and not complete and now == len(sequence.tokens) - 1
        return before_last or now == state.parting or now // every > part.position // every

    def _sample(self, state: RequestState, sequence: KVSequence, logits: Logits) -> None:
        choice = state.sampler.choose(logits, len(sequence.tokens), sequence.tokens)
        waits = self._metrics.next_token if state.completion.tokens else self._metrics.first_token
        waits.observe(state.waited_s)
        self._outbox.put(state, state.token(choice))
        if state.completion.reason != "eos":
            sequence.tokens.append(choice.token)
        if state.completion.reason:
            self._finisher.finish(state)

    # Failures.

    def _suspect(self, states: Sequence[RequestState], error: SpilldError) -> None:
        """Handle a failed step.

        Each of several requests is computed alone from then on, and so fails alone if it was the cause.
        Blocks that were to be sealed are in doubt and are computed again; the next step rewrites the rest.
        """
        if len(states) == 1:
            self._finisher.abort(states[0], error)
            return
        for state in states:
            state.suspect = True
            sequence = state.running_sequence
            if sequence.table.sealed < sequence.table.stop:
                with self._finisher.blaming(state):
                    self._begin_anew(state)

    def _recompute(self, state: RequestState, failure: Exception) -> None:
        """Compute a request again whose KV could not be read, a few times at most; KV is never guessed."""
        if state.recomputed >= RECOMPUTES:
            times = f"{RECOMPUTES + 1} times, the last time: {failure}"
            if isinstance(failure, OutOfMemory):
                self._finisher.abort(state, Overloaded(f"the device had no memory {times}"))
            else:
                self._finisher.abort(state, StorageFailed(f"KV was lost {times}"))
            return
        log.warning("request %s is computed again: %s", state.request.request_id, failure)
        self._counters.recomputations += 1
        state.recomputed += 1
        self._begin_anew(state, damaged=isinstance(failure, ExtentCorrupt))

    def _begin_anew(self, state: RequestState, *, damaged: bool = False) -> None:
        state.restart()
        self._sequences.restart(state.running_sequence, damaged=damaged)
        self._scheduler.rewind(state.job)


def _rows(state: RequestState, part: BatchItem) -> range:
    """Return the rows of the item whose logits are needed."""
    if state.wants_prompt:
        return range(part.count)
    last = part.last + 1 == len(part.sequence.tokens)
    return range(part.count - 1, part.count) if last else range(0)


def _note_prompt(state: RequestState, part: BatchItem, logits: Logits) -> None:
    """Take the log probabilities of prompt tokens from the logits before each."""
    count = state.request.prompt_logprobs or 0
    tokens = part.sequence.tokens
    for position, row in enumerate(logits, part.position + 1):
        if 0 <= position - state.first < len(state.prompt):
            logprob, top = logprobs(row, tokens[position], count)
            state.prompt_logprobs.append(PromptLogprob(token=tokens[position], logprob=logprob, top=top))
