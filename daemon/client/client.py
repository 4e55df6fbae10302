"""Talk to the daemon. `Client` blocks, `AsyncClient` is for asyncio; both say the same to it.

    with Client() as client:
        for piece in client.generate("Once upon a time", max_tokens=50).tokens():
            print(piece, end="", flush=True)

Errors are those of `spilld.errors`. A client belongs to one thread, or to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

import zmq

from spilld.auth.keys import ClientKey
from spilld.errors import ProtocolError
from spilld.protocol.address import default_address
from spilld.protocol.messages import (
    Accepted,
    Done,
    Event,
    Exported,
    Hello,
    Imported,
    ListSessions,
    Message,
    Progress,
    Release,
    Released,
    Reply,
    Request,
    Resume,
    SessionInfo,
    Sessions,
    Stats,
    StatsReply,
    Token,
    Usage,
    Welcome,
)

from .client_socket import Link
from .core import (
    Call,
    Calls,
    Options,
    Promptable,
    change_request,
    generate_request,
)
from .transfer import Ask, fetch, send

__all__ = [
    "Accepted",
    "AsyncClient",
    "AsyncGeneration",
    "Client",
    "Done",
    "Event",
    "Exported",
    "Generation",
    "Imported",
    "Message",
    "Progress",
    "SessionInfo",
    "Token",
    "Usage",
    "Welcome",
]

R = TypeVar("R", bound=Reply)
T = TypeVar("T")

ASK_S = 10.0
"""How long hello and stats wait: the daemon answers them between two polls."""

CHANGE_S = 120.0
"""How long all that concerns sessions waits: the daemon does it between two steps."""


class Client:
    """A connection to the daemon; Unreachable if none is there within connect_timeout seconds.

    Any number of generations may be in flight, read in any order. When the daemon goes away, they go on where
    they were once it is back, if that is within reconnect_s seconds; on_lost is called with those seconds as
    soon as it is gone. tenant: a secret that separates what is stored for this client from all else.

    keys: for a daemon that has keys, the file that `spilld keys --client` made; the tenant is then that of
    the key. ConfigError if the file cannot be used, AccessDenied if the daemon does not take it or wants one.
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
        self._key = None if keys is None else ClientKey.load(keys)
        self._calls = Calls(self.address, tenant, connect_timeout, reconnect_s, on_lost)
        self._link = Link(self._calls, self._key)
        self._thread = threading.get_ident()
        self._poller = zmq.Poller()
        self._poller.register(self._link.socket, zmq.POLLIN)
        self._poller.register(self._link.monitor, zmq.POLLIN)
        try:
            self.reach(connect_timeout)
        except BaseException:
            self.close()
            raise

    def reach(self, timeout: float) -> None:
        """Wait until the daemon is there, first or again; Unreachable if it is not within timeout seconds."""
        reach_by = time.monotonic() + timeout
        self._link.move()
        while not self._calls.connected:
            if (left := reach_by - time.monotonic()) <= 0 or self._calls.refused:
                raise self._calls.unreachable(time.monotonic(), timeout)
            self._wait(left)

    def generate(self, prompt: Promptable, **options: Unpack[Options]) -> Generation:
        """Continue a text, token ids or a chat. Options are those of `protocol.Generate` and `Sampling`;
        `timeout` seconds end the whole call with DeadlineExceeded. Raises InvalidRequest before it sends."""
        request = generate_request(self._calls.next_id(), self.tenant, prompt, options)
        return Generation(self, self._start(request, options.get("timeout")))

    def resume(self, request_id: str, timeout: float | None = None) -> Generation:
        """All events of a generation that was begun earlier, by this client or another: those that were, and
        those to come. RequestNotFound if the daemon does not know it any more."""
        return Generation(self, self._start(Resume(request_id=request_id, tenant=self.tenant), timeout))

    def hello(self, timeout: float = ASK_S) -> Welcome:
        """What the daemon serves. DeadlineExceeded if it does not say so within timeout seconds: one that is
        starting listens, and answers once it serves."""
        return self._ask(Hello(request_id=self._calls.next_id()), Welcome, timeout)

    def stats(self) -> dict[str, object]:
        return self._ask(Stats(request_id=self._calls.next_id()), StatsReply).values

    def release(self, context: str) -> None:
        """Give a context handle back."""
        request = Release(request_id=self._calls.next_id(), tenant=self.tenant, context=context)
        self._ask(request, Released, CHANGE_S)

    def sessions(self) -> tuple[SessionInfo, ...]:
        """The tenant's sessions, by name."""
        request = ListSessions(request_id=self._calls.next_id(), tenant=self.tenant)
        return self._ask(request, Sessions, CHANGE_S).sessions

    def fork(self, session: str, into: str, tokens: int | None = None) -> SessionInfo:
        """A new session with the first `tokens` tokens of another, or all; what both have is stored once."""
        return self._change("fork", session, into=into, tokens=tokens)[0]

    def rename(self, session: str, into: str) -> SessionInfo:
        """Give a session another name; a kept context becomes a session so."""
        return self._change("rename", session, into=into)[0]

    def pin(self, session: str) -> SessionInfo:
        """Keep a session and its KV on disk until `unpin`."""
        return self._change("pin", session)[0]

    def unpin(self, session: str) -> SessionInfo:
        return self._change("unpin", session)[0]

    def expire(self, session: str, ttl_s: float | None) -> SessionInfo:
        """Delete a session once it has not been used for ttl_s seconds; None: never."""
        return self._change("expire", session, ttl_s=ttl_s)[0]

    def delete(self, session: str) -> None:
        self._change("delete", session)

    def export_session(self, session: str, file: str | os.PathLike[str]) -> Exported:
        """Write a session, as it is between two requests, to a new file; on any error there is none."""
        return self._converse(fetch(session, self.tenant, Path(file), self._calls.next_id))

    def import_session(self, file: str | os.PathLike[str], session: str) -> Imported:
        """Make a session with a new name from a file. Raises CorruptArchive or ForeignArchive."""
        return self._converse(send(Path(file), session, self.tenant, self._calls.next_id))

    def close(self) -> None:
        """Cancel what is still in flight."""
        self._calls.close()
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, request: Request, timeout: float | None) -> Call:
        self._link.move()  # learn first whether the link still stands
        call = self._calls.start(request, time.monotonic(), timeout)
        self._link.flush()
        return call

    def _change(self, action: str, session: str, **fields: Any) -> tuple[SessionInfo, ...]:
        request = change_request(self._calls.next_id(), self.tenant, action, session, fields)
        return self._ask(request, Sessions, CHANGE_S).sessions

    def _ask(self, request: Request, answer: type[R], patience_s: float = ASK_S) -> R:
        return _expect(self._next(self._start(request, patience_s)), answer)

    def _converse(self, talk: Generator[Ask, Any, T]) -> T:
        """Ask what it asks; an error ends it."""
        reply: Reply | None = None
        with contextlib.closing(talk):
            while True:
                try:
                    ask = talk.send(reply)
                except StopIteration as end:
                    result: T = end.value
                    return result
                reply = self._ask(*ask)

    def _next(self, call: Call) -> Reply | None:
        try:
            while (reply := self._calls.take(call, time.monotonic())) is None and call.open:
                self._wait(self._calls.wait_s(call, time.monotonic()))
            return reply
        finally:
            self._link.flush()  # what taking it has to say: go on, or that it took too long

    def _wait(self, seconds: float | None) -> None:
        self._link.flush()
        self._poller.poll(None if seconds is None else int(seconds * 1000) + 1)
        self._link.move()

    def _cancel(self, call: Call) -> None:
        self._calls.cancel(call)
        if threading.get_ident() == self._thread:
            self._link.flush()  # from another thread (a finaliser) it leaves with the next call


