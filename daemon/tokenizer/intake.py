"""What comes before the engine: texts are tokenised and chats templated, beside each other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from spilld.errors import InvalidRequest
from spilld.protocol.messages import Generate, Message

LONG = 1 << 16
"""Characters from which on a text is long: it takes more than some milliseconds."""

LANES = ("short", "long", "chat")
"""Threads, by what they prepare: nobody's short text waits for a long one, or for a chat template."""

Act = Callable[[], None]


@dataclass(frozen=True)
class _Job:
    lane: str
    run: Callable[[], Act | None]
    request_id: str | None = None
    on_cancel: Act = lambda: None


class Intake:
    """Prepares the requests of a client in order, one at a time, and those of different clients beside each
    other. `deliver` is given, in that order, what is then to be done in the engine's thread."""

    def __init__(self, deliver: Callable[[Act], None]) -> None:
        self._deliver = deliver
        self._pools = {lane: ThreadPoolExecutor(1, f"spilld-{lane}") for lane in LANES}
        self._lock = threading.Lock()
        self._waiting: dict[bytes, deque[_Job]] = {}
        """Of each client that has any jobs; the first runs, or is next."""
        self._requests: dict[str, tuple[bytes, str]] = {}
        """Client and tenant of each that is to be prepared."""
        self._cancelled: set[str] = set()
        self._stopped = False

    def prepare(
        self, client: bytes, request: Generate, run: Callable[[], Act | None], on_cancel: Act
    ) -> None:
        """Have `run` prepare a request; what it returns is delivered, if the request was not cancelled
        meanwhile. Nothing once the intake has stopped. InvalidRequest for an id that is here already, of a
        client that has gone."""
        with self._lock:
            if self._stopped:
                return
            if request.request_id in self._requests:
                raise InvalidRequest(
                    f"id is {request.request_id!r}, which is in flight; allowed: 128 random bits"
                )
            self._requests[request.request_id] = client, request.tenant
            self._queue(client, _Job(lane(request), run, request.request_id, on_cancel))

    def in_turn(self, client: bytes, act: Act, about: str | None = None) -> None:
        """Deliver something once what the client sent before is delivered, and the request that it is about,
        whosever that is."""
        with self._lock:
            if about in self._requests:
                client, _ = self._requests[about]
            if client in self._waiting:
                self._queue(client, _Job("short", lambda: act))
            elif not self._stopped:
                self._deliver(act)

    def compose(self, run: Act) -> None:
        """Have the prompt of a chat made whose request was delivered already."""
        with self._lock:
            if not self._stopped:
                self._pools["chat"].submit(run)

    def cancel(self, request_id: str, tenant: str | None = None) -> bool:
        """End a request when its turn comes; False if there is none here, or not of this tenant, where one is
        given."""
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

    def _queue(self, client: bytes, job: _Job) -> None:
        if self._stopped:
            return
        jobs = self._waiting.setdefault(client, deque())
        jobs.append(job)
        if len(jobs) == 1:
            self._pools[job.lane].submit(self._turn, client, job)

    def _turn(self, client: bytes, job: _Job) -> None:
        act = job.on_cancel if job.request_id in self._cancelled else job.run()
        with self._lock:
            if act is not None and job.request_id in self._cancelled:
                act = job.on_cancel
            if act is not None:
                self._deliver(act)  # under the lock, so that no cancel comes between
            self._leave(client, job)

    def _leave(self, client: bytes, job: _Job) -> None:
        jobs = self._waiting[client]
        jobs.popleft()
        if job.request_id is not None:
            self._requests.pop(job.request_id, None)
            self._cancelled.discard(job.request_id)
        if not jobs:
            del self._waiting[client]
        elif not self._stopped:
            self._pools[jobs[0].lane].submit(self._turn, client, jobs[0])


def lane(request: Generate) -> str:
    """Of LANES."""
    prompt = request.prompt
    chat = not isinstance(prompt, str) and any(isinstance(part, Message) for part in prompt[:1])
    if isinstance(prompt, str) or not chat:
        return "short" if len(prompt) < LONG else "long"
    return "chat"
