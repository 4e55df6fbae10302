"""The ROUTER side: requests in, events out. It knows clients and request ids, nothing of models.

The loop runs in one thread and blocks only in its poll. The service works in threads of its own and hands
events to `Server.post`, which wakes the poll through a pipe. Signals wake it so, too: one that comes just
before the poll would else wait until it ends.
"""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Protocol, Self

from spilld.errors import (
    Draining,
    FrameTooLarge,
    InternalError,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    SpilldError,
)
from spilld.monitoring.sd_notify import Notifier
from spilld.protocol.messages import (
    Acknowledge,
    Cancel,
    ChangeSession,
    Failed,
    Generate,
    Hello,
    ListSessions,
    Release,
    Reply,
    Request,
    Resume,
    Stats,
    StatsReply,
    TransferRequest,
    Welcome,
    is_last,
)
from spilld.protocol.wire import decode_request, encode
from spilld.transport.authentication import Gate
from spilld.transport.early_reader import EarlyReader
from spilld.transport.listener import listen
from spilld.transport.router import Full, Gone, Received

from .limits import Account, Limits

log = logging.getLogger(__name__)

POLL_S = 0.1
"""The longest poll while something has to be looked at again: a drain, a client that reads too slowly."""

BATCH = 64
"""Requests handled, or events sent, before the others have their turn."""

AFFORDABLE = 65536
"""Items that a prompt may have whatever the model takes: the service says so then."""


class Service(Protocol):
    """What the server needs of an engine. No method may block; all are called from the server's thread.

    Events go to `Server.post(client, event)`: per request Accepted, ..., and one Done or Failed at the end,
    also after a cancel, with seq 0, 1, 2, ... Once the last is posted, the same id may be submitted again.
    A request goes on without a client until another resumes it.
    """

    def submit(self, client: bytes, request: Generate) -> None:
        """Take a request. An immediate refusal (Overloaded, ContextNotFound, ...) is raised."""

    def resume(self, client: bytes, request: Resume) -> None:
        """Post what the client has missed of a request, and from then on its events; or Failed."""

    def cancel(self, request_id: str, tenant: str | None = None) -> None:
        """End a request soon; one that has ended, or is of another tenant if one is given, is ignored."""

    def acknowledge(self, request_id: str, next_seq: int, tenant: str | None = None) -> None:
        """All events of a request before next_seq have come to its client. Ignored as in `cancel`."""

    def leave(self, client: bytes, request_id: str) -> None:
        """A client is gone that heard of a request."""

    def manage(self, client: bytes, request: Release | ListSessions | ChangeSession) -> None:
        """List or change sessions, or give a context back; one reply is posted."""

    def transfer(self, client: bytes, request: TransferRequest) -> None:
        """Make, move or take an archive; one reply is posted."""

    def stats(self) -> dict[str, object]:
        """Plain data for StatsReply."""

    def welcome(self) -> Welcome:
        """What is served; the server fills in the request id."""

    def drain(self) -> None:
        """Admit nothing more; what is admitted goes on."""

    def progress(self) -> int:
        """A number that grows as long as the work goes on, and while there is none; it stays when the engine
        hangs."""

    def idle(self) -> bool:
        """True when no request is running or queued, and the last event of each is posted."""

    def stop(self) -> frozenset[str]:
        """Stop now; the ids of requests that go on when the daemon is back. Called once, when the loop has
        ended."""


Key = tuple[bytes, str]
"""A client and the id of a request that it hears of."""


@dataclass
class _InFlight:
    """A request that the service works on for a client."""

    account: str | bytes
    next_seq: int = 0
    heard: bool = True  # its client still waits for events; else only the last is waited for, here
    resumed: bool = False  # another client may have had it, until the first event shows that this one does


