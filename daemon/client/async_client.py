"""The client for asyncio.

    async with AsyncClient() as client:
        async for piece in client.generate("Once upon a time", max_tokens=50).tokens():
            print(piece, end="", flush=True)

It says the same to the daemon as Client does, and belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Self, TypeVar, Unpack

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


class AsyncClient:
    """Client for asyncio: `async with AsyncClient() as client`.

    Arguments, methods and errors are those of Client; entering the context connects.
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
        self._core = ClientCore(self.address, tenant, connect_timeout, reconnect_s, on_lost)
        self._operations = Operations(tenant, self._core.next_id)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._connected = asyncio.Event()
        self._socket = ClientSocket(self._core, self._key)
        self._descriptors = (self._socket.socket.FD, self._socket.monitor.FD)
        for descriptor in self._descriptors:
            self._loop.add_reader(descriptor, self._move)
        try:
            self._move()
            async with asyncio.timeout(self._core.connect_timeout):
                await self._connected.wait()
            if self._core.refused:
                raise self._core.unreachable(time.monotonic())
        except TimeoutError:
            self._close()
            raise self._core.unreachable(time.monotonic()) from None
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    def generate(self, prompt: Promptable, **options: Unpack[Options]) -> AsyncGeneration:
        """See Client.generate; the request is sent at once, without awaiting anything."""
        request = generate_request(self._core.next_id(), self.tenant, prompt, options)
        return AsyncGeneration(self, self._start(request, options.get("timeout")))

    def resume(self, request_id: str, timeout: float | None = None) -> AsyncGeneration:
        """See Client.resume."""
        return AsyncGeneration(self, self._start(Resume(request_id=request_id, tenant=self.tenant), timeout))

    async def hello(self, timeout: float = ASK_S) -> Welcome:
        """See Client.hello."""
        return await self._run(self._operations.hello(timeout))

    async def stats(self) -> dict[str, object]:
        """See Client.stats."""
        return await self._run(self._operations.stats())

    async def release(self, context: str) -> None:
        """See Client.release."""
        await self._run(self._operations.release(context))

    async def sessions(self) -> tuple[SessionInfo, ...]:
        """See Client.sessions."""
        return await self._run(self._operations.sessions())

    async def fork(self, session: str, into: str, tokens: int | None = None) -> SessionInfo:
        """See Client.fork."""
        return await self._run(self._operations.fork(session, into, tokens))

    async def rename(self, session: str, into: str) -> SessionInfo:
        """See Client.rename."""
        return await self._run(self._operations.rename(session, into))

    async def pin(self, session: str) -> SessionInfo:
        """See Client.pin."""
        return await self._run(self._operations.pin(session))

    async def unpin(self, session: str) -> SessionInfo:
        """See Client.unpin."""
        return await self._run(self._operations.unpin(session))

    async def expire(self, session: str, ttl_s: float | None) -> SessionInfo:
        """See Client.expire."""
        return await self._run(self._operations.expire(session, ttl_s))

    async def delete(self, session: str) -> None:
        """See Client.delete."""
        await self._run(self._operations.delete(session))

    async def export_session(self, session: str, file: str | os.PathLike[str]) -> Exported:
        """See Client.export_session; writing each piece to the file blocks the event loop."""
        return await self._run(self._operations.export_session(session, Path(file)))

    async def import_session(self, file: str | os.PathLike[str], session: str) -> Imported:
        """See Client.import_session; reading each piece of the file blocks the event loop."""
        return await self._run(self._operations.import_session(Path(file), session))

    def _start(self, request: Request, timeout: float | None) -> PendingRequest:
        self._move()  # notice first whether the connection is lost
        pending = self._core.start(request, time.monotonic(), timeout)
        self._move()
        return pending

    async def _run(self, operation: Operation[T]) -> T:
        """Send what an operation asks and give it the replies; an error ends it."""
        reply: Reply | None = None
        with contextlib.closing(operation):
            while True:
                try:
                    query = operation.send(reply)
                except StopIteration as end:
                    result: T = end.value
                    return result
                reply = expect(await self._next(self._start(query.request, query.timeout_s)), query.reply)

    async def _next(self, pending: PendingRequest) -> Reply | None:
        changed = asyncio.Event()
        pending.on_change = changed.set
        try:
            while (reply := self._core.take(pending, time.monotonic())) is None and pending.open:
                changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._core.wait_s(pending, time.monotonic())):
                        await changed.wait()
            return reply
        finally:
            if self._core.outbox:  # taking a reply may queue an acknowledgement or a cancel
                self._move()

    def _move(self) -> None:
        """Move messages when a descriptor of zmq is readable.

        It reports a change once, so messages are taken until none is left, and again after every send.
        """
        if self._socket.move():
            self._loop.call_soon(self._move)
        if self._core.connected or self._core.refused:
            self._connected.set()

    def _ask_to_cancel(self, pending: PendingRequest) -> None:
        self._core.ask_to_cancel(pending)
        self._move()

    def _cancel(self, pending: PendingRequest) -> None:
        self._core.cancel(pending)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._move)  # a finaliser may run anywhere

    def _close(self) -> None:
        self._core.close()
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)
        self._socket.close()


class AsyncGeneration(GenerationHandle):
    """The events of one request: `async for`, or await `text()`. It ends as Generation does."""

    def __init__(self, client: AsyncClient, pending: PendingRequest) -> None:
        super().__init__(pending)
        self._client = client

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        reply = await self._client._next(self._pending)
        if reply is None:
            raise StopAsyncIteration
        return expect(reply, Event)

    async def tokens(self) -> AsyncIterator[str]:
        """See Generation.tokens."""
        shown = 0
        async for event in self:
            if piece := added_text(event, shown):
                shown += len(piece)
                yield piece

    async def text(self) -> str:
        """Wait for the end, and return the whole text."""
        async for _ in self:
            pass
        return self.result.text

    def cancel(self) -> None:
        """See Generation.cancel."""
        self._client._ask_to_cancel(self._pending)

    async def aclose(self) -> None:
        """See Generation.close."""
        self._client._cancel(self._pending)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._pending.open:
            self._client._cancel(self._pending)
