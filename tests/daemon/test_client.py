"""Both clients against a real server."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
import zmq

import spilld
from spilld import (
    Accepted,
    AsyncClient,
    Client,
    Done,
    Message,
    SessionInfo,
    Token,
)
from spilld.client import client_socket, core
from spilld.client.core import ACKNOWLEDGED
from spilld.client.generate_options import AHEAD
from spilld.errors import (
    Cancelled,
    ConfigError,
    ContextNotFound,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    RequestNotFound,
    SpilldError,
    Unreachable,
    WrongVersion,
)
from spilld.protocol.messages import Failed, Generate, Released
from spilld.protocol.wire import decode, encode
from spilld.transport import listener

from .peer import until

if TYPE_CHECKING:
    from tests.daemon.conftest import Running, Start


def test_public_names() -> None:
    assert spilld.__all__ == [
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


def test_events_tokens_text_and_result(running: Running) -> None:
    with Client(running.address) as client:
        generation = client.generate("one two three", max_tokens=4, keep=True)
        with pytest.raises(RuntimeError, match="to its end"):
            _ = generation.result
        events = list(generation)
        assert [type(event) for event in events] == [Accepted, Token, Token, Token, Token, Done]
        assert [event.seq for event in events] == list(range(6))
        assert generation.result is events[-1]
        assert generation.result.context == "kept"
        assert generation.result.usage.read_bytes["host"] == 20
        assert list(client.generate("one two", max_tokens=3).tokens()) == ["one ", "two ", "one "]
        assert client.generate("one two", max_tokens=3).text() == "one two one "
    assert running.echo.cancelled == []


def test_what_has_come_is_acknowledged(running: Running) -> None:
    with Client(running.address) as client:
        stream = client.generate("word", max_tokens=3 * ACKNOWLEDGED)
        stream.text()
        until(lambda: (stream.id, 3 * ACKNOWLEDGED) in running.echo.acknowledged)
    [request] = running.echo.submitted
    assert request.ahead == AHEAD
    acknowledged = [seq for name, seq in running.echo.acknowledged if name == stream.id]
    assert acknowledged == [ACKNOWLEDGED, 2 * ACKNOWLEDGED, 3 * ACKNOWLEDGED]


def test_what_nobody_takes_is_not_acknowledged_for_ever(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client keeps a bounded number of events; all are there when somebody asks."""
    monkeypatch.setattr(core, "KEPT", 2 * ACKNOWLEDGED)
    with Client(running.address) as client:
        idle, busy = client.generate("a", max_tokens=1000), client.generate("b", max_tokens=1000)
        busy.text()
        until(lambda: client.hello() and len(idle._pending.replies) == 1002)
        seen = [seq for name, seq in running.echo.acknowledged if name == idle.id]
        assert seen
        assert seen[-1] < 4 * ACKNOWLEDGED
        assert idle.text() == "a " * 1000


def test_what_is_asked_arrives(running: Running) -> None:
    with Client(running.address) as client:
        client.generate(range(3), max_tokens=1, temperature=1, top_k=5, stop="end", timeout=9).text()
        chat: list[Message | dict[str, str]] = [
            {"role": "user", "content": "hi"},
            Message(role="assistant", content="ho"),
        ]
        client.generate(
            chat, max_tokens=1, context="c", seed=2**64 - 1, stop=["a", "b"], priority="low"
        ).text()
    first, second = running.echo.submitted
    assert first.prompt == (0, 1, 2)
    assert (first.sampling.temperature, first.sampling.top_k, first.stop) == (1.0, 5, ("end",))
    assert first.deadline_s == 9
    assert second.prompt == (Message(role="user", content="hi"), Message(role="assistant", content="ho"))
    assert (first.priority, second.priority) == ("normal", "low")
    assert (second.context, second.sampling.seed, second.stop) == ("c", 2**64 - 1, ("a", "b"))


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        ("", {}, "text"),
        ([1, True], {}, r"tokens\[1\]"),
        ([1, 2.5], {}, "prompt"),
        (b"abc", {}, "bytes"),
        ([{"role": "user"}], {}, r"messages\[0\].content"),
        ("a", {"temperature": -1}, "sampling.temperature"),
        ("a", {"timeout": 0}, "deadline_s"),
        ("a\ud800", {}, "surrogates"),
    ],
)
def test_a_bad_request_is_refused_before_it_is_sent(
    running: Running, prompt: object, options: dict[str, object], named: str
) -> None:
    with Client(running.address) as client, pytest.raises(InvalidRequest, match=named):
        client.generate(prompt, **options)  # type: ignore[arg-type]
    assert running.echo.submitted == []


