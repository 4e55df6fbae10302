"""Prepares requests for the engine: tokenises texts and applies chat templates, in threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from spilld.errors import InvalidRequest
from spilld.protocol.messages import Generate, Message

LONG = 1 << 16
"""Characters of a text that takes more than some milliseconds to tokenise."""

KINDS = ("short", "long", "chat")
"""Kinds of preparation, each with a thread of its own: short texts do not wait for long ones or templates."""

Act = Callable[[], None]


@dataclass(frozen=True)
class _Preparation:
    kind: str
    run: Callable[[], Act | None]
    request_id: str | None = None
    on_cancel: Act = lambda: None


class Intake:
    """Prepares the requests of a client in order, one at a time, and those of several clients concurrently.

    Args:
        deliver: Given, in that order, the acts to be done in the engine's thread. It is called from several
            threads, under the intake's lock, and must not block.
    """

    def __init__(self, deliver: Callable[[Act], None]) -> None:
        self._deliver = deliver
        self._pools = {kind: ThreadPoolExecutor(1, f"spilld-{kind}") for kind in KINDS}
        self._lock = threading.Lock()
        self._waiting: dict[bytes, deque[_Preparation]] = {}
        """Preparations of each client that has any; the first runs, or is next."""
        self._requests: dict[str, tuple[bytes, str]] = {}
        """Client and tenant of each request that is to be prepared."""
        self._cancelled: set[str] = set()
        self._stopped = False

    def prepare(
        self, client: bytes, request: Generate, run: Callable[[], Act | None], on_cancel: Act
    ) -> None:
        """Queue the preparation of a request. Nothing happens once the intake has stopped.

        Args:
            client: Whose request it is.
            request: The request.
            run: Prepares it; what it returns, if anything, is delivered.
            on_cancel: Delivered instead if the request was cancelled meanwhile.

        Raises:
            InvalidRequest: A request with this id is being prepared, for a client that has gone.
        """
        with self._lock:
            if self._stopped:
                return
            if request.request_id in self._requests:
                raise InvalidRequest(
                    f"id is {request.request_id!r}, which is in flight; allowed: 128 random bits"
                )
            self._requests[request.request_id] = client, request.tenant
            self._queue(client, _Preparation(kind_of(request), run, request.request_id, on_cancel))

    def in_turn(self, client: bytes, act: Act, about: str | None = None) -> None:
        """Deliver an act once all that the client sent before is delivered.

        Args:
            client: The client.
            act: The act.
            about: The id of a request that it is about, which may be another client's; it is then delivered
                after that request, too.
        """
        with self._lock:
            if about in self._requests:
                client, _ = self._requests[about]
            if client in self._waiting:
                self._queue(client, _Preparation("short", lambda: act))
            elif not self._stopped:
                self._deliver(act)

    def compose(self, run: Act) -> None:
        """Prepare the prompt of a chat whose request was delivered already."""
        with self._lock:
            if not self._stopped:
                self._pools["chat"].submit(run)

    def cancel(self, request_id: str, tenant: str | None = None) -> bool:
        """Cancel a request: on_cancel is delivered in its turn.

        Args:
            request_id: The request's id.
            tenant: The tenant that it must have; None for any.

        Returns:
            Whether there is such a request here.
        """
        with self._lock:
            if request_id not in self._requests:
                return False
            _, owner = self._requests[request_id]
            if tenant not in (None, owner):
                return False
            self._cancelled.add(request_id)
            return True

    def stop(self, interrupt: Act = lambda: None) -> None:
        """Stop: what waits never runs; what runs is interrupted and waited for."""
        with self._lock:
            self._stopped = True
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        interrupt()
        for pool in self._pools.values():
            pool.shutdown(wait=True)

    def _queue(self, client: bytes, preparation: _Preparation) -> None:
        if self._stopped:
            return
        queue = self._waiting.setdefault(client, deque())
        queue.append(preparation)
        if len(queue) == 1:
            self._pools[preparation.kind].submit(self._turn, client, preparation)

    def _turn(self, client: bytes, preparation: _Preparation) -> None:
        act = preparation.on_cancel if preparation.request_id in self._cancelled else preparation.run()
        with self._lock:
            if act is not None and preparation.request_id in self._cancelled:
                act = preparation.on_cancel
            if act is not None:
                self._deliver(act)  # under the lock, so that no cancel comes between
            self._leave(client, preparation)

    def _leave(self, client: bytes, preparation: _Preparation) -> None:
        queue = self._waiting[client]
        queue.popleft()
        if preparation.request_id is not None:
            self._requests.pop(preparation.request_id, None)
            self._cancelled.discard(preparation.request_id)
        if not queue:
            del self._waiting[client]
        elif not self._stopped:
            self._pools[queue[0].kind].submit(self._turn, client, queue[0])


def kind_of(request: Generate) -> str:
    """Return the kind of preparation that a request needs, one of KINDS."""
    prompt = request.prompt
    chat = not isinstance(prompt, str) and any(isinstance(part, Message) for part in prompt[:1])
    if isinstance(prompt, str) or not chat:
        return "short" if len(prompt) < LONG else "long"
    return "chat"