class Server:
    """Serves one address. `post`, `drain`, `reload` and `stop` may be called from any thread.

    `notifier` tells systemd how the daemon is. drain_seconds and limits may be changed while it runs.

    with Server(address) as server:  # listens from here on: an address in use fails before a model is loaded
        server.run(Engine(post=server.post))
    """

    def __init__(
        self,
        address: str,
        *,
        drain_seconds: float = 30.0,
        send_queue: int = 16384,
        open_to_group: bool = False,
        on_failed: Callable[[str], None] = lambda code: None,
        keys: Path | None = None,
        max_open: int = 32,
        max_rate: float = 1000.0,
        max_connections: int = 1000,
    ) -> None:
        """send_queue: messages that may wait for a client before it counts as too slow. open_to_group: the
        socket is its owner's group's, too. on_failed: told the code of every error that is sent. keys: a
        folder that `spilld keys` made; clients must then have one of them. max_open, max_rate: requests that
        a client may have open, messages that it may send in a second. max_connections: of all clients.

        ConfigError if something in the folder of keys is wrong.
        """
        self.address = address
        self._gate = None if keys is None else Gate(keys)
        self.limits = Limits(max_open, max_rate)
        self._open_to_group = open_to_group
        self.drain_seconds = drain_seconds
        self._send_queue = send_queue
        self._max_connections = max_connections
        self._early: deque[Received] = deque()  # what came before `run`
        self._on_failed = on_failed
        self.notifier = Notifier()
        self._posted: deque[tuple[bytes, Reply]] = deque()
        self._running: dict[Key, _InFlight] = {}
        self._owed: dict[Key, Failed] = {}  # could not be sent yet: the client's queue is full
        self._drain_asked = self._stop_asked = self._reload_asked = self._closed = False
        self._drain_by: float | None = None
        self._open = ExitStack()  # what `close` has to undo
        # closed with the object, not with the socket: a late post must not write into a reused descriptor
        self._woken_fd, self._wake_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for end in (self._woken_fd, self._wake_fd):
            weakref.finalize(self, os.close, end)

    def post(self, client: bytes, event: Reply) -> None:
        """Send an event to a client; from any thread. Dropped if its request is no longer running."""
        if not self._closed:
            self._posted.append((client, event))
            self._wake()

    def drain(self) -> None:
        """Refuse new requests; `run` returns when the running ones have ended or after drain_seconds."""
        self._drain_asked = True
        self._wake()

    def reload(self) -> None:
        """Have settings read again, soon; nothing once a drain has begun."""
        self._reload_asked = True
        self._wake()

    def stop(self) -> None:
        """`run` fails what is running and returns."""
        self._stop_asked = True
        self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it is full: the poll will wake
            os.write(self._wake_fd, b"\0")

    def __enter__(self) -> Self:
        """Listen; requests wait until `run`. ConfigError if the address cannot be had."""
        listening = listen(
            self.address,
            self._send_queue,
            self._gate,
            open_to_group=self._open_to_group,
            max_connections=self._max_connections,
        )
        self._router, self.address = self._open.enter_context(listening)
        self._early_reader = self._open.enter_context(EarlyReader(self._router))
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._open.close()

    def run(self, service: Service, on_reload: Callable[[], None] | None = None) -> None:
        """Serve until a drain or a stop is over, asked for by method or by signal (SIGTERM or SIGINT: the
        first drains, the second stops; only in the main thread).

        on_reload reads settings again, in this thread; without it there are none, and SIGHUP is as before.
        """
        self._service = service
        self._most_items = max(AFFORDABLE, service.welcome().max_context)
        self._on_reload = on_reload
        self._early.extend(self._early_reader.stop())
        with self._signals():
            self._startup()
            try:
                while not self._finished():
                    self._turn()
            finally:
                self._shutdown()

    def _startup(self) -> None:
        self._poll = select.poll()
        self._poll.register(self._router, select.POLLIN)
        self._poll.register(self._woken_fd, select.POLLIN)
        self.notifier.ready()

    def _turn(self) -> None:
        ready = dict(self._poll.poll(math.ceil(self._patience_s() * 1000)))
        if self._woken_fd in ready:
            os.read(self._woken_fd, 65536)
        self._router.turn()
        self._receive()
        for client in self._router.departed():
            self._part(client)
        self._deliver()
        self._pay_owed()
        if self._drain_asked and self._drain_by is None:
            self._begin_drain()
        if self._reload_asked:
            self._reload()
        self.notifier.alive(self._service.progress())

    def _patience_s(self) -> float:
        if self._posted or self._early:
            return 0.0
        if self._owed or self._drain_asked:
            return min(POLL_S, self._router.wait_s())
        return min(self.notifier.due_s(), self._router.wait_s())

    def _finished(self) -> bool:
        if self._stop_asked or self._drain_by is None:
            return self._stop_asked
        over = self._service.idle() and not self._posted and not self._owed
        return over or time.monotonic() >= self._drain_by

    def _begin_drain(self) -> None:
        log.info("draining: %d requests, at most %g s", len(self._running), self.drain_seconds)
        self._drain_by = time.monotonic() + self.drain_seconds
        self.notifier.stopping(f"draining {len(self._running)} requests")
        self._service.drain()

    def _reload(self) -> None:
        self._reload_asked = False
        if self._on_reload is not None and not self._drain_asked:
            self.notifier.reloading()
            self._on_reload()
            self.notifier.ready()

    def _shutdown(self) -> None:
        if self._drain_by is None:
            self.notifier.stopping("stopping")
        saved = self._service.stop()
        while self._posted:
            self._deliver()
        for key in [key for key in self._running if key[1] not in saved]:
            self._fail(key, Draining("the daemon stopped before this request was done; send it again"))
        self._closed = True

    # requests

    def _receive(self) -> None:
        for _ in range(BATCH):
            received = self._early.popleft() if self._early else self._router.receive()
            if received is None:
                return
            self._take(received.client, received.key, received.frames)

    def _take(self, client: bytes, key: str, frames: Sequence[bytes]) -> None:
        """One message of a client."""
        request_id, seq = "", 0
        try:
            message = decode_request(frames, self._most_items)
            request_id = message.request_id
            seq = message.next_seq if isinstance(message, Resume) else 0
            guest = None if self._gate is None else self._gate.guest(key)
            account = self.limits.account(client, guest)
            self.limits.count(account, time.monotonic())
            self._handle(client, message if guest is None else guest.admit(message), account)
        except SpilldError as error:
            self._send(client, Failed.because(error, request_id or error.request_id, seq), answer=True)
        except Exception:
            log.exception("request %r failed", request_id)
            bug = InternalError("a bug in spilld; see its log")
            self._send(client, Failed.because(bug, request_id, seq), answer=True)

    def _handle(self, client: bytes, message: Request, account: Account) -> None:
        match message:
            case Generate():
                self._start(client, message, account)
            case Resume(request_id=request_id, next_seq=next_seq):
                self._service.resume(client, message)
                self._running[client, request_id] = _InFlight(account.name, next_seq, resumed=True)
            case Acknowledge(request_id=request_id, next_seq=next_seq, tenant=tenant):
                self._service.acknowledge(request_id, next_seq, tenant)
            case Cancel(request_id=request_id, tenant=tenant):
                self._service.cancel(request_id, tenant)
            case Release() | ListSessions() | ChangeSession():
                self._refuse(message.request_id, account)
                self._service.manage(client, message)
                self._running[client, message.request_id] = _InFlight(account.name)
            case TransferRequest():
                self._refuse(message.request_id, account)
                self._service.transfer(client, message)
                self._running[client, message.request_id] = _InFlight(account.name)
            case Hello(request_id=request_id):
                self._send(client, replace(self._service.welcome(), request_id=request_id), answer=True)
            case Stats(request_id=request_id):
                reply = StatsReply(request_id=request_id, values=self._service.stats())
                self._send(client, reply, answer=True)

    def _start(self, client: bytes, request: Generate, account: Account) -> None:
        self._refuse(request.request_id, account)
        if self._drain_asked:
            raise Draining("the daemon is stopping; send the request again in a moment")
        self._service.submit(client, request)
        self._running[client, request.request_id] = _InFlight(account.name)

    def _refuse(self, request_id: str, account: Account) -> None:
        """InvalidRequest for an id that is in flight, Overloaded if the account has too many open."""
        if any(name == request_id for _, name in self._running):
            raise InvalidRequest(f"id is {request_id!r}, which is in flight; allowed: 128 random bits")
        of_it = sum(flight.account == account.name for flight in self._running.values())
        self.limits.admit(account, of_it)

    # events

    def _deliver(self) -> None:
        for _ in range(min(BATCH, len(self._posted))):
            client, event = self._posted.popleft()
            key = client, event.request_id
            if (flight := self._running.get(key)) is None:
                continue
            if flight.resumed and not isinstance(event, Failed):
                self._take_over(key)
            if flight.heard:
                self._forward(key, event)
            if is_last(event):
                self._running.pop(key, None)

    def _take_over(self, key: Key) -> None:
        """The resume has succeeded: any other client that had the request hears no more of it."""
        self._running[key].resumed = False
        for other in [other for other in self._running if other[1] == key[1] and other != key]:
            del self._running[other]

    def _forward(self, key: Key, event: Reply) -> None:
        try:
            if self._send(key[0], event):
                self._running[key].next_seq = event.seq + 1
        except (FrameTooLarge, ProtocolError) as error:
            self._fail(key, error)
            self._service.cancel(key[1])

    def _send(self, client: bytes, message: Reply, *, answer: bool = False) -> bool:
        """False if the client cannot take it: its requests are cancelled if it is slow, and may be
        resumed if it is gone."""
        try:
            self._router.send(client, encode(message), answer=answer)
        except Full:
            self._give_up(client)
            return False
        except Gone:
            self._part(client)
            return False
        if isinstance(message, Failed):
            self._on_failed(message.code)
        return True

    def _give_up(self, client: bytes) -> None:
        """Cancel the requests of a client that reads too slowly; it is told as soon as that can be sent."""
        slow = Overloaded("events came faster than this client read them; read on, or ask for less")
        for key, flight in self._running.items():
            if key[0] == client and flight.heard:
                flight.heard = False
                self._service.cancel(key[1])
                self._owed[key] = Failed.because(slow, key[1], flight.next_seq)

    def _part(self, client: bytes) -> None:
        """Forget a client that is gone."""
        for key in [key for key in self._running if key[0] == client]:
            del self._running[key]
            self._service.leave(*key)
        self._owed = {key: failed for key, failed in self._owed.items() if key[0] != client}

    def _fail(self, key: Key, error: SpilldError) -> None:
        """End a running request, for its client, with an error of the server's own."""
        flight = self._running.get(key)
        if flight is not None and flight.heard:
            failed = Failed.because(error, key[1], flight.next_seq)
            flight.heard = not self._send(key[0], failed)

    def _pay_owed(self) -> None:
        for key, failed in list(self._owed.items()):
            if self._send(key[0], failed):
                self._owed.pop(key, None)

    # signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {signal.SIGTERM: self._on_signal, signal.SIGINT: self._on_signal}
        if self._on_reload is not None:
            handlers[signal.SIGHUP] = self._on_hangup
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        wakes = signal.set_wakeup_fd(self._wake_fd, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakes)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._drain_asked:
            self.stop()
        else:
            self.drain()

    def _on_hangup(self, _number: int, _frame: FrameType | None) -> None:
        self.reload()