def test_hello_stats_release(running: Running) -> None:
    with Client(running.address) as client:
        assert (client.hello().model, client.hello().protocol) == ("echo", 1)
        assert client.stats() == {"running": 0, "tiers": {"host": 1}}
        client.release("kept")
        with pytest.raises(ContextNotFound):
            client.release("gone")


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
"""What the echo of conftest.py knows."""


def changes(client: Client | AsyncClient) -> list[tuple[Any, dict[str, object]]]:
    """Every change of a session, and the fields that the daemon must see."""
    return [
        (client.fork("s", "t", 5), {"action": "fork", "into": "t", "tokens": 5}),
        (client.fork("s", "t"), {"action": "fork", "into": "t", "tokens": None}),
        (client.rename("s", "t"), {"action": "rename", "into": "t"}),
        (client.pin("s"), {"action": "pin"}),
        (client.unpin("s"), {"action": "unpin"}),
        (client.expire("s", 2.5), {"action": "expire", "ttl_s": 2.5}),
        (client.expire("s", None), {"action": "expire", "ttl_s": None}),
        (client.delete("s"), {"action": "delete"}),
    ]


def assert_changed(running: Running, answers: list[Any], wanted: list[dict[str, object]]) -> None:
    seen = [vars(request) for request in running.echo.managed]
    for request, fields in zip(seen, wanted, strict=True):
        assert {"tenant": "secret", "session": "s", **fields}.items() <= request.items()
    for info, fields in zip(answers, wanted, strict=True):
        assert fields["action"] == "delete" or info.name == fields.get("into", "s")


def test_sessions(running: Running) -> None:
    with Client(running.address, tenant="secret") as client:
        asked = changes(client)
        assert_changed(running, [answer for answer, _ in asked], [fields for _, fields in asked])
        assert client.sessions() == (INFO,)
        with pytest.raises(ContextNotFound):
            client.pin("gone")
        client.generate("hello", session="s", max_tokens=1).text()
        assert (running.echo.submitted[-1].session, running.echo.submitted[-1].tenant) == ("s", "secret")


def test_typed_failures(running: Running) -> None:
    with Client(running.address) as client:
        with pytest.raises(ContextNotFound) as caught:
            client.generate("a", context="gone").text()
        assert caught.value.request_id
        running.echo.limit = 0
        with pytest.raises(Overloaded):
            client.generate("a").text()


def test_interleaved_generations(running: Running) -> None:
    with Client(running.address) as client:
        first = client.generate("a b c", max_tokens=50)
        second = client.generate("x y z", max_tokens=50)
        mixed = [(p, q) for p, q in zip(first.tokens(), second.tokens(), strict=True)]
        assert mixed[:3] == [("a ", "x "), ("b ", "y "), ("c ", "z ")]
        assert len(mixed) == 50
        assert client.hello().model == "echo"


@pytest.mark.parametrize("way", ["drop", "close", "context", "tokens", "collected", "other thread"])
def test_ending_early_cancels(running: Running, way: str) -> None:
    running.echo.pace_s = 0.01
    with Client(running.address) as client:
        if way == "drop":
            for event in client.generate("a", max_tokens=10**6):
                if isinstance(event, Token):
                    break
            del event
        elif way == "close":
            generation = client.generate("a", max_tokens=10**6)
            next(iter(generation))
            generation.close()
            assert list(generation) == []
        elif way == "context":
            with client.generate("a", max_tokens=10**6) as generation:
                next(iter(generation))
        elif way == "tokens":
            for _ in client.generate("a", max_tokens=10**6).tokens():
                break
        elif way == "collected":
            cycle: list[object] = [client.generate("a", max_tokens=10**6)]
            cycle.append(cycle)
            del cycle
            gc.collect()
        else:
            held = [client.generate("a", max_tokens=10**6)]
            thread = threading.Thread(target=held.clear)
            thread.start()
            thread.join()
            client.hello()
        until(lambda: len(running.echo.cancelled) == 1)
        until(running.echo.idle)
        assert client.generate("still here", max_tokens=2).text() == "still here "


def test_deadline(running: Running) -> None:
    running.echo.pace_s = 0.1
    with Client(running.address) as client:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.generate("a", max_tokens=10**6, timeout=0.25).text()
        assert 0.2 < time.monotonic() - began < 2
        until(lambda: len(running.echo.cancelled) == 1)


