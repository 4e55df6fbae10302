"""Outbox: events on their way to clients, written to the journal together, then sent in order."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from spilld.engine.sessions.manager import SessionManager
from spilld.monitoring.failures import typed
from spilld.monitoring.stats import Counters
from spilld.protocol.messages import (
    Done,
    Event,
    Reply,
    is_last,
)
from spilld.requests.request_state import RequestState
from spilld.scheduler.scheduler import JobId
from spilld.sessions.journal import Journal
from spilld.sessions.store import Session

log = logging.getLogger(__name__)

Post = Callable[[bytes, Reply], None]

Noted = tuple[RequestState, Event, Session | None]
"""An event of a request and, with the last, what its session is from then on."""


class Outbox:
    """Makes events durable before it sends them, all pending ones in one transaction."""

    def __init__(
        self,
        journal: Journal,
        sessions: SessionManager,
        counters: Counters,
        post: Post,
        publish: Callable[[], None],
    ) -> None:
        """Create an empty outbox.

        Args:
            journal: Where events are noted.
            sessions: Where sessions are written, in the same database.
            counters: Counts every event.
            post: Sends an event to a client.
            publish: Called before events are sent, so that a client that has an event finds it in the stats.
        """
        self._journal = journal
        self._sessions = sessions
        self._counters = counters
        self._post = post
        self._publish = publish
        self._pending: deque[Noted] = deque()

    def put(self, state: RequestState, event: Event, session: Session | None = None) -> None:
        """Count an event of a request; the next `flush` sends it.

        Args:
            state: The request.
            event: Its next event.
            session: With the last event, what its session is now. The session manager returns it at once; it
                is written to disk in one transaction with the event.
        """
        self._counters.event(event, state.uncounted)
        state.uncounted = 0
        state.next_seq = event.seq + 1
        if session is not None:
            self._sessions.hold(session)
        self._pending.append((state, event, session))

    def flush(self) -> None:
        """Write all events to the journal and send them.

        An event that cannot be written is sent all the same: its request, or the end of its request, will not
        outlive this process unless a later transaction succeeds.
        """
        if not self._pending:
            return
        unnoted = self._note(list(self._pending))
        self._publish()
        while self._pending:
            state, event, _ = self._pending.popleft()
            if state.job in unnoted and isinstance(event, Done):
                event = replace(event, saved=state.session is None)
            self._post(state.client, event)

    def _note(self, batch: Sequence[Noted]) -> set[JobId]:
        """Write all events together; if that fails, those of each request separately.

        So a request whose events cannot be written costs no other its events.

        Returns:
            The jobs whose events could not be written.
        """
        if self._try_to_note(batch) is None:
            return set()
        parts: dict[JobId, list[Noted]] = {}
        for noted in batch:
            parts.setdefault(noted[0].job, []).append(noted)
        failures = {job: error for job, part in parts.items() if (error := self._try_to_note(part))}
        for job, error in failures.items():
            self._give_up(parts[job], error)
        return set(failures)

    def _try_to_note(self, batch: Sequence[Noted]) -> Exception | None:
        """Write a batch in one transaction; return the error if it fails."""
        sessions = [session for _, _, session in batch if session is not None]
        try:
            with self._journal.transaction():
                self._sessions.store.write_pending(sessions)
                for state, event, _ in batch:
                    self._journal.note(state.journal_id, event)
        except Exception as error:  # noqa: BLE001 (it is logged)
            return error
        self._sessions.store.drop_pending(sessions)
        return None

    def _give_up(self, batch: Sequence[Noted], error: Exception) -> None:
        """Keep the last event of a request in memory for a later transaction, as its session is kept."""
        for state, event, _ in batch:
            if is_last(event):
                self._journal.owe(state.journal_id, event)
        request_id, failure = batch[0][0].request.request_id, typed(error, "the state folder")
        log.error("events of request %s will not outlive this process: %s", request_id, failure)
