"""Session commands: list, change and release sessions for clients, and end those that have expired."""

from __future__ import annotations

import logging

from spilld.errors import InvalidRequest
from spilld.kv.sequence import KVSequence
from spilld.protocol.messages import (
    ChangeSession,
    ListSessions,
    Release,
    Released,
    Reply,
    Sessions,
)
from spilld.requests.requests import Requests
from spilld.runner.sequence_manager import SequenceManager
from spilld.sessions.idle_contexts import Contexts, Key
from spilld.sessions.store import Session

from .manager import SessionManager

log = logging.getLogger(__name__)


class SessionCommands:
    """Carries out clients' requests about sessions, between two steps."""

    def __init__(
        self, sessions: SessionManager, contexts: Contexts, sequences: SequenceManager, requests: Requests
    ) -> None:
        self._sessions = sessions
        self._contexts = contexts
        self._sequences = sequences
        self._requests = requests

    def manage(self, request: Release | ListSessions | ChangeSession) -> Reply:
        """List or change sessions.

        Raises:
            ContextNotFound: There is no such session.
            InvalidRequest: The session is in use, or the change is invalid.
        """
        if isinstance(request, Release):
            key = (request.tenant, request.context)
            self.refuse_if_busy(key)
            if self._sessions.store.get(*key).listed:  # a named session ends by `delete` only
                self._drop(key)
            else:
                self._release(key)
            return Released(request_id=request.request_id, context=request.context)
        if isinstance(request, ListSessions):
            sessions = self._sessions.store.of(request.tenant)
        else:
            sessions = self._change(request)
        infos = tuple(self._sessions.info(session, self._in_use(session.key)) for session in sessions)
        return Sessions(request_id=request.request_id, sessions=infos)

    def refuse_if_busy(self, key: Key) -> None:
        """Refuse a change of a session that is in use.

        Raises:
            InvalidRequest: A request runs or waits on this session.
        """
        if self._requests.on_session(key) is not None:
            raise InvalidRequest(f"a request runs on session {key[1]!r}: wait for it, or cancel it first")

    def tend(self) -> None:
        """End sessions that have expired, and pin KV that was written meanwhile."""
        for key in self._sessions.store.expired():
            if self._requests.on_session(key) is None:
                log.info("session %s has expired", key[1][:8])
                self._release(key)
        self._sessions.keep_what_waits()

    def _change(self, request: ChangeSession) -> list[Session]:
        key = (request.tenant, request.session)
        if request.action in ("rename", "delete"):
            self.refuse_if_busy(key)
        if request.action in ("fork", "rename") and request.into is not None:
            self.refuse_if_busy((request.tenant, request.into))  # which would overwrite it
        if request.action == "delete":
            self._release(key)
            return []
        changed = self._sessions.change(request)
        running = self._requests.on_session(changed.key)
        if running is not None and running.session is not None:
            running.session = changed
        if request.action == "rename" and (sequence := self._contexts.claim(key)) is not None:
            self._contexts.keep(sequence, changed.key)
        return [changed]

    def _release(self, key: Key) -> None:
        self._sessions.forget(key)
        self._drop(key)

    def _drop(self, key: Key) -> None:
        """Discard what a session has in memory."""
        if (sequence := self._contexts.claim(key)) is not None:
            self._sequences.discard(sequence)

    def _in_use(self, key: Key) -> tuple[KVSequence | None, bool]:
        """Return the sequence of a session, if it is in memory, and whether a request runs on it."""
        running = self._requests.on_session(key)
        if running is not None and running.session is not None:
            return running.sequence, True
        return self._contexts.get(key), False
