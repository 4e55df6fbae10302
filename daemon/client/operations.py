"""What both clients can ask of the daemon besides generating."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spilld.protocol.messages import (
    ChangeSession,
    Exported,
    Hello,
    Imported,
    ListSessions,
    Release,
    Released,
    SessionInfo,
    Sessions,
    Stats,
    StatsReply,
    Welcome,
)

from .query import Operation, ask
from .transfer import download, upload

ASK_S = 10.0
"""Seconds that hello and stats wait: the daemon answers them between two polls."""

CHANGE_S = 120.0
"""Seconds that operations on sessions wait: the daemon does them between two steps."""


class Operations:
    """Makes the operations of one client.

    Args:
        tenant: The tenant whose sessions they concern.
        next_id: Makes a request id.
    """

    def __init__(self, tenant: str, next_id: Callable[[], str]) -> None:
        self._tenant = tenant
        self._next_id = next_id

    def hello(self, timeout: float) -> Operation[Welcome]:
        """Ask what the daemon serves; see Client.hello."""
        return (yield from ask(Hello(request_id=self._next_id()), Welcome, timeout))

    def stats(self) -> Operation[dict[str, object]]:
        """Ask for counters and gauges by name."""
        return (yield from ask(Stats(request_id=self._next_id()), StatsReply, ASK_S)).values

    def release(self, context: str) -> Operation[None]:
        """Release a context handle."""
        request = Release(request_id=self._next_id(), tenant=self._tenant, context=context)
        yield from ask(request, Released, CHANGE_S)

    def sessions(self) -> Operation[tuple[SessionInfo, ...]]:
        """List the tenant's sessions, ordered by name."""
        request = ListSessions(request_id=self._next_id(), tenant=self._tenant)
        return (yield from ask(request, Sessions, CHANGE_S)).sessions

    def fork(self, session: str, into: str, tokens: int | None) -> Operation[SessionInfo]:
        """Make a session of the beginning of another."""
        return (yield from self._change("fork", session, into=into, tokens=tokens))[0]

    def rename(self, session: str, into: str) -> Operation[SessionInfo]:
        """Give a session another name."""
        return (yield from self._change("rename", session, into=into))[0]

    def pin(self, session: str) -> Operation[SessionInfo]:
        """Keep a session and its KV on disk."""
        return (yield from self._change("pin", session))[0]

    def unpin(self, session: str) -> Operation[SessionInfo]:
        """Let a session's KV be evicted again."""
        return (yield from self._change("unpin", session))[0]

    def expire(self, session: str, ttl_s: float | None) -> Operation[SessionInfo]:
        """Delete a session once it has not been used for ttl_s seconds."""
        return (yield from self._change("expire", session, ttl_s=ttl_s))[0]

    def delete(self, session: str) -> Operation[None]:
        """Delete a session."""
        yield from self._change("delete", session)

    def export_session(self, session: str, file: Path) -> Operation[Exported]:
        """Write a session to a new file."""
        return download(session, self._tenant, file, self._next_id)

    def import_session(self, file: Path, session: str) -> Operation[Imported]:
        """Make a session from a file."""
        return upload(file, session, self._tenant, self._next_id)

    def _change(self, action: str, session: str, **fields: Any) -> Operation[tuple[SessionInfo, ...]]:
        request = ChangeSession(
            request_id=self._next_id(), tenant=self._tenant, action=action, session=session, **fields
        )
        return (yield from ask(request, Sessions, CHANGE_S)).sessions
