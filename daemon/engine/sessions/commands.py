"""Where clients ask about sessions: listed, changed, given up; and what becomes of them in time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from spilld.errors import InvalidRequest
from spilld.kv.sequence import Sequence
from spilld.protocol.messages import (
    ChangeSession,
    ListSessions,
    Release,
    Released,
    Reply,
    Sessions,
)
from spilld.requests.request_state import Generation
from spilld.runner.sequence_manager import Sequences
from spilld.sessions.idle_contexts import Contexts, Key
from spilld.sessions.store import Session

from .manager import SessionKeeper

log = logging.getLogger(__name__)


class SessionDesk:
    """Between two steps. generations: all that run or wait now."""

    def __init__(
        self,
        keeper: SessionKeeper,
        contexts: Contexts,
        sequences: Sequences,
        generations: Callable[[], Iterable[Generation]],
    ) -> None:
        self._keeper = keeper
        self._contexts = contexts
        self._sequences = sequences
        self._generations = generations

    def manage(self, request: Release | ListSessions | ChangeSession) -> Reply:
        """List or change sessions. Raises ContextNotFound or InvalidRequest."""
        if isinstance(request, Release):
            key = (request.tenant, request.context)
            self.refuse_if_busy(key)
            if self._keeper.book.get(*key).listed:  # only `delete` ends what its user gave a name
                self._drop(key)
            else:
                self._release(key)
            return Released(request_id=request.request_id, context=request.context)
        if isinstance(request, ListSessions):
            sessions = self._keeper.book.of(request.tenant)
        else:
            sessions = self._change(request)
        infos = tuple(self._keeper.info(session, self._in_use(session.key)) for session in sessions)
        return Sessions(request_id=request.request_id, sessions=infos)

    def refuse_if_busy(self, key: Key) -> None:
        """InvalidRequest if a request runs or waits on this session."""
        if any(generation.key == key for generation in self._generations()):
            raise InvalidRequest(f"a request runs on session {key[1]!r}: wait for it, or cancel it first")

    def tend(self) -> None:
        """Which have expired, which are still to be pinned."""
        busy = {generation.key for generation in self._generations()}
        for key in self._keeper.book.expired():
            if key not in busy:
                log.info("session %s has expired", key[1][:8])
                self._release(key)
        self._keeper.keep_what_waits()

    def _change(self, request: ChangeSession) -> list[Session]:
        key = (request.tenant, request.session)
        if request.action in ("rename", "delete"):
            self.refuse_if_busy(key)
        if request.action in ("fork", "rename") and request.into is not None:
            self.refuse_if_busy((request.tenant, request.into))  # which would overwrite it
        if request.action == "delete":
            self._release(key)
            return []
        changed = self._keeper.change(request)
        if (running := self._running(changed.key)) is not None:
            running.session = changed
        if request.action == "rename" and (sequence := self._contexts.claim(key)) is not None:
            self._contexts.keep(sequence, changed.key)
        return [changed]

    def _release(self, key: Key) -> None:
        self._keeper.forget(key)
        self._drop(key)

    def _drop(self, key: Key) -> None:
        """Give up what a session has in memory."""
        if (sequence := self._contexts.claim(key)) is not None:
            self._sequences.discard(sequence)

    def _in_use(self, key: Key) -> tuple[Sequence | None, bool]:
        """The sequence of a session, if it is in memory, and whether a request runs on it."""
        running = self._running(key)
        if running is not None:
            return running.sequence, True
        return self._contexts.get(key), False

    def _running(self, key: Key) -> Generation | None:
        """The request that has a session."""
        return next((g for g in self._generations() if g.session and g.session.key == key), None)
