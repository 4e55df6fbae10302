"""Admission: gives an admitted request a window and its stored beginning, and announces expected times."""

from __future__ import annotations

from spilld.cuda_ext.errors import OutOfMemory
from spilld.engine.sessions.manager import SessionManager
from spilld.errors import DeadlineExceeded, Overloaded
from spilld.kv.attention_span import highest_block
from spilld.kv.sequence import KVSequence
from spilld.monitoring.stats import Counters
from spilld.offload.store.store import Store
from spilld.requests.request_state import Phase, RequestState
from spilld.requests.requests import Requests
from spilld.runner.sequence_manager import SequenceManager
from spilld.scheduler.latency import LatencyModel
from spilld.scheduler.prefill_budget import PrefillBudget
from spilld.scheduler.scheduler import Scheduler

from .finisher import Finisher
from .outbox import Outbox

HOPELESS = 2.0
"""A prompt whose expected time exceeds the time left to its deadline by this factor is not begun."""


class Admission:
    """Starts the requests that the scheduler has admitted."""

    def __init__(
        self,
        requests: Requests,
        scheduler: Scheduler,
        sequences: SequenceManager,
        sessions: SessionManager,
        store: Store,
        finisher: Finisher,
        outbox: Outbox,
        counters: Counters,
        prefill: PrefillBudget,
        latency: LatencyModel,
    ) -> None:
        self._requests = requests
        self._scheduler = scheduler
        self._sequences = sequences
        self._sessions = sessions
        self._store = store
        self._finisher = finisher
        self._outbox = outbox
        self._counters = counters
        self._prefill = prefill
        self._latency = latency

    def start(self, states: list[RequestState]) -> None:
        """Start these requests in order; a request that cannot start is ended."""
        for state in states:
            self._scheduler.start(state.job)
            state.phase = Phase.RUNNING
        for state in states:
            with self._finisher.blaming(state):
                self._start(state)

    def _start(self, state: RequestState) -> None:
        token_s = self._token_s()
        sequence = self._open(state) if state.sequence is None else state.sequence
        first = len(sequence.tokens)
        sequence.table.idle = False  # it differs from its session from here on
        sequence.tokens.extend(state.prompt)
        most = len(sequence.tokens) + state.completion.max_tokens
        self._store.reserve(sequence.table, highest_block(most))
        sequence.tokens.extend(state.completion.in_sequence)
        if not sequence.computed and state.request.prompt_logprobs is None:
            self._reuse(state, sequence)
        first_token_s = self._scheduler.first_token_s(state.job)
        for event in state.begin(first, sequence, first_token_s, token_s):
            self._outbox.put(state, event)
        if (hopeless := self._hopeless(state, sequence)) is not None:
            self._finisher.abort(state, hopeless)
        elif state.complete(sequence) or (state.completion.reason and not state.appends):
            self._finisher.finish(state)

    def _open(self, state: RequestState) -> KVSequence:
        root = self._sessions.root(state.request.tenant)
        try:
            state.sequence = self._sequences.open(root, state.history)
        except OutOfMemory as error:
            raise Overloaded(f"there is no memory for its window: {error}") from error
        return state.sequence

    def _reuse(self, state: RequestState, sequence: KVSequence) -> None:
        """Take over what an earlier request computed of the same beginning."""
        found = self._sequences.find(sequence)
        self._counters.prefix_hits += found
        self._counters.prefix_misses += not found
        state.parting = self._sequences.parting(sequence)
        self._scheduler.reuse(state.job, sequence.computed, state.parting)

    def _token_s(self) -> float | None:
        """Return the expected time of a decode step once the prompts of all running requests are computed."""
        return self._latency.token_s([len(self._requests[job].tokens) for job in self._scheduler.running])

    def _hopeless(self, state: RequestState, sequence: KVSequence) -> DeadlineExceeded | None:
        """Return why the deadline is missed by far, or None if it may be met.

        An idle engine always tries: its measurements may be outdated, and only steps correct them.
        """
        alone = self._prefill.seconds(sequence.computed, len(sequence.tokens) - sequence.computed)
        idle = len(self._scheduler.running) == 1
        if idle or not self._prefill.measured or alone <= HOPELESS * state.left_s:
            return None
        left = max(state.left_s, 0.0)
        return DeadlineExceeded(
            f"its prompt alone would take about {alone:.1f} s, {left:.1f} are left; give it more"
        )
