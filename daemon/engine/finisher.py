"""Ends of requests: finished, failed or cancelled, and what they leave of their session."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from spilld.engine.sessions.manager import SessionManager
from spilld.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    SpilldError,
)
from spilld.monitoring.failures import is_lost, logged, typed
from spilld.offload.store.store import Store
from spilld.requests.request_state import RequestState
from spilld.requests.requests import Requests
from spilld.runner.runner import Runner
from spilld.runner.sequence_manager import SequenceManager
from spilld.scheduler.scheduler import Scheduler
from spilld.sessions.idle_contexts import Contexts

from .outbox import Outbox

log = logging.getLogger(__name__)


class Finisher:
    """Gives each request its last event, and takes back what it used."""

    def __init__(
        self,
        requests: Requests,
        scheduler: Scheduler,
        sequences: SequenceManager,
        contexts: Contexts,
        sessions: SessionManager,
        store: Store,
        runner: Runner,
        outbox: Outbox,
    ) -> None:
        self._requests = requests
        self._scheduler = scheduler
        self._sequences = sequences
        self._contexts = contexts
        self._sessions = sessions
        self._store = store
        self._runner = runner
        self._outbox = outbox

    @contextmanager
    def blaming(self, state: RequestState) -> Iterator[None]:
        """End this request, and no other, if an error is raised within the context.

        Raises:
            DeviceError: The device is lost.
        """
        try:
            yield
        except Exception as error:
            if is_lost(error):
                raise
            self.abort(state, typed(error, "the request failed"))

    def finish(self, state: RequestState) -> None:
        """End a request that has produced everything."""
        state.completion.conclude()
        sequence, session, tokens = state.running_sequence, state.session, self._sessions.tokens_after(state)
        after = None if session is None else self._sessions.after(session, state, tokens)
        continues = self._leave(state, tokens)
        form, handle = str(self._store.layouts.format), session.name if session else None
        event = state.done(self._sessions.kv_bytes(sequence), form, handle)
        self._outbox.put(state, event, after)
        self.remove(state, keep=continues and session is not None)

    def abort(self, state: RequestState, error: SpilldError) -> None:
        """Fail a request, even if cleaning up fails.

        Its session survives a cancel, with what was appended and what was sent of the answer; after an error
        of the daemon it is what it was before.
        """
        session, after = state.session, None
        known = session is not None and (session.listed or bool(session.tokens))
        harmless = isinstance(error, Cancelled | DeadlineExceeded | Draining)
        keep = known and state.sequence is not None and state.sequence.table.idle
        if harmless and state.started:
            try:
                tokens = self._sessions.tokens_after(state)
                if session is not None and known:
                    after = self._sessions.after(session, state, tokens)
                keep = self._leave(state, tokens) and known
            except Exception as failure:
                if is_lost(failure):
                    raise
                log.exception("what request %s had appended is lost", state.request.request_id)
                after, keep = None, False
        self._outbox.put(state, state.failed(error), after)
        self.remove(state, keep=keep)

    def abort_all(self, error: SpilldError, *, running: bool) -> None:
        """Fail every request, or only those that run."""
        for state in self._requests:
            if not running or (state.started and state.sequence is not None):
                self.abort(state, error)

    def suspend_all(self) -> None:
        """Save what runs, to be continued in the next process; requests that are not in the journal fail."""
        for state in self._requests:
            if not state.journal_id:
                why = "the daemon has stopped, and could not save this request"
                self.abort(state, Draining(why))
            elif state.started and state.sequence is not None:
                with logged("what was computed of a request is not saved, and is computed again"):
                    self._sequences.save(state.sequence, state.checkpoint)

    def remove(self, state: RequestState, *, keep: bool) -> None:
        """Forget a request.

        Args:
            state: The request.
            keep: Whether its session continues with its sequence, which then stays in memory.
        """
        self._scheduler.remove(state.job)
        self._requests.remove(state)
        with logged("what a request used is not given back"):
            if state.sequence is not None:
                self._runner.rest()
            self._give_back(state, keep=keep)

    def _leave(self, state: RequestState, tokens: list[int]) -> bool:
        """Save what was computed of a request that ends; its sequence holds `tokens` from now on.

        Returns:
            False if the sequence cannot be continued.
        """
        if (sequence := state.sequence) is None:
            return False
        continues = self._sequences.reaches(sequence, tokens)
        self._sequences.save(sequence, state.checkpoint if continues else None)
        self._sequences.end(sequence, tokens)
        return continues

    def _give_back(self, state: RequestState, *, keep: bool) -> None:
        sequence, session = state.sequence, state.session
        if sequence is not None and keep and session is not None:
            sequence.table.idle = True
            self._store.reserve(sequence.table, sequence.table.stop - 1)
            self._contexts.keep(sequence, session.key)
        elif sequence is not None:
            self._sequences.discard(sequence)