def test_deadline_while_tokens_flow(running: Running) -> None:
    with Client(running.address) as client, pytest.raises(DeadlineExceeded):
        for _ in client.generate("a", max_tokens=10**6, timeout=0.2):
            pass
    until(lambda: len(running.echo.cancelled) == 1)
    until(running.echo.idle)


def test_no_daemon(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(Unreachable, match="spilld serve"):
        Client(f"ipc://{tmp_path}/none", connect_timeout=0.2)
    assert time.monotonic() - began < 2
    with pytest.raises(ConfigError):
        Client("carrier-pigeon://home")


def test_a_daemon_that_starts_a_little_later(start: Start, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/late"
    threading.Timer(0.2, lambda: start(address)).start()
    with Client(address, connect_timeout=5) as client:
        assert client.hello().model == "echo"


def test_the_daemon_stops_and_another_starts(start: Start) -> None:
    first = start()
    first.echo.pace_s = 0.01
    with Client(first.address, connect_timeout=0.3) as client:
        generation = client.generate("a", max_tokens=10**6)
        next(iter(generation))
        first.server.stop()
        with pytest.raises(SpilldError, match="stopped before"):  # its last words arrive
            generation.text()
        first.join()
        first.server.__exit__()
        with pytest.raises(Unreachable, match=r"spilld serve|went away"):  # sent before it was seen to go
            client.generate("a").text()
        start(first.address)
        until(lambda: _answers(client))
        assert client.generate("a b", max_tokens=2).text() == "a b "


def _answers(client: Client) -> bool:
    try:
        return client.hello().model == "echo"
    except Unreachable:
        return False


def test_a_killed_daemon_is_noticed(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/s"
    conftest = Path(__file__).with_name("conftest.py")
    daemon = subprocess.Popen([sys.executable, str(conftest), address, "9", "0.01"])
    try:
        lost: list[float] = []
        with Client(address, connect_timeout=10, reconnect_s=0.5, on_lost=lost.append) as client:
            generation = client.generate("a", max_tokens=10**6)
            next(iter(generation))
            assert lost == []
            daemon.kill()
            with pytest.raises(Unreachable, match=f"within 0.5 s.*resume.*{generation.id}"):
                generation.text()
            assert lost == [0.5]
            with pytest.raises(Unreachable, match=r"within 0.1 s"):
                client.reach(0.1)
    finally:
        daemon.kill()
        daemon.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_daemon_that_is_stopped_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """It holds its connections and answers nothing, as does a machine that has lost its power."""
    monkeypatch.setattr(client_socket, "HEARTBEAT_MS", 100)
    monkeypatch.setattr(client_socket, "SILENT_MS", 500)
    address = f"ipc://{tmp_path}/s" if transport == "ipc" else f"tcp://127.0.0.1:{free_port()}"
    conftest = Path(__file__).with_name("conftest.py")
    with subprocess.Popen([sys.executable, str(conftest), address, "9", "0.01"]) as daemon:
        try:
            with Client(address, connect_timeout=20, reconnect_s=0.5) as client:
                generation = client.generate("a", max_tokens=10**6)
                next(iter(generation))
                daemon.send_signal(signal.SIGSTOP)
                with pytest.raises(Unreachable, match=r"within 0\.5 s"):
                    generation.text()
        finally:
            daemon.kill()


STOPS = """
import os, signal, sys
from spilld import Client
with Client(sys.argv[1], connect_timeout=20) as client:
    generation = client.generate("a", max_tokens=10**6)  # dropped, it would be cancelled
    next(generation)
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_client_that_is_stopped_is_missed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """By then it has few events under way: the queue for it is not full."""
    monkeypatch.setattr(listener, "HEARTBEAT_MS", 100)
    monkeypatch.setattr(listener, "SILENT_MS", 500)
    running = start()
    running.echo.pace_s = 0.05
    with subprocess.Popen([sys.executable, "-c", STOPS, running.address]) as client:
        try:
            until(lambda: running.echo.left, 30)
        finally:
            client.kill()
    assert running.echo.cancelled == []


@pytest.mark.parametrize("arrived", [True, False])
def test_another_daemon_answers(start: Start, arrived: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that was lost with the link is sent again; one of which something has come is not."""
    first = start()
    first.echo.pace_s, first.echo.saves = 0.01, True
    if not arrived:
        monkeypatch.setattr(first.echo, "submit", lambda *_: None)
    with Client(first.address) as client:
        generation = client.generate("a b c", max_tokens=10)
        until(lambda: len(first.server._in_flight))
        if arrived:
            next(generation)
        else:
            monkeypatch.setattr(first.echo, "stop", lambda: {generation.id})
        first.server.stop()
        first.join()
        first.server.__exit__()
        second = start(first.address)
        if arrived:
            with pytest.raises(RequestNotFound):
                generation.text()
        else:
            assert [event.seq for event in generation] == list(range(12))
    assert [request.request_id for request in second.echo.resumed] == [generation.id]


def test_another_daemon_answers_an_async_client(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start()
    monkeypatch.setattr(first.echo, "submit", lambda *_: None)

    async def ask() -> list[int]:
        async with AsyncClient(first.address) as client:
            generation = client.generate("a b c", max_tokens=10)
            await asyncio.to_thread(until, lambda: len(first.server._in_flight))
            monkeypatch.setattr(first.echo, "stop", lambda: {generation.id})
            first.server.stop()
            await asyncio.to_thread(first.join)
            first.server.__exit__()
            start(first.address)
            return [event.seq async for event in generation]

    assert asyncio.run(ask()) == list(range(12))


def test_resume_by_id(running: Running) -> None:
    running.echo.pace_s = 0.01
    with Client(running.address) as one, Client(running.address) as two:
        generation = one.generate("a b", max_tokens=20)
        next(generation)
        assert len(list(two.resume(generation.id))) == 22
        with pytest.raises(RequestNotFound):
            two.resume("unknown").text()


def test_a_closed_client(running: Running) -> None:
    running.echo.pace_s = 0.01
    client = Client(running.address)
    generation = client.generate("a", max_tokens=10**6)
    client.close()
    client.close()
    with pytest.raises(Unreachable, match="closed"):
        generation.text()
    with pytest.raises(Unreachable, match="closed"):
        client.generate("a")
    until(lambda: len(running.echo.cancelled) == 1)


def test_an_unclosed_client_does_not_hang_the_exit(running: Running) -> None:
    running.echo.pace_s = 0.01
    script = (
        "import sys; from spilld import Client; client = Client(sys.argv[1]);"
        "generation = client.generate('a', max_tokens=10**6); next(generation)"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", script, running.address], check=True, timeout=20)
    assert time.monotonic() - began < 5
    until(lambda: len(running.echo.cancelled) == 1)


# Replies that no honest daemon sends.


@contextmanager
def forged(tmp_path: Path, *replies: Callable[[str], list[bytes]]) -> Iterator[str]:
    """A peer that answers the first request with these replies, each made from the request's id."""
    address = f"ipc://{tmp_path}/f"

    def serve() -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            router.bind(address)
            identity, *frames = router.recv_multipart()
            request = decode(frames)
            for reply in replies:
                router.send_multipart([identity, *reply(request.request_id)])
            heard.wait(10)

    heard = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    yield address
    heard.set()
    thread.join()


def token(seq: int) -> Callable[[str], list[bytes]]:
    return lambda name: encode(Token(request_id=name, seq=seq, token=seq, text=str(seq)))


def test_repeats_are_dropped_and_a_gap_is_an_error(tmp_path: Path) -> None:
    seen: list[str] = []
    replies = [token(seq) for seq in (0, 1, 1, 0, 2, 4)]
    with forged(tmp_path, *replies) as address, Client(address) as client:
        with pytest.raises(ProtocolError, match="reply 4 came where 3 was due"):
            seen.extend(client.generate("a").tokens())
        assert seen == ["0", "1", "2"]


HEADER = b"spilld\x00\x01"


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (lambda name: [b"spilld\x00\x07", token(0)(name)[1]], WrongVersion),
        (lambda name: [HEADER, msgpack.packb({"type": "done", "id": name})], ProtocolError),
        (lambda name: encode(Generate(request_id=name, prompt="a")), ProtocolError),
        (lambda name: [HEADER, msgpack.packb({"type": "telepathy", "id": name})], ProtocolError),
        (lambda _: [HEADER, b"\xc1"], ProtocolError),
        (lambda _: [HEADER], ProtocolError),
        (lambda _: encode(Failed(request_id="", code="overloaded", message="", retryable=True)), Overloaded),
        (
            lambda n: encode(Failed(request_id=n, code="of the future", message="m", retryable=True)),
            SpilldError,
        ),
        (lambda name: encode(Released(request_id=name, context="c")), ProtocolError),
    ],
)
def test_replies_that_cannot_be_used(
    tmp_path: Path, reply: Callable[[str], list[bytes]], error: type[SpilldError]
) -> None:
    with forged(tmp_path, reply) as address, Client(address) as client, pytest.raises(error) as caught:
        client.generate("a").text()
    assert caught.type is error


# asyncio


def test_async(running: Running) -> None:
    async def talk() -> None:
        async with AsyncClient(running.address, tenant="secret") as client:
            generation = client.generate("one two three", max_tokens=4, keep=True)
            events = [event async for event in generation]
            assert [type(event) for event in events] == [Accepted, Token, Token, Token, Token, Done]
            assert generation.result.context == "kept"
            pieces = [piece async for piece in client.generate("a b", max_tokens=3).tokens()]
            assert pieces == ["a ", "b ", "a "]
            many = [client.generate(f"word{i}", max_tokens=200).text() for i in range(20)]
            assert await asyncio.gather(*many) == [f"word{i} " * 200 for i in range(20)]
            assert (await client.hello()).model == "echo"
            assert (await client.stats())["running"] == 0
            await client.release("kept")
            assert await client.sessions() == (INFO,)
            running.echo.managed.clear()
            asked = changes(client)
            answers = [await answer for answer, _ in asked]
            assert_changed(running, answers, [fields for _, fields in asked])
            with pytest.raises(ContextNotFound):
                await client.release("gone")
            with pytest.raises(InvalidRequest):
                client.generate("")

    asyncio.run(talk())
    assert running.echo.cancelled == []


@pytest.mark.parametrize("way", ["drop", "aclose", "context", "tokens", "task"])
def test_async_ending_early_cancels(running: Running, way: str) -> None:
    running.echo.pace_s = 0.01

    async def talk() -> None:
        async with AsyncClient(running.address) as client:
            if way == "drop":
                async for event in client.generate("a", max_tokens=10**6):
                    if isinstance(event, Token):
                        break
            elif way == "aclose":
                generation = client.generate("a", max_tokens=10**6)
                await anext(aiter(generation))
                await generation.aclose()
                assert [event async for event in generation] == []
            elif way == "context":
                async with client.generate("a", max_tokens=10**6) as generation:
                    await anext(aiter(generation))
            elif way == "tokens":
                async for _ in client.generate("a", max_tokens=10**6).tokens():
                    break
            else:
                task = asyncio.create_task(client.generate("a", max_tokens=10**6).text())
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                del task
            await asyncio.to_thread(until, lambda: len(running.echo.cancelled) == 1)
            assert await client.generate("still here", max_tokens=2).text() == "still here "

    asyncio.run(talk())


def test_async_deadline_and_unreachable(running: Running, tmp_path: Path) -> None:
    running.echo.pace_s = 0.1

    async def talk() -> None:
        with pytest.raises(Unreachable, match="spilld serve"):
            async with AsyncClient(f"ipc://{tmp_path}/none", connect_timeout=0.2):
                pass
        async with AsyncClient(running.address, connect_timeout=0.3, reconnect_s=0.5) as client:
            with pytest.raises(DeadlineExceeded):
                await client.generate("a", max_tokens=10**6, timeout=0.25).text()
            await asyncio.to_thread(until, lambda: len(running.echo.cancelled) == 1)
            waiting = asyncio.create_task(client.generate("a", max_tokens=10**6).text())
            await asyncio.sleep(0.2)
            running.server.stop()
            with pytest.raises(SpilldError, match="stopped before"):
                await waiting
            await asyncio.to_thread(running.join)
            running.server.__exit__()
            # The request may leave before the client sees that the connection is gone.
            with pytest.raises(Unreachable, match=r"spilld serve|went away"):
                await client.generate("a").text()
            closed = asyncio.create_task(client.generate("a").text())
            await asyncio.sleep(0)
        with pytest.raises(Unreachable, match="closed"):
            await closed

    asyncio.run(talk())


def test_a_generation_that_is_closed_in_its_loop(running: Running) -> None:
    running.echo.pace_s = 0.005
    with Client(running.address) as client:
        generation = client.generate("a b", max_tokens=10**6)
        pieces = []
        for piece in generation.tokens():
            pieces.append(piece)
            generation.close()
        assert pieces == ["a "]
        for ask in (generation.text, lambda: generation.result):
            with pytest.raises(Cancelled, match="closed before its end"):
                ask()
        assert generation.text_so_far.startswith("a ")
        generation = client.generate("a b", max_tokens=10**6)
        rest = generation.tokens()
        assert next(rest) == "a "
        generation.cancel()
        with pytest.raises(Cancelled):
            list(rest)
        done = client.generate("a b", max_tokens=2)
        assert done.text() == "a b "
        done.close()
        assert done.result.text == "a b "
