"""The ROUTER side: requests in, events out. It knows clients and request ids, not models.

The loop runs in one thread and blocks only in its poll. The service works in threads of its own and hands
events to `Server.post`, which wakes the poll through a pipe. Signals wake it the same way: one that comes
just before the poll would otherwise wait until it ends.
"""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

from spilld.errors import Draining, InternalError, SpilldError
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
)
from spilld.protocol.wire import decode_request
from spilld.transport.authentication import CurveAuthentication
from spilld.transport.early_reader import StartupReader
from spilld.transport.listener import listen
from spilld.transport.router import Received

from .in_flight import InFlightRequest, InFlightRequests
from .limits import Account, Limits
from .server_signals import handled_signals
from .service_interface import Service

log = logging.getLogger(__name__)

POLL_S = 0.1
"""The longest poll while something has to be looked at again: a drain, a client that reads too slowly."""

BATCH = 64
"""Requests handled, or events sent, before the other kind has its turn."""

AFFORDABLE = 65536
"""Items of a prompt that are always decoded: the service then refuses what the model cannot take."""


class Server:
    """Serves one address. `post`, `drain`, `reload` and `stop` may be called from any thread.

    `notifier` tells systemd the daemon's state. drain_seconds and limits may be changed while it runs.

        with Server(address) as server:  # listens from here on, so that a used address fails first
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
        """Prepare a server; it listens when its context is entered.

        Args:
            address: Where to listen; `address` is then the one that it has.
            drain_seconds: How long a drain waits for running requests.
            send_queue: Messages that may wait for a client before it counts as too slow.
            open_to_group: Whether an ipc socket is open to its owner's group, too.
            on_failed: Called with the code of every error that is sent.
            keys: A folder that `spilld keys` made; clients must then have one of its keys.
            max_open: Requests that a client may have open.
            max_rate: Messages that a client may send in a second.
            max_connections: Connections of all clients together.

        Raises:
            ConfigError: Something in the folder of keys is wrong.
        """
        self.address = address
        self._authentication = None if keys is None else CurveAuthentication(keys)
        self.limits = Limits(max_open, max_rate)
        self._open_to_group = open_to_group
        self.drain_seconds = drain_seconds
        self._send_queue = send_queue
        self._max_connections = max_connections
        self._received_early: deque[Received] = deque()  # what came before `run`
        self.notifier = Notifier()
        self._posted: deque[tuple[bytes, Reply]] = deque()
        self._in_flight = InFlightRequests(self._send_frames, on_failed)
        self._drain_asked = self._stop_asked = self._reload_asked = self._closed = False
        self._drain_by: float | None = None
        self._open = ExitStack()  # what `close` has to undo
        # closed with the object, not with the socket: a late post must not write into a reused descriptor
        self._woken_fd, self._wake_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for end in (self._woken_fd, self._wake_fd):
            weakref.finalize(self, os.close, end)

    def post(self, client: bytes, event: Reply) -> None:
        """Send an event to a client, from any thread; it is dropped if its request is no longer in flight."""
        if not self._closed:
            self._posted.append((client, event))
            self._wake()

    def drain(self) -> None:
        """Refuse new requests; `run` returns when the running ones have ended or after drain_seconds."""
        self._drain_asked = True
        self._wake()

    def reload(self) -> None:
        """Read settings again, soon; nothing happens once a drain has begun."""
        self._reload_asked = True
        self._wake()

    def stop(self) -> None:
        """Make `run` fail what is running and return."""
        self._stop_asked = True
        self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it is full: the poll will wake
            os.write(self._wake_fd, b"\0")

    def __enter__(self) -> Self:
        """Start to listen; requests wait until `run`.

        Raises:
            ConfigError: The address cannot be used.
        """
        listening = listen(
            self.address,
            self._send_queue,
            self._authentication,
            open_to_group=self._open_to_group,
            max_connections=self._max_connections,
        )
        self._router, self.address = self._open.enter_context(listening)
        self._startup_reader = self._open.enter_context(StartupReader(self._router))
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._open.close()

    def run(self, service: Service, on_reload: Callable[[], None] | None = None) -> None:
        """Serve until a drain or a stop has ended.

        Either is asked for by method, or by SIGTERM or SIGINT: the first signal drains, the second stops.
        Signals are handled only in the main thread.

        Args:
            service: The engine.
            on_reload: Reads settings again, in this thread; without it there are none, and SIGHUP is left as
                it was.
        """
        self._service = self._in_flight.service = service
        self._most_items = max(AFFORDABLE, service.welcome().max_context)
        self._on_reload = on_reload
        self._received_early.extend(self._startup_reader.stop())
        with handled_signals(self._signal_handlers(), self._wake_fd):
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
            self._in_flight.forget(client)
        self._deliver()
        self._in_flight.send_owed()
        if self._drain_asked and self._drain_by is None:
            self._begin_drain()
        if self._reload_asked:
            self._reload()
        self.notifier.alive(self._service.progress())

    def _patience_s(self) -> float:
        if self._posted or self._received_early:
            return 0.0
        if self._in_flight.owes or self._drain_asked:
            return min(POLL_S, self._router.wait_s())
        return min(self.notifier.due_s(), self._router.wait_s())

    def _finished(self) -> bool:
        if self._stop_asked or self._drain_by is None:
            return self._stop_asked
        over = self._service.idle() and not self._posted and not self._in_flight.owes
        return over or time.monotonic() >= self._drain_by

    def _begin_drain(self) -> None:
        log.info("draining: %d requests, at most %g s", len(self._in_flight), self.drain_seconds)
        self._drain_by = time.monotonic() + self.drain_seconds
        self.notifier.stopping(f"draining {len(self._in_flight)} requests")
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
        stopped = Draining("the daemon stopped before this request was done; send it again")
        self._in_flight.fail_all(stopped, but=saved)
        self._closed = True

    # requests

    def _receive(self) -> None:
        for _ in range(BATCH):
            received = self._received_early.popleft() if self._received_early else self._router.receive()
            if received is None:
                return
            self._take(received.client, received.key, received.frames)

    def _take(self, client: bytes, key: str, frames: Sequence[bytes]) -> None:
        """Handle one message of a client."""
        request_id, seq = "", 0
        try:
            message = decode_request(frames, self._most_items)
            request_id = message.request_id
            seq = message.next_seq if isinstance(message, Resume) else 0
            authorized = None if self._authentication is None else self._authentication.client(key)
            account = self.limits.account(client, authorized)
            self.limits.count(account, time.monotonic())
            self._handle(client, message if authorized is None else authorized.restrict(message), account)
        except SpilldError as error:
            self._in_flight.send(
                client, Failed.because(error, request_id or error.request_id, seq), answer=True
            )
        except Exception:
            log.exception("request %r failed", request_id)
            bug = InternalError("a bug in spilld; see its log")
            self._in_flight.send(client, Failed.because(bug, request_id, seq), answer=True)

    def _handle(self, client: bytes, message: Request, account: Account) -> None:
        match message:
            case Generate():
                self._start(client, message, account)
            case Resume(request_id=request_id, next_seq=next_seq):
                self._service.resume(client, message)
                resumed = InFlightRequest(account.name, next_seq, resumed=True)
                self._in_flight.add(client, request_id, resumed)
            case Acknowledge(request_id=request_id, next_seq=next_seq, tenant=tenant):
                self._service.acknowledge(request_id, next_seq, tenant)
            case Cancel(request_id=request_id, tenant=tenant):
                self._service.cancel(request_id, tenant)
            case Release() | ListSessions() | ChangeSession():
                self._refuse(message.request_id, account)
                self._service.manage(client, message)
                self._in_flight.add(client, message.request_id, InFlightRequest(account.name))
            case TransferRequest():
                self._refuse(message.request_id, account)
                self._service.transfer(client, message)
                self._in_flight.add(client, message.request_id, InFlightRequest(account.name))
            case Hello(request_id=request_id):
                welcome = replace(self._service.welcome(), request_id=request_id)
                self._in_flight.send(client, welcome, answer=True)
            case Stats(request_id=request_id):
                reply = StatsReply(request_id=request_id, values=self._service.stats())
                self._in_flight.send(client, reply, answer=True)

    def _start(self, client: bytes, request: Generate, account: Account) -> None:
        self._refuse(request.request_id, account)
        if self._drain_asked:
            raise Draining("the daemon is stopping; send the request again in a moment")
        self._service.submit(client, request)
        self._in_flight.add(client, request.request_id, InFlightRequest(account.name))

    def _refuse(self, request_id: str, account: Account) -> None:
        """Refuse a request whose id is in flight, or that is one too many of its account.

        Raises:
            InvalidRequest: The id is in flight.
            Overloaded: The account has too many requests open.
        """
        self._in_flight.refuse_repeated(request_id)
        self.limits.admit(account, self._in_flight.open_of(account.name))

    def _send_frames(self, client: bytes, frames: list[bytes], answer: bool) -> None:
        self._router.send(client, frames, answer=answer)

    def _deliver(self) -> None:
        for _ in range(min(BATCH, len(self._posted))):
            self._in_flight.deliver(*self._posted.popleft())

    # signals

    def _signal_handlers(self) -> dict[signal.Signals, Callable[[], None]]:
        handlers = {signal.SIGTERM: self._drain_or_stop, signal.SIGINT: self._drain_or_stop}
        if self._on_reload is not None:
            handlers[signal.SIGHUP] = self.reload
        return handlers

    def _drain_or_stop(self) -> None:
        if self._drain_asked:
            self.stop()
        else:
            self.drain()
