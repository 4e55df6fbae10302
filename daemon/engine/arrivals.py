"""Arrivals: new requests, those of the last process, and those whose session has become free."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from spilld.engine.sessions.manager import Chat, SessionManager
from spilld.errors import (
    InternalError,
    InvalidRequest,
    PromptTooLong,
    SpilldError,
    StorageFailed,
)
from spilld.kv.attention_span import highest_block, longest_with
from spilld.kv.sequence import KVSequence
from spilld.models.model import Model
from spilld.monitoring.failures import is_lost, typed
from spilld.offload.store.store import Store
from spilld.protocol.messages import Event, Generate
from spilld.requests.request_state import NO_CLIENT, Phase, RequestState
from spilld.requests.requests import Requests
from spilld.runner.sequence_manager import SequenceManager
from spilld.scheduler.scheduler import Job, Scheduler
from spilld.sessions.idle_contexts import Contexts, new_handle
from spilld.sessions.journal import Journal, JournalEntry, Unfinished

from .finisher import Finisher

log = logging.getLogger(__name__)

LIVES = 3
"""Processes in a row that may crash without progress of a request before it is failed."""

PROMPT_LOGPROB_CHUNK = 64
"""The most tokens of a step whose logits are all wanted, which take 4 bytes * vocabulary each."""

Composed = Callable[[tuple[list[int], list[int]] | SpilldError], None]
Compose = Callable[[Chat, Composed], None]


class Arrivals:
    """Takes requests up to the scheduler's queue.

    Attributes:
        compose: Makes prompts of messages in another thread, which may take long, and calls back in the
            engine's thread; without it they are made in place.
    """

    def __init__(
        self,
        model: Model,
        requests: Requests,
        scheduler: Scheduler,
        sequences: SequenceManager,
        contexts: Contexts,
        sessions: SessionManager,
        store: Store,
        journal: Journal,
        finisher: Finisher,
        *,
        max_context: int,
        chunk_tokens: int,
    ) -> None:
        self.compose: Compose | None = None
        self._model = model
        self._requests = requests
        self._scheduler = scheduler
        self._sequences = sequences
        self._contexts = contexts
        self._sessions = sessions
        self._store = store
        self._journal = journal
        self._finisher = finisher
        self._max_context = max_context
        self._chunk_tokens = chunk_tokens
        self._jobs = 0

    @property
    def longest(self) -> int:
        """The most tokens that one sequence may have: what the model allows and the store can hold."""
        return min(self._max_context, longest_with(self._store.capacity))

    # Called by the engine.

    def add(self, client: bytes, request: Generate, prompt: list[int], arrived: float | None) -> None:
        """Take a new request. See Engine.add."""
        if self._requests.find(request.request_id) is not None:
            raise InvalidRequest(
                f"id is {request.request_id!r}, which is in flight; allowed: 128 random bits"
            )
        if self._journal.is_of_another_tenant(request.tenant, request.request_id):
            raise InvalidRequest(
                f"id is {request.request_id!r}, which is another's; allowed: 128 random bits"
            )
        entry = JournalEntry(
            request=_seeded(request),
            prompt=tuple(prompt),
            handle=new_handle() if request.keep else None,
            fingerprint=self._model.fingerprint,
            arrived=time.time() if arrived is None else arrived,
        )
        state = self._new(client, entry)
        try:
            if self._requests.add(state):
                self._begin(state, [])
            state.journal_id = self._journal.begin(entry)
        except BaseException:
            self._finisher.remove(state, keep=True)
            raise

    def restore(self, left: Unfinished) -> None:
        """Take up a request of the last process, or end it for good.

        No client listens to it until its client resumes it.
        """
        state = self._new(NO_CLIENT, left.entry)
        state.journal_id, state.next_seq = left.number, len(left.events)
        may_begin = self._requests.add(state)
        try:
            self._refuse_hopeless(left)
            if may_begin:
                self._begin(state, left.events)
        except Exception as error:  # noqa: BLE001 (the client gets it, or it is raised)
            log.error("request %s is set aside: %s", state.request.request_id, error)
            self._cannot_begin(state, error)

    def _refuse_hopeless(self, left: Unfinished) -> None:
        if left.lives > LIVES:
            raise InternalError(f"{LIVES} daemons in a row ended before it got any further; send it again")
        if left.entry.fingerprint != self._model.fingerprint:
            raise StorageFailed("the daemon came back with another model; send the request again")

    def begin_due(self) -> bool:
        """Begin the requests whose session is free now.

        A request that cannot begin is ended, and the next one on its session is due.

        Returns:
            Whether there was one.
        """
        any_due = False
        while (state := self._requests.next_due()) is not None:
            any_due = True
            try:
                self._begin(state, [])
            except Exception as error:  # noqa: BLE001 (the client gets it, or it is raised)
                self._cannot_begin(state, error)
        return any_due

    def _new(self, client: bytes, entry: JournalEntry) -> RequestState:
        self._jobs += 1
        return RequestState(self._jobs, client, entry)

    # On the way to the queue.

    def _begin(self, state: RequestState, sent: list[Event]) -> None:
        """Begin a request, which has its session from now on; `sent`: events that the last process sent."""
        request = state.request
        state.session = self._sessions.session(request, state.handle)
        session, chat = state.session, None
        if session is not None:
            state.prompt = self._sessions.prompt(request, state.prompt, session)
            chat = self._sessions.chat(request, session, self.longest)
        if chat is None:
            self._enqueue(state, sent)
        elif self.compose is None:
            state.prompt, state.turns = chat()
            self._enqueue(state, sent)
        else:
            state.phase = Phase.COMPOSING
            self.compose(chat, partial(self._composed, state, sent))

    def _composed(
        self, state: RequestState, sent: list[Event], made: tuple[list[int], list[int]] | SpilldError
    ) -> None:
        """Take the composed prompt of a request, or the error; ignore a request that has ended meanwhile."""
        if state.phase is not Phase.COMPOSING:
            return
        try:
            if isinstance(made, SpilldError):
                raise made
            state.prompt, state.turns = made
            self._enqueue(state, sent)
        except Exception as error:  # noqa: BLE001 (the client gets it, or it is raised)
            self._cannot_begin(state, error)

    def _cannot_begin(self, state: RequestState, error: Exception) -> None:
        self._finisher.abort(state, typed(error, "the request cannot begin"))
        if is_lost(error):
            raise error

    def _enqueue(self, state: RequestState, sent: list[Event]) -> None:
        """Queue a request whose prompt is known for admission."""
        key = state.key
        sequence = None if key is None else self._contexts.get(key)
        if state.session is not None:
            state.history = [] if sequence else list(state.session.tokens)
            if sequence is not None and _is_computed(sequence, state):
                self._sequences.discard(self._contexts.claim(state.session.key) or sequence)
                sequence, state.history = None, list(state.session.tokens)
        before = sequence.tokens if sequence else state.history
        self._refuse_unknown("the session", before)
        self._refuse_unknown("the prompt", state.prompt)
        state.prepare(before, self._model.tokenizer, self._model.geometry.eos, sent)
        state.sequence = sequence
        try:
            job = self.job(state)
        except SpilldError:
            state.sequence = None
            raise
        if key is not None:
            self._contexts.claim(key)
        state.phase = Phase.WAITING
        self._scheduler.add(job)

    def _refuse_unknown(self, what: str, tokens: list[int]) -> None:
        """Raise InvalidRequest for token ids that the model has no embedding of."""
        vocabulary = self._model.geometry.vocab
        if (largest := max(tokens, default=0)) >= vocabulary:
            raise InvalidRequest(
                f"{what} holds token {largest}, which is not below the vocabulary of {vocabulary}"
            )

    def job(self, state: RequestState) -> Job:
        """Return a request as the scheduler sees it, its max_tokens cut to what the sequence may still hold.

        Raises:
            InvalidRequest: There is nothing to compute.
            PromptTooLong: The request does not fit.
        """
        sequence = state.sequence
        position = 0 if sequence is None else sequence.computed
        before = state.history if sequence is None else sequence.tokens
        known = len(before) + len(state.prompt)
        if known == position and not state.appends:
            raise InvalidRequest("there is nothing to compute: the prompt has no tokens")
        longest, room = (self.longest, "fit") if state.appends else (self.longest - 1, "leave room to answer")
        if known > longest:
            raise PromptTooLong(
                f"context and prompt have {known} tokens; at most {longest} {room}: "
                f"{self._advice(of_session=bool(state.request.session and before))}"
            )
        state.completion.max_tokens = min(state.request.max_tokens, self.longest - known)
        blocks = highest_block(known + state.completion.max_tokens)
        answer = len(state.completion.in_sequence)
        whole_prompt = state.request.prompt_logprobs is not None
        geometry = self._model.geometry
        return Job(
            id=state.job,
            position=position,
            known=max(position, known + answer - state.held_back),
            chunk=max(PROMPT_LOGPROB_CHUNK, geometry.grid) if whole_prompt else self._chunk_tokens,
            window=sequence is None,
            blocks=max(0, blocks - (sequence.table.reserved if sequence else 0)),
            flow=state.flow,
            alone=answer + 1 if geometry.states and not state.appends else 0,
            preemptible=self._store.disk is not None and not whole_prompt,
        )

    def _advice(self, *, of_session: bool) -> str:
        """Return which limit decides `longest`, and what to do about it."""
        instead = "fork the session with fewer tokens, or begin another" if of_session else "shorten it"
        allowed = self._model.geometry.max_positions
        if self.longest < self._max_context:
            return f"the host and disk budgets hold no more; {instead}, or raise host_budget or disk_budget"
        if self._max_context < allowed:
            return f"max_context is {self._max_context}; {instead}, or raise max_context"
        return f"the model allows {allowed}; {instead}, or serve a model with a longer context"


def _is_computed(sequence: KVSequence, state: RequestState) -> bool:
    """Return whether nothing is left to compute, so that there would be no logits.

    What is on disk never includes the last token.
    """
    return not (state.prompt or state.appends or sequence.computed < len(sequence.tokens))


def _seeded(request: Generate) -> Generate:
    """Return the request with a seed, so that another process can continue it."""
    if request.sampling.seed is not None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=secrets.randbits(64)))
