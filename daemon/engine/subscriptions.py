"""Subscriptions: which client receives which request's events, over lost and resumed connections."""

from __future__ import annotations

from spilld.errors import RequestNotFound, StorageFailed
from spilld.protocol.messages import Event, Resume, is_last
from spilld.requests.request_state import NO_CLIENT
from spilld.requests.requests import Requests
from spilld.sessions.journal import Journal

from .outbox import Outbox


class Subscriptions:
    """Connects clients to requests, between two steps. Unknown requests are ignored, except by `resume`."""

    def __init__(self, requests: Requests, journal: Journal, outbox: Outbox) -> None:
        self._requests = requests
        self._journal = journal
        self._outbox = outbox

    def acknowledge(self, request_id: str, next_seq: int, tenant: str | None = None) -> None:
        """Note that a client has all events of a request before `next_seq`."""
        if (state := self._requests.find(request_id, tenant)) is not None:
            state.acknowledged = max(state.acknowledged, next_seq)

    def leave(self, client: bytes, request_id: str) -> None:
        """Note that a client is gone; if the request is its own, it may be resumed later."""
        state = self._requests.find(request_id)
        if state is not None and state.client == client:
            state.listen(NO_CLIENT)

    def resume(self, client: bytes, request: Resume) -> list[Event]:
        """Send the events of a request to this client from now on.

        Returns:
            The events that it has missed.

        Raises:
            RequestNotFound: The request never arrived, or ended long ago.
            StorageFailed: Some of the events are lost.
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
            if request.next_seq + len(missed) < state.next_seq:
                raise StorageFailed("events of this request could not be written to disk and are lost")
            state.listen(client)
            state.acknowledged = request.next_seq
        return missed