class Generation:
    """The events of one request: iterate over it, or take `text()` or `tokens()`.

    It is cancelled when it is closed, used up as a context, or dropped, before its end: iterations then end,
    and it has no result, as Cancelled says. Failures are raised by the iteration.
    """

    def __init__(self, client: Client, call: Call) -> None:
        self._client = client
        self._call = call

    @property
    def id(self) -> str:
        """With it, `resume` finds this generation again."""
        return self._call.request_id

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        reply = self._client._next(self._call)
        if reply is None:
            raise StopIteration
        return _expect(reply, Event)

    def tokens(self) -> Iterator[str]:
        """The text, piece by piece; the last may be what was held back for a stop string that never came."""
        shown = 0
        for event in self:
            if isinstance(event, Token | Done) and (piece := _piece(event, shown)):
                shown += len(piece)
                yield piece

    def text(self) -> str:
        """Wait for the end; the whole text."""
        for _ in self:
            pass
        return self.result.text

    @property
    def result(self) -> Done:
        """Reason, text, usage and context handle; only after the end."""
        return self._call.result()

    @property
    def begun(self) -> bool:
        """Whether the daemon has begun with it: then the prompt is part of its session or context, also if it
        is cancelled."""
        return self._call.begun

    @property
    def text_so_far(self) -> str:
        """What has come of the text, read or not."""
        return "".join(self._call.pieces)

    def cancel(self) -> None:
        """Have the daemon end it. Its events go on, up to Cancelled, which the iteration raises, or to its
        Done if that was first. `close` does not wait for either."""
        self._client._calls.ask_to_cancel(self._call)
        self._client._link.flush()

    def close(self) -> None:
        self._client._cancel(self._call)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._call.open:
            self.close()


