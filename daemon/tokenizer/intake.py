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
"""What is prepared, each kind in a thread of its own: short texts wait for no long one and no template."""

Act = Callable[[], None]


@dataclass(frozen=True)
class _Preparation:
    kind: str
    run: Callable[[], Act | None]
    request_id: str | None = None
    on_cancel: Act = lambda: None


class Intake:
    """Prepares the requests of a client in order, one at a time, and those of different clients beside each
    other. `deliver` is given, in that order, what is then to be done in the engine's thread.
    """

    def __init__(self, deliver: Callable[[Act], None]) -> None:
        self._deliver = deliver
        self._pools = {kind: ThreadPoolExecutor(1, f"spilld-{kind}") for kind in KINDS}
        self._lock = threading.Lock()
        self._waiting: dict[bytes, deque[_Preparation]] = {}
        """Of each client that has any; the first runs, or is next."""
        self._requests: dict[str, tuple[bytes, str]] = {}
        """Client and tenant of each that is to be prepared."""
        self._cancelled: set[str] = set()
        self._stopped = False

    def prepare(
        self, client: bytes, request: Generate, run: Callable[[], Act | None], on_cancel: Act
    ) -> None:
        """Have `run` prepare a request; what it returns is delivered, if the request was not cancelled
        meanwhile. Nothing once the intake has stopped. InvalidRequest for an id that is here already, of a
        client that has gone.
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
        """Deliver something once what the client sent before is delivered, and the request that it is about,
        whosever that is.
        """
        with self._lock:
            if about in self._requests:
                client, _ = self._requests[about]
            if client in self._waiting:
                self._queue(client, _Preparation("short", lambda: act))
            elif not self._stopped:
                self._deliver(act)

    def compose(self, run: Act) -> None:
        """Have the prompt of a chat made whose request was delivered already."""
        with self._lock:
            if not self._stopped:
                self._pools["chat"].submit(run)

    def cancel(self, request_id: str, tenant: str | None = None) -> bool:
        """End a request when its turn comes; False if there is none here, or not of this tenant, where one is
        given.
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
        """What waits never runs; what runs is interrupted and waited for."""
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
    """The kind of preparation that a request needs, of KINDS."""
    prompt = request.prompt
    chat = not isinstance(prompt, str) and any(isinstance(part, Message) for part in prompt[:1])
    if isinstance(prompt, str) or not chat:
        return "short" if len(prompt) < LONG else "long"
    return "chat"
