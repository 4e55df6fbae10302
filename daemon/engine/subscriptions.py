"""Which client hears of which request: lost connections, resumed ones, and what was missed."""

from __future__ import annotations

from spilld.errors import RequestNotFound, StorageFailed
from spilld.protocol.messages import Event, Resume, is_last
from spilld.requests.request_state import NOBODY
from spilld.requests.requests import Requests
from spilld.sessions.journal import Journal

from .outbox import Outbox


class Subscriptions:
    """Between two steps. Unknown requests are ignored, except by `resume`."""

    def __init__(self, requests: Requests, journal: Journal, outbox: Outbox) -> None:
        self._requests = requests
        self._journal = journal
        self._outbox = outbox

    def acknowledge(self, request_id: str, next_seq: int, tenant: str | None = None) -> None:
        """A client has all events of a request before next_seq."""
        if (state := self._requests.find(request_id, tenant)) is not None:
            state.acknowledged = max(state.acknowledged, next_seq)

    def leave(self, client: bytes, request_id: str) -> None:
        """A client is gone; if the request is its, it may resume it later."""
        state = self._requests.find(request_id)
        if state is not None and state.client == client:
            state.listen(NOBODY)

    def resume(self, client: bytes, request: Resume) -> list[Event]:
        """Let a client have the events of a request from now on.

        Returns:
            Those that it has missed.

        Raises:
            RequestNotFound: It never arrived, or ended long ago.
            StorageFailed: Some of them are lost.
        """
        self._outbox.flush()  # or a new event would be taken for a lost one
        state = self._requests.find(request.request_id)
        number = self._journal.find(request.tenant, request.request_id)
        if number is None:
            raise RequestNotFound(
                f"no request {request.request_id!r} is known here: it never arrived, or ended long ago"
            )
        missed = self._journal.events(number, request.next_seq)
        if state is None and not (missed and is_last(missed[-1])):
            raise StorageFailed("the end of this request could not be written to disk and is lost")
        if state is not None:
            if request.next_seq + len(missed) < state.told:
                raise StorageFailed("events of this request could not be written to disk and are lost")
            state.listen(client)
            state.acknowledged = request.next_seq
        return missed