class AsyncClient:
    """Client for asyncio: `async with AsyncClient() as client`."""

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
        self._key = None if keys is None else ClientKey.load(keys)
        self._calls = Calls(self.address, tenant, connect_timeout, reconnect_s, on_lost)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._connected = asyncio.Event()
        self._link = Link(self._calls, self._key)
        self._descriptors = (self._link.socket.FD, self._link.monitor.FD)
        for descriptor in self._descriptors:
            self._loop.add_reader(descriptor, self._move)
        try:
            self._move()
            async with asyncio.timeout(self._calls.connect_timeout):
                await self._connected.wait()
            if self._calls.refused:
                raise self._calls.unreachable(time.monotonic())
        except TimeoutError:
            self._close()
            raise self._calls.unreachable(time.monotonic()) from None
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    def generate(self, prompt: Promptable, **options: Unpack[Options]) -> AsyncGeneration:
        """As `Client.generate`; the request leaves at once, nothing needs to be awaited for that."""
        request = generate_request(self._calls.next_id(), self.tenant, prompt, options)
        return AsyncGeneration(self, self._start(request, options.get("timeout")))

    def resume(self, request_id: str, timeout: float | None = None) -> AsyncGeneration:
        """As `Client.resume`."""
        return AsyncGeneration(self, self._start(Resume(request_id=request_id, tenant=self.tenant), timeout))

    async def hello(self, timeout: float = ASK_S) -> Welcome:
        """As Client.hello."""
        return await self._ask(Hello(request_id=self._calls.next_id()), Welcome, timeout)

    async def stats(self) -> dict[str, object]:
        return (await self._ask(Stats(request_id=self._calls.next_id()), StatsReply)).values

    async def release(self, context: str) -> None:
        request = Release(request_id=self._calls.next_id(), tenant=self.tenant, context=context)
        await self._ask(request, Released, CHANGE_S)

    # Each of these as in Client.

    async def sessions(self) -> tuple[SessionInfo, ...]:
        request = ListSessions(request_id=self._calls.next_id(), tenant=self.tenant)
        return (await self._ask(request, Sessions, CHANGE_S)).sessions

    async def fork(self, session: str, into: str, tokens: int | None = None) -> SessionInfo:
        return (await self._change("fork", session, into=into, tokens=tokens))[0]

    async def rename(self, session: str, into: str) -> SessionInfo:
        return (await self._change("rename", session, into=into))[0]

    async def pin(self, session: str) -> SessionInfo:
        return (await self._change("pin", session))[0]

    async def unpin(self, session: str) -> SessionInfo:
        return (await self._change("unpin", session))[0]

    async def expire(self, session: str, ttl_s: float | None) -> SessionInfo:
        return (await self._change("expire", session, ttl_s=ttl_s))[0]

    async def delete(self, session: str) -> None:
        await self._change("delete", session)

    async def export_session(self, session: str, file: str | os.PathLike[str]) -> Exported:
        """As Client.export_session; each piece holds up the event loop while the file takes it."""
        return await self._converse(fetch(session, self.tenant, Path(file), self._calls.next_id))

    async def import_session(self, file: str | os.PathLike[str], session: str) -> Imported:
        return await self._converse(send(Path(file), session, self.tenant, self._calls.next_id))

    def _start(self, request: Request, timeout: float | None) -> Call:
        self._move()  # learn first whether the link still stands
        call = self._calls.start(request, time.monotonic(), timeout)
        self._move()
        return call

    async def _change(self, action: str, session: str, **fields: Any) -> tuple[SessionInfo, ...]:
        request = change_request(self._calls.next_id(), self.tenant, action, session, fields)
        return (await self._ask(request, Sessions, CHANGE_S)).sessions

    async def _ask(self, request: Request, answer: type[R], patience_s: float = ASK_S) -> R:
        return _expect(await self._next(self._start(request, patience_s)), answer)

    async def _converse(self, talk: Generator[Ask, Any, T]) -> T:
        reply: Reply | None = None
        with contextlib.closing(talk):
            while True:
                try:
                    ask = talk.send(reply)
                except StopIteration as end:
                    result: T = end.value
                    return result
                reply = await self._ask(*ask)

    async def _next(self, call: Call) -> Reply | None:
        changed = asyncio.Event()
        call.on_change = changed.set
        try:
            while (reply := self._calls.take(call, time.monotonic())) is None and call.open:
                changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._calls.wait_s(call, time.monotonic())):
                        await changed.wait()
            return reply
        finally:
            if self._calls.outbox:  # what taking it has to say: go on, or that it took too long
                self._move()

    def _move(self) -> None:
        """What a descriptor of zmq asks for: it tells of a change once, so take until nothing is left, and
        look again after every send."""
        if self._link.move():
            self._loop.call_soon(self._move)
        if self._calls.connected or self._calls.refused:
            self._connected.set()

    def _cancel(self, call: Call) -> None:
        self._calls.cancel(call)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._move)  # a finaliser may run anywhere

    def _close(self) -> None:
        self._calls.close()
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)
        self._link.close()


