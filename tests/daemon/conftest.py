"""A real server with a small service that echoes prompts, in a thread, or as a process of its own:
`python conftest.py ADDRESS DRAIN_SECONDS PACE_S`."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spilld.errors import (
    Cancelled,
    ContextNotFound,
    Draining,
    InvalidRequest,
    Overloaded,
    RequestNotFound,
    SpilldError,
)
from spilld.protocol.messages import (
    Accepted,
    ChangeSession,
    Done,
    Event,
    Failed,
    Generate,
    ListSessions,
    Release,
    Released,
    Reply,
    Resume,
    SessionInfo,
    Sessions,
    Token,
    TransferRequest,
    Usage,
    Welcome,
)
from spilld.server.server import Server

if TYPE_CHECKING:
    from spilld.tokenizer.tokenizer import Tokenizer

USAGE = Usage(
    prompt_tokens=3,
    generated_tokens=3,
    cached_tokens=0,
    read_bytes={"device": 10, "host": 20, "disk": 0},
    kv_bytes={"device": 10},
    disk_read_bytes=0,
    stall_ms=0.5,
    prefill_ms=1.0,
    decode_ms=2.0,
)


INFO = SessionInfo(
    name="notes",
    tokens=3,
    kv_bytes={"device": 10, "host": 0, "disk": 5},
    running=False,
    pinned=True,
    ttl_s=None,
    created=1.0,
    used=2.0,
)


@dataclass
class Echo:
    """RepeatFilter the words or tokens of a prompt until max_tokens, one every pace_s seconds."""

    post: Callable[[bytes, Reply], None]
    pace_s: float = 0.0
    piece: str = ""
    """Text of every token instead of the prompt's."""
    limit: int = 1000
    chat: bool | None = None
    """What it says of a chat template, and of its session."""
    saves: bool = False
    """What runs when it stops goes on somewhere else."""
    cancelled: list[str] = field(default_factory=list)
    acknowledged: list[tuple[str, int]] = field(default_factory=list)
    left: list[tuple[bytes, str]] = field(default_factory=list)
    resumed: list[Resume] = field(default_factory=list)
    submitted: list[Generate] = field(default_factory=list)
    managed: list[Release | ListSessions | ChangeSession] = field(default_factory=list)
    transferred: list[TransferRequest] = field(default_factory=list)
    draining: bool = False
    stopped: bool = False
    moved: int = 0
    hangs: bool = False
    """It makes no progress any more."""
    _running: dict[str, threading.Event] = field(default_factory=dict)
    _clients: dict[str, bytes] = field(default_factory=dict)
    _tenants: dict[str, str] = field(default_factory=dict)
    _said: dict[str, list[Event]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def submit(self, client: bytes, request: Generate) -> None:
        if self.draining:
            raise Draining("draining")
        if len(self._running) >= self.limit:
            raise Overloaded("the queue is full")
        if request.context == "gone":
            raise ContextNotFound("no such context")
        if request.prompt == "bug":
            raise RuntimeError("a bug in the engine")
        self.submitted.append(request)
        ended = self._running[request.request_id] = threading.Event()
        self._clients[request.request_id], self._said[request.request_id] = client, []
        self._tenants[request.request_id] = request.tenant
        threading.Thread(target=self._echo, args=(request, ended), daemon=True).start()

    def resume(self, client: bytes, request: Resume) -> None:
        self.resumed.append(request)
        name = request.request_id
        with self._lock:
            if self._tenants.get(name) != request.tenant:
                failed = Failed.because(RequestNotFound("unknown"), name, request.next_seq)
                self.post(client, failed)
                return
            self._clients[name] = client
            for event in self._said[name][request.next_seq :]:
                self.post(client, event)

    def cancel(self, request_id: str, tenant: str | None = None) -> None:
        if tenant not in (None, self._tenants.get(request_id)):
            return
        self.cancelled.append(request_id)
        if (ended := self._running.get(request_id)) is not None:
            ended.set()

    def acknowledge(self, request_id: str, next_seq: int, tenant: str | None = None) -> None:
        if tenant not in (None, self._tenants.get(request_id)):
            return
        self.acknowledged.append((request_id, next_seq))

    def leave(self, client: bytes, request_id: str) -> None:
        self.left.append((client, request_id))

    def manage(self, client: bytes, request: Release | ListSessions | ChangeSession) -> None:
        self.managed.append(request)
        name, reply = request.request_id, self._answer(request)
        self.post(client, Failed.because(reply, name) if isinstance(reply, SpilldError) else reply)

    def transfer(self, client: bytes, request: TransferRequest) -> None:
        self.transferred.append(request)
        self.post(client, Failed.because(InvalidRequest("an echo keeps nothing"), request.request_id))

    def _answer(self, request: Release | ListSessions | ChangeSession) -> Reply | SpilldError:
        if isinstance(request, Release):
            if request.context == "gone":
                return ContextNotFound("no such context")
            return Released(request_id=request.request_id, context=request.context)
        if isinstance(request, ListSessions):
            return Sessions(request_id=request.request_id, sessions=(replace(INFO, chat=self.chat),))
        if request.session == "gone":
            return ContextNotFound("no such session")
        changed = () if request.action == "delete" else (replace(INFO, name=request.into or request.session),)
        return Sessions(request_id=request.request_id, sessions=changed)

    def stats(self) -> dict[str, object]:
        return {"running": len(self._running), "tiers": {"host": 1}}

    def welcome(self) -> Welcome:
        return Welcome(
            request_id="",
            version="0",
            model="echo",
            dtype="float32",
            format="exact",
            formats=("exact",),
            max_context=100,
            chat=self.chat,
        )

    def drain(self) -> None:
        self.draining = True

    def progress(self) -> int:
        self.moved += not self.hangs
        return self.moved

    def idle(self) -> bool:
        return not self._running

    def stop(self) -> frozenset[str]:
        self.stopped = True
        saved = frozenset(self._running) if self.saves else frozenset()
        for ended in list(self._running.values()):
            ended.set()
        return saved

    def _echo(self, request: Generate, ended: threading.Event) -> None:
        prompt, name = request.prompt, request.request_id
        words = prompt.split() if isinstance(prompt, str) else [str(item) for item in prompt]
        self._tell(Accepted(request_id=name, seq=0, prompt_tokens=len(words), cached_tokens=0))
        said = ""
        for seq, word in enumerate(itertools.islice(itertools.cycle(words), request.max_tokens), 1):
            if ended.wait(self.pace_s) if self.pace_s else ended.is_set():
                if not self.stopped:
                    self._end(Failed.because(Cancelled("cancelled"), name, seq), ended)
                return
            said += (text := self.piece or word + " ")
            self._tell(Token(request_id=name, seq=seq, token=seq, text=text))
        done = Done(
            request_id=name,
            seq=seq + 1,
            reason="length",
            text=said,
            usage=USAGE,
            context="kept" if request.keep else None,
        )
        self._end(done, ended)

    def _tell(self, event: Event) -> None:
        with self._lock:
            self._said[event.request_id].append(event)
            self.post(self._clients[event.request_id], event)

    def _end(self, event: Event, ended: threading.Event) -> None:
        self._tell(event)
        if self._running.get(event.request_id) is ended:  # else the id was submitted again just now
            del self._running[event.request_id]


@dataclass
class Running:
    """A server in a thread, with its service."""

    server: Server
    echo: Echo
    thread: threading.Thread

    @property
    def address(self) -> str:
        return self.server.address

    def join(self) -> None:
        self.thread.join(10)
        assert not self.thread.is_alive()


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(address=..., **options of Server) begins to serve; all is stopped at the end of the test."""
    with ExitStack() as stack:

        def begin(address: str = f"ipc://{tmp_path}/s", **options: Any) -> Running:
            server = stack.enter_context(Server(address, **options))
            echo = Echo(server.post)
            thread = threading.Thread(target=server.run, args=(echo,))
            running = Running(server, echo, thread)
            thread.start()
            stack.callback(running.join)
            stack.callback(server.stop)
            return running

        yield begin


@pytest.fixture
def running(start: Start) -> Running:
    return start()


# Tokenizers, imported where they are wanted: as a process this has none.


@pytest.fixture(scope="module")
def smollm2(smollm2_float32: Path) -> Tokenizer:
    from spilld.tokenizer.tokenizer import Tokenizer

    return Tokenizer.load(smollm2_float32)


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    from spilld.tokenizer.tokenizer import Tokenizer

    from .tiny_models import byte_level

    return Tokenizer(byte_level().backend_tokenizer)


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    from spilld.tokenizer.tokenizer import Tokenizer

    from .tiny_models import byte_fallback

    return Tokenizer(byte_fallback())


@pytest.fixture(scope="module", params=["smollm2", "tiny", "fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def main(address: str, drain_seconds: str, pace_s: str) -> None:
    with Server(address, drain_seconds=float(drain_seconds)) as server:
        server.run(Echo(server.post, pace_s=float(pace_s)))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SpilldError as error:
        sys.exit(f"{error.code}: {error}")
