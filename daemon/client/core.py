"""The client without a socket: request ids, queues, sequence numbers, deadlines, reconnection.

ClientSocket moves frames between a socket and this; Client and AsyncClient wait. Times are `time.monotonic()`
seconds.
"""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Callable, Sequence

from spilld.errors import (
    AccessDenied,
    DeadlineExceeded,
    InvalidRequest,
    ProtocolError,
    RequestNotFound,
    SpilldError,
    Unreachable,
)
from spilld.protocol.messages import (
    Acknowledge,
    Cancel,
    Event,
    Failed,
    Generate,
    Reply,
    Request,
    Resume,
)
from spilld.protocol.wire import decode, encode

from .pending_request import PendingRequest

FRESH_S = 1.0
"""How long a failed attempt to connect counts as current: others follow within a fifth of that."""

QUEUED_S = 0.1
"""How long replies of a daemon that went away may still be queued in libzmq."""

ACKNOWLEDGED = 64
"""How many events are acknowledged at a time."""

KEPT = 16384
"""How many events of a request are kept until they are taken; then it pauses at the daemon."""


class ClientCore:
    """Every request in flight on one connection. Frames to send are appended to `outbox`."""

    def __init__(
        self,
        address: str,
        tenant: str,
        connect_timeout: float,
        reconnect_s: float,
        on_lost: Callable[[float], None] | None = None,
    ) -> None:
        self.address = address
        self.tenant = tenant
        self.connect_timeout = connect_timeout
        self.reconnect_s = reconnect_s
        self._on_lost = on_lost
        self.connected = False
        self.refused = False
        """Whether the daemon does not admit this client; no further attempt is made."""
        self._turned_away = "", 0.0  # why, and until when that counts as current
        self.closed = False
        self.outbox: deque[list[bytes]] = deque()
        self._pending: dict[str, PendingRequest] = {}

    def next_id(self) -> str:
        """Make a request id: 128 random bits, because whoever knows it may cancel the request."""
        return secrets.token_hex(16)

    def start(self, request: Request, now: float, timeout: float | None = None) -> PendingRequest:
        """Send a request.

        Args:
            request: The request.
            now: The time.
            timeout: After how many seconds it is cancelled; None for never.

        Raises:
            InvalidRequest: A field is wrong; nothing is sent.
            FrameTooLarge: The request is too large; nothing is sent.
            Unreachable: This client is closed.
            AccessDenied: The daemon does not admit this client.
        """
        if self.closed:
            raise Unreachable("this client is closed")
        if self.refused:
            raise self.unreachable(now)
        frames = encode(request)
        deadline = None if timeout is None else now + timeout
        pending = PendingRequest(request, deadline=deadline, connect_by=now + self.connect_timeout)
        self._pending[pending.request_id] = pending
        self.outbox.append(frames)
        return pending

    def take(self, pending: PendingRequest, now: float) -> Reply | None:
        """Return the next reply; None if there is none yet, or none any more (see `PendingRequest.open`).

        Raises:
            SpilldError: What ended the request.
        """
        if pending.open and (error := self._overdue(pending, now)) is not None:
            self.cancel(pending, error)
        if pending.replies:
            reply = pending.replies.popleft()
            self._acknowledge(pending)
            return reply
        if pending.error is not None:
            raise pending.error
        return None

    def _acknowledge(self, pending: PendingRequest) -> None:
        """Acknowledge events, so that the daemon goes on, if that is due and further events can be kept."""
        due = pending.lasts and pending.next_seq - pending.acknowledged >= ACKNOWLEDGED
        if due and pending.open and len(pending.replies) < KEPT:
            pending.acknowledged = pending.next_seq
            self.outbox.append(encode(Acknowledge(request_id=pending.request_id, next_seq=pending.next_seq)))

    def _overdue(self, pending: PendingRequest, now: float) -> SpilldError | None:
        if pending.deadline is not None and now >= pending.deadline:
            pending.replies.clear()
            return DeadlineExceeded("the timeout of this request has passed; it was cancelled")
        give_up = self._give_up(pending)
        if give_up is None or now < give_up:
            return None
        if pending.lost_by is not None:
            return self._gone(pending, now)
        return self.unreachable(now)

    def _give_up(self, pending: PendingRequest) -> float | None:
        """When the missing connection ends a request; None for never."""
        if pending.lost_by is not None or self.connected:
            return pending.lost_by
        return pending.connect_by

    def wait_s(self, pending: PendingRequest, now: float) -> float | None:
        """Return after how many seconds `take` must be called if no frame arrives; None for never."""
        times = [moment for moment in (pending.deadline, self._give_up(pending)) if moment is not None]
        return max(0.0, min(times) - now) if times else None

    def ask_to_cancel(self, pending: PendingRequest) -> None:
        """Ask the daemon to stop a request that has not ended: the daemon's reply ends it."""
        if pending.open:
            self.outbox.append(encode(Cancel(request_id=pending.request_id)))

    def cancel(self, pending: PendingRequest, error: SpilldError | None = None) -> None:
        """Ask the daemon to stop a request that has not ended; it ends here at once. From any thread."""
        if pending.open:
            self.ask_to_cancel(pending)
            self._end(pending, error)
        if error is None:
            pending.replies.clear()

    def _end(self, pending: PendingRequest, error: SpilldError | None = None) -> None:
        self._pending.pop(pending.request_id, None)
        pending.open, pending.error = False, error
        pending.changed()

    def end(self, error: SpilldError) -> None:
        """End the request that an error names, or all requests if it names none."""
        for pending in list(self._pending.values()):
            if error.request_id in ("", pending.request_id):
                self._end(pending, error)

    def received(self, frames: Sequence[bytes]) -> None:
        """Route a reply to its request. An error that names no request ends all of them."""
        try:
            reply = decode(frames)
            if not isinstance(reply, Reply):
                raise ProtocolError(f"the daemon sent a request: {type(reply).__name__}")
            if isinstance(reply, Failed) and not reply.request_id:
                raise reply.error()
        except SpilldError as error:
            wrong = ProtocolError(f"from the daemon: {error}") if isinstance(error, InvalidRequest) else error
            wrong.request_id = error.request_id
            self.end(wrong)
            return
        pending = self._pending.get(reply.request_id)
        if pending is None or reply.seq < pending.next_seq:  # a repeat has been handled before
            return
        if isinstance(reply, Failed) and self._begins_anew(pending, reply):
            self.outbox.append(encode(pending.request))
        else:
            self._route(pending, reply)

    def _begins_anew(self, pending: PendingRequest, failed: Failed) -> bool:
        """Whether the request was lost with the connection, before the daemon had it."""
        lost = (
            pending.resuming and failed.code == RequestNotFound.code and isinstance(pending.request, Generate)
        )
        pending.resuming = False
        return lost and pending.next_seq == 0

    def _route(self, pending: PendingRequest, reply: Reply) -> None:
        if reply.seq > pending.next_seq:
            self.cancel(
                pending,
                ProtocolError(f"reply {reply.seq} came where {pending.next_seq} was due: one is lost"),
            )
            return
        pending.next_seq += 1
        if isinstance(reply, Failed):
            self._end(pending, reply.error())
            return
        pending.replies.append(reply)
        pending.note(reply)
        if pending.done is not None or not isinstance(reply, Event):
            self._end(pending)
        self._acknowledge(pending)
        pending.changed()

    def connection_made(self) -> None:
        """Note that the daemon is there, first or again: generations are resumed."""
        self.connected, self._turned_away = True, ("", 0.0)
        for pending in self._pending.values():
            if pending.lost_by is not None and pending.lasts:
                pending.lost_by, pending.resuming = None, True
                self._resume(pending)

    def _resume(self, pending: PendingRequest) -> None:
        pending.acknowledged = pending.next_seq
        resume = Resume(request_id=pending.request_id, tenant=self.tenant, next_seq=pending.next_seq)
        self.outbox.append(encode(resume))

    def connection_lost(self, now: float) -> None:
        """Note that the daemon is gone; if it comes back, it still knows the generations that it had."""
        if not self.connected:  # only an attempt to connect has failed
            return
        self.connected = False
        for pending in list(self._pending.values()):
            pending.lost_by = now + (max(self.reconnect_s, QUEUED_S) if pending.lasts else QUEUED_S)
            pending.changed()
        if self._on_lost is not None and any(pending.lasts for pending in self._pending.values()):
            self._on_lost(self.reconnect_s)

    def turned_away(self, why: str, now: float, *, final: bool) -> None:
        """Note that the daemon ended the attempt to connect.

        Args:
            why: The reason, for an error.
            now: The time.
            final: Whether libzmq does not try again.
        """
        self._turned_away = why, math.inf if final else now + FRESH_S
        if final:
            self.refused = True
            self.end(self.unreachable(now))

    def close(self) -> None:
        """Cancel every request; no other can start."""
        for pending in list(self._pending.values()):
            if pending.lasts:
                self.outbox.append(encode(Cancel(request_id=pending.request_id)))
        self.closed = True
        self.end(Unreachable("this client was closed"))

    def _gone(self, pending: PendingRequest, now: float) -> SpilldError:
        if now < self._turned_away[1]:
            return self.unreachable(now)
        if not pending.lasts:
            return Unreachable(f"the daemon at {self.address} went away; its log says why")
        return Unreachable(
            f"the daemon at {self.address} went away and was not back within {self.reconnect_s:g} s; its log "
            f"says why. It keeps the request for a while: resume({pending.request_id!r})"
        )

    def unreachable(self, now: float, waited_s: float | None = None) -> SpilldError:
        """Make the error that says why there is no connection.

        Args:
            now: The time.
            waited_s: How many seconds were waited for it, if not connect_timeout.
        """
        why, until = self._turned_away
        waited = self.connect_timeout if waited_s is None else waited_s
        if now < until:
            return AccessDenied(f"the daemon at {self.address} does not let this client in: {why}")
        return Unreachable(
            f"no daemon answered at {self.address} within {waited:g} s; start one with `spilld serve`"
        )