class AsyncGeneration:
    """The events of one request: `async for`, or await `text()`. It ends as Generation does."""

    def __init__(self, client: AsyncClient, call: Call) -> None:
        self._client = client
        self._call = call

    @property
    def id(self) -> str:
        """As Generation.id."""
        return self._call.request_id

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        reply = await self._client._next(self._call)
        if reply is None:
            raise StopAsyncIteration
        return _expect(reply, Event)

    async def tokens(self) -> AsyncIterator[str]:
        """As Generation.tokens."""
        shown = 0
        async for event in self:
            if isinstance(event, Token | Done) and (piece := _piece(event, shown)):
                shown += len(piece)
                yield piece

    async def text(self) -> str:
        """Wait for the end; the whole text."""
        async for _ in self:
            pass
        return self.result.text

    @property
    def result(self) -> Done:
        """Reason, text, usage and context handle; only after the end."""
        return self._call.result()

    @property
    def begun(self) -> bool:
        """As Generation.begun."""
        return self._call.begun

    @property
    def text_so_far(self) -> str:
        """As Generation.text_so_far."""
        return "".join(self._call.pieces)

    def cancel(self) -> None:
        """As Generation.cancel."""
        self._client._calls.ask_to_cancel(self._call)
        self._client._move()

    async def aclose(self) -> None:
        self._client._cancel(self._call)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._call.open:
            self._client._cancel(self._call)


def _piece(event: Token | Done, shown: int) -> str:
    """The text an event adds to the `shown` characters that came before it."""
    return event.text if isinstance(event, Token) else event.text[shown:]


def _expect(reply: Reply | None, kind: type[R]) -> R:
    if not isinstance(reply, kind):
        raise ProtocolError(f"the daemon answered with {type(reply).__name__}, not {kind.__name__}")
    return reply
