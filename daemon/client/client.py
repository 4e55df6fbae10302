"""The blocking client.

    with Client() as client:
        for piece in client.generate("Once upon a time", max_tokens=50).tokens():
            print(piece, end="", flush=True)

Errors are those of `spilld.errors`. A client belongs to one thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self, TypeVar, Unpack

import zmq

from spilld.auth.keys import ClientKey
from spilld.protocol.address import default_address
from spilld.protocol.messages import (
    Event,
    Exported,
    Imported,
    Reply,
    Request,
    Resume,
    SessionInfo,
    Welcome,
)

from .client_socket import ClientSocket
from .core import ClientCore
from .generate_options import Options, Promptable, generate_request
from .generation_handle import GenerationHandle, added_text
from .operations import ASK_S, Operations
from .pending_request import PendingRequest
from .query import Operation, expect

T = TypeVar("T")


class Client:
    """A connection to the daemon.

    Any number of generations may be in flight, read in any order. When the daemon goes away, they go on where
    they were once it is back.

    Args:
        address: Where the daemon listens; by default the user's own socket.
        tenant: A secret that separates what is stored for this client from all else.
        keys: For a daemon that has keys, the file that `spilld keys --client` made; the tenant is then that
            of the key.
        connect_timeout: Seconds to wait for the daemon.
        reconnect_s: Seconds that generations wait for a daemon that went away.
        on_lost: Called with reconnect_s as soon as the daemon is gone.

    Raises:
        Unreachable: No daemon is there.
        ConfigError: The address or the key file cannot be used.
        AccessDenied: The daemon does not accept the key, or requires one.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        tenant: str = "",
        keys: str | os.PathLike[str] | None = None,
        connect_timeout: float = 2.0,
        reconnect_s: float = 30.0,
        on_lost: Callable[[float], None] | None = None,
    ) -> None:
        self.address = address or default_address()
        self.tenant = tenant
        key = None if keys is None else ClientKey.load(keys)
        self._core = ClientCore(self.address, tenant, connect_timeout, reconnect_s, on_lost)
        self._operations = Operations(tenant, self._core.next_id)
        self._socket = ClientSocket(self._core, key)
        self._thread = threading.get_ident()
        self._poller = zmq.Poller()
        self._poller.register(self._socket.socket, zmq.POLLIN)
        self._poller.register(self._socket.monitor, zmq.POLLIN)
        try:
            self.reach(connect_timeout)
        except BaseException:
            self.close()
            raise

    def reach(self, timeout: float) -> None:
        """Wait until the daemon is there, first or again.

        Args:
            timeout: How long, in seconds.

        Raises:
            Unreachable: It is not there within timeout seconds.
            AccessDenied: It does not admit this client.
        """
        reach_by = time.monotonic() + timeout
        self._socket.move()
        while not self._core.connected:
            if (left := reach_by - time.monotonic()) <= 0 or self._core.refused:
                raise self._core.unreachable(time.monotonic(), timeout)
            self._wait(left)

    def generate(self, prompt: Promptable, **options: Unpack[Options]) -> Generation:
        """Continue a text, token ids or a chat.

        Args:
            prompt: The text, the ids, or a list of messages.
            options: Those of `protocol.Generate` and `Sampling`; `timeout` seconds end the whole call.

        Raises:
            InvalidRequest: Before anything is sent. What the daemon says is raised by the generation.
        """
        request = generate_request(self._core.next_id(), self.tenant, prompt, options)
        return Generation(self, self._start(request, options.get("timeout")))

    def resume(self, request_id: str, timeout: float | None = None) -> Generation:
        """Return all events of an earlier generation, past and future, of this client or another.

        Args:
            request_id: The generation's id.
            timeout: After how many seconds the generation is cancelled; None for never.

        Returns:
            The generation, which raises RequestNotFound if the daemon does not know it any more.
        """
        return Generation(self, self._start(Resume(request_id=request_id, tenant=self.tenant), timeout))

    def hello(self, timeout: float = ASK_S) -> Welcome:
        """Return what the daemon serves. A daemon that is starting listens, and answers once it serves.

        Raises:
            DeadlineExceeded: It does not answer within timeout seconds.
        """
        return self._run(self._operations.hello(timeout))

    def stats(self) -> dict[str, object]:
        """Return counters and gauges by name; PROTOCOL.md lists them."""
        return self._run(self._operations.stats())

    def release(self, context: str) -> None:
        """Release a context handle."""
        self._run(self._operations.release(context))

    def sessions(self) -> tuple[SessionInfo, ...]:
        """Return the tenant's sessions, ordered by name."""
        return self._run(self._operations.sessions())

    def fork(self, session: str, into: str, tokens: int | None = None) -> SessionInfo:
        """Make a session of the first `tokens` tokens of another, or all; shared tokens are stored once."""
        return self._run(self._operations.fork(session, into, tokens))

    def rename(self, session: str, into: str) -> SessionInfo:
        """Give a session another name; renaming a kept context makes it a session."""
        return self._run(self._operations.rename(session, into))

    def pin(self, session: str) -> SessionInfo:
        """Keep a session and its KV on disk until `unpin`."""
        return self._run(self._operations.pin(session))

    def unpin(self, session: str) -> SessionInfo:
        """Let a session's KV be evicted again."""
        return self._run(self._operations.unpin(session))

    def expire(self, session: str, ttl_s: float | None) -> SessionInfo:
        """Delete a session once it has not been used for ttl_s seconds; None: never."""
        return self._run(self._operations.expire(session, ttl_s))

    def delete(self, session: str) -> None:
        """Delete a session."""
        self._run(self._operations.delete(session))

    def export_session(self, session: str, file: str | os.PathLike[str]) -> Exported:
        """Write a session, as it is between two requests, to a new file; on any error there is none."""
        return self._run(self._operations.export_session(session, Path(file)))

    def import_session(self, file: str | os.PathLike[str], session: str) -> Imported:
        """Make a session with a new name from a file.

        Raises:
            CorruptArchive: The file cannot be read, or is not a whole archive.
            ForeignArchive: It is of another model, or of a newer spilld.
            InvalidRequest: The name is taken.
        """
        return self._run(self._operations.import_session(Path(file), session))

    def close(self) -> None:
        """Cancel what is still in flight, and close the connection."""
        self._core.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, request: Request, timeout: float | None) -> PendingRequest:
        self._socket.move()  # notice first whether the connection is lost
        pending = self._core.start(request, time.monotonic(), timeout)
        self._socket.flush()
        return pending

    def _run(self, operation: Operation[T]) -> T:
        """Send what an operation asks and give it the replies; an error ends it."""
        reply: Reply | None = None
        with contextlib.closing(operation):
            while True:
                try:
                    query = operation.send(reply)
                except StopIteration as end:
                    result: T = end.value
                    return result
                reply = expect(self._next(self._start(query.request, query.timeout_s)), query.reply)

    def _next(self, pending: PendingRequest) -> Reply | None:
        try:
            while (reply := self._core.take(pending, time.monotonic())) is None and pending.open:
                self._wait(self._core.wait_s(pending, time.monotonic()))
            return reply
        finally:
            self._socket.flush()  # taking a reply may queue an acknowledgement or a cancel

    def _wait(self, seconds: float | None) -> None:
        self._socket.flush()
        self._poller.poll(None if seconds is None else int(seconds * 1000) + 1)
        self._socket.move()

    def _ask_to_cancel(self, pending: PendingRequest) -> None:
        self._core.ask_to_cancel(pending)
        self._socket.flush()

    def _cancel(self, pending: PendingRequest) -> None:
        self._core.cancel(pending)
        if threading.get_ident() == self._thread:
            self._socket.flush()  # from another thread (a finaliser) it is sent with the next call


class Generation(GenerationHandle):
    """The events of one request: iterate over it, or use `text()` or `tokens()`.

    It is cancelled when it is closed or dropped, or its context is left, before its end: iterations then end,
    and `result` raises Cancelled. Failures are raised by the iteration.
    """

    def __init__(self, client: Client, pending: PendingRequest) -> None:
        super().__init__(pending)
        self._client = client

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        reply = self._client._next(self._pending)
        if reply is None:
            raise StopIteration
        return expect(reply, Event)

    def tokens(self) -> Iterator[str]:
        """Yield the text, piece by piece.

        The last may be what was kept back for a stop string that never came.
        """
        shown = 0
        for event in self:
            if piece := added_text(event, shown):
                shown += len(piece)
                yield piece

    def text(self) -> str:
        """Wait for the end, and return the whole text."""
        for _ in self:
            pass
        return self.result.text

    def cancel(self) -> None:
        """Ask the daemon to end the request.

        Its events go on, up to Cancelled, which the iteration raises, or to its Done if that came first.
        `close` does not wait for either.
        """
        self._client._ask_to_cancel(self._pending)

    def close(self) -> None:
        """Cancel it, if it has not ended, and drop the events that are left."""
        self._client._cancel(self._pending)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._pending.open:
            self.close()
