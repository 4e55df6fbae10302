"""Requests that the service works on for clients, and which client gets which replies."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

from spilld.errors import (
    FrameTooLarge,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    SpilldError,
)
from spilld.protocol.messages import Failed, Reply, is_last
from spilld.protocol.wire import encode
from spilld.transport.router import Full, Gone

from .service_interface import Service

Send = Callable[[bytes, list[bytes], bool], None]
"""Sends frames to a client, as an answer to what it just asked or not. Raises Full or Gone."""

ClientRequest = tuple[bytes, str]
"""A client and the id of a request whose events it gets."""


@dataclass
class InFlightRequest:
    """A request that the service works on for a client."""

    account: str | bytes
    next_seq: int = 0
    heard: bool = True  # its client still gets events; else only its last event is awaited here
    resumed: bool = False  # another client may still have it, until the first event confirms the resume


class InFlightRequests:
    """Every request in flight, by client and request id.

    Args:
        send: Sends frames to a client.
        on_failed: Called with the code of every error that is sent.
    """

    def __init__(self, send: Send, on_failed: Callable[[str], None]) -> None:
        self.service: Service
        """Set before the first request comes."""
        self._send_frames = send
        self._on_failed = on_failed
        self._requests: dict[ClientRequest, InFlightRequest] = {}
        self._owed: dict[ClientRequest, Failed] = {}  # could not be sent yet: the client's queue is full

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def owes(self) -> bool:
        """Whether an error still waits for room in a client's queue."""
        return bool(self._owed)

    def add(self, client: bytes, request_id: str, request: InFlightRequest) -> None:
        """Add a request, whose replies the client gets from now on."""
        self._requests[client, request_id] = request

    def open_of(self, account: str | bytes) -> int:
        """Return how many requests an account has open."""
        return sum(request.account == account for request in self._requests.values())

    def refuse_repeated(self, request_id: str) -> None:
        """Refuse a request id that is in flight.

        Raises:
            InvalidRequest: It is in flight.
        """
        if any(known == request_id for _, known in self._requests):
            raise InvalidRequest(f"id is {request_id!r}, which is in flight; allowed: 128 random bits")

    def deliver(self, client: bytes, reply: Reply) -> None:
        """Send a reply of the service; it is dropped if its request is not in flight."""
        key = client, reply.request_id
        if (request := self._requests.get(key)) is None:
            return
        if request.resumed and not isinstance(reply, Failed):
            self._take_over(key)
        if request.heard:
            self._forward(key, reply)
        if is_last(reply):
            self._requests.pop(key, None)

    def send(self, client: bytes, message: Reply, *, answer: bool = False) -> bool:
        """Send a message to a client.

        If the client cannot take it because it reads too slowly, its requests are cancelled; if it is gone,
        they may be resumed.

        Args:
            client: The client's name.
            message: The reply.
            answer: Whether it answers at once what the client just asked.

        Returns:
            Whether the message was sent.
        """
        try:
            self._send_frames(client, encode(message), answer)
        except Full:
            self._give_up(client)
            return False
        except Gone:
            self.forget(client)
            return False
        if isinstance(message, Failed):
            self._on_failed(message.code)
        return True

    def send_owed(self) -> None:
        """Send the errors that clients' queues had no room for, where there is room now."""
        for key, failed in list(self._owed.items()):
            if self.send(key[0], failed):
                self._owed.pop(key, None)

    def forget(self, client: bytes) -> None:
        """Forget a client that is gone; its requests go on without it."""
        for key in [key for key in self._requests if key[0] == client]:
            del self._requests[key]
            self.service.leave(*key)
        self._owed = {key: failed for key, failed in self._owed.items() if key[0] != client}

    def fail_all(self, error: SpilldError, but: Container[str]) -> None:
        """End every request with an error of the server's own, except those with these ids."""
        for key in [key for key in self._requests if key[1] not in but]:
            self._fail(key, error)

    def _take_over(self, key: ClientRequest) -> None:
        """Drop any other client of a request whose resume has succeeded."""
        self._requests[key].resumed = False
        for other in [other for other in self._requests if other[1] == key[1] and other != key]:
            del self._requests[other]

    def _forward(self, key: ClientRequest, reply: Reply) -> None:
        try:
            if self.send(key[0], reply):
                self._requests[key].next_seq = reply.seq + 1
        except (FrameTooLarge, ProtocolError) as error:
            self._fail(key, error)
            self.service.cancel(key[1])

    def _give_up(self, client: bytes) -> None:
        """Cancel the requests of a client that reads too slowly; the error is sent as soon as it can be."""
        slow = Overloaded("events came faster than this client read them; read on, or ask for less")
        for key, request in self._requests.items():
            if key[0] == client and request.heard:
                request.heard = False
                self.service.cancel(key[1])
                self._owed[key] = Failed.because(slow, key[1], request.next_seq)

    def _fail(self, key: ClientRequest, error: SpilldError) -> None:
        """End a request, for its client, with an error of the server's own."""
        request = self._requests.get(key)
        if request is not None and request.heard:
            failed = Failed.because(error, key[1], request.next_seq)
            request.heard = not self.send(key[0], failed)
