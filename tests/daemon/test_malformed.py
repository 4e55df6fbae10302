"""Frames that are no messages, against decode and against a server: an answer, typed, and nothing else."""

from __future__ import annotations

import ast
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spilld
from spilld.errors import (
    InvalidRequest,
    PromptTooLong,
    ProtocolError,
    SpilldError,
)
from spilld.protocol.messages import (
    MAX_FRAME_BYTES,
    PIECE_BYTES,
    TYPES,
    Acknowledge,
    Cancel,
    ChangeSession,
    CloseTransfer,
    ExportSession,
    Failed,
    Generate,
    Hello,
    ImportSession,
    ListSessions,
    Message,
    OpenTransfer,
    ReadTransfer,
    Release,
    Reply,
    Request,
    Resume,
    Sampling,
    Stats,
    Welcome,
    WriteTransfer,
)
from spilld.protocol.wire import decode, decode_request, encode

from .mutate import LIES, mutated
from .peer import Peer
from .raw import received, zmtp
from .test_protocol import MESSAGES

if TYPE_CHECKING:
    from tests.daemon.conftest import Running, Start

HEADER = b"spilld\x00\x01"

REQUESTS: list[Request] = [
    Generate(request_id="a", prompt=tuple(range(0, 200000, 997))),
    Generate(request_id="b", prompt="Once upon a time", session="s", stop=("x",), logprobs=3, deadline_s=2.5),
    Generate(
        request_id="c",
        prompt=(Message(role="user", content="hi"), Message(role="assistant", content="ho")),
        sampling=Sampling(temperature=0.5, top_k=5, top_p=0.9, seed=2**64 - 1),
        keep=True,
    ),
    Resume(request_id="d", next_seq=12),
    Cancel(request_id="e"),
    Acknowledge(request_id="e", next_seq=3),
    Release(request_id="f", context="c" * 32),
    ListSessions(request_id="g", tenant="t"),
    ChangeSession(request_id="h", session="s", action="fork", into="t", tokens=5, ttl_s=1.5),
    Hello(request_id="i"),
    Stats(request_id="j"),
    ExportSession(request_id="k", session="s"),
    OpenTransfer(request_id="l", nbytes=2**40),
    ReadTransfer(request_id="m", transfer="0" * 32, offset=4096),
    WriteTransfer(request_id="n", transfer="0" * 32, offset=0, data=bytes(300)),
    ImportSession(request_id="o", transfer="0" * 32, session="s"),
    CloseTransfer(request_id="p", transfer="0" * 32),
]
FRAMES = [encode(request) for request in REQUESTS]
BODIES = [frames[1] for frames in FRAMES]
DRAWS = st.integers(0, 2**64 - 1).map(random.Random)


def check_decode(frames: Sequence[bytes]) -> None:
    """A message of a known type, or an error of the protocol's own."""
    try:
        message = decode(frames)
    except (InvalidRequest, ProtocolError) as error:
        assert error.message  # noqa: PT017 (a message is as good)
        assert len(error.message) < 1000, "what was sent is not sent back"  # noqa: PT017
    else:
        assert type(message) in TYPES.values()
        assert 1 <= len(message.request_id) <= 64 or isinstance(message, Reply)


@settings(max_examples=1000, deadline=None)
@given(message=st.one_of(*MESSAGES.values()), draw=DRAWS)
def test_decode(message: Request | Reply, draw: random.Random) -> None:
    check_decode(mutated(encode(message), BODIES, draw))


def claims(count: int, head: bytes = b"\xdd\x00\xff\xff\xff") -> bytes:
    """A message in which lists within lists claim more items than there are, as large as a frame may be."""
    body = b"\x83\xa4type\xa5stats\xa2id\xa1a\xa1x" + head * count
    return body + bytes(MAX_FRAME_BYTES - len(body))


@pytest.mark.parametrize("body", [claims(500), claims(2000), claims(500, b"\xdf\x00\x7f\xff\xff\xa0")])
def test_what_is_claimed_is_not_allocated(body: bytes) -> None:
    """Each of the lists would take 128 MiB, to be cleared and freed again."""
    tracemalloc.start()
    try:
        began = time.perf_counter()
        with pytest.raises(ProtocolError):
            decode([HEADER, body])
        seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * MAX_FRAME_BYTES
    assert seconds < 5


@pytest.mark.parametrize("lie", LIES, ids=bytes.hex)
def test_a_short_lie_costs_nothing(lie: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode([HEADER, b"\x83\xa4type\xa5stats\xa2id\xa1a\xa1x" + lie + b"abc"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(("depth", "allowed"), [(500, True), (1100, False), (10**6, False)])
def test_nesting(depth: int, allowed: bool) -> None:
    body = b"\x83\xa4type\xa5stats\xa2id\xa1a\xa1x" + b"\x91" * depth + b"\x00"
    if allowed:
        assert decode([HEADER, body]) == Stats(request_id="a")
    else:
        with pytest.raises(ProtocolError, match="not msgpack"):
            decode([HEADER, body])


def test_a_frame_at_the_limit() -> None:
    text = "x" * (MAX_FRAME_BYTES - 400)
    message = decode(encode(Generate(request_id="a", prompt=text)))
    assert isinstance(message, Generate)
    assert message.prompt == text
    items = decode([HEADER, msgpack.packb({"type": "stats", "id": "a", "x": [0] * (MAX_FRAME_BYTES // 4)})])
    assert items == Stats(request_id="a")


LONG = 16_000_000
MOST = 65536
ARRAY = b"\xdd" + LONG.to_bytes(4, "big")


def asked(name: str, value: bytes) -> bytes:
    head = b"\x83\xa4type\xa8generate\xa2id\xa1a" + bytes([0xA0 | len(name)]) + name.encode()
    return head + value


HOSTILE: dict[str, Callable[[], bytes]] = {
    "lists": lambda: asked("x", ARRAY + b"\x90" * LONG),
    "maps": lambda: asked("x", ARRAY + b"\x80" * LONG),
    "lists as tokens": lambda: asked("tokens", ARRAY + b"\x90" * LONG),
    "few lists as tokens": lambda: asked("tokens", b"\xdc\xff\xff" + b"\x92\x90\x90" * 65535),
    "long lists as tokens": lambda: asked(
        "tokens", b"\xdc\x00\xff" + (b"\xdc\xff\x00" + b"\x90" * 65280) * 255
    ),
    "lists as messages": lambda: asked("messages", ARRAY + b"\x90" * LONG),
    "lists in messages": lambda: asked("messages", b"\x91\x81\xa1x" + ARRAY + b"\x90" * LONG),
    "keys in messages": lambda: asked("messages", b"\x91\xdf\x00\x7a\x12\x00" + b"\xa0\xc0" * 8_000_000),
    "lists as a text": lambda: asked("text", ARRAY + b"\x90" * LONG),
    "lists as stop strings": lambda: asked("stop", ARRAY + b"\xa0" * LONG),
    "lists as sampling": lambda: asked("sampling", b"\x81\xa1x" + ARRAY + b"\x90" * LONG),
    "lists as a key": lambda: b"\x81" + ARRAY + b"\x90" * LONG + b"\xc0",
    "many fields": lambda: b"\xdf\x00\x7a\x12\x00" + b"\xa0\xc0" * 8_000_000,
    "timestamps": lambda: asked("tokens", b"\xdd\x00\x20\x00\x00" + b"\xd6\xff\0\0\0\1" * 0x200000),
    "strings": lambda: asked("tokens", b"\xdd\x00\x50\x00\x00" + b"\xa2ab" * 0x500000),
    "a reply": lambda: b"\x83\xa4type\xa8sessions\xa2id\xa1a\xa8sessions" + ARRAY + b"\x90" * LONG,
    "no map": lambda: ARRAY + b"\x90" * LONG,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_wanted_is_not_made(name: str) -> None:
    """Objects are counted by the memory that they take; besides, the body is copied once."""
    body = HOSTILE[name]()
    assert len(body) <= MAX_FRAME_BYTES
    tracemalloc.start()
    try:
        with pytest.raises((InvalidRequest, ProtocolError)) as caught:
            decode_request([HEADER, body], MOST)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * MAX_FRAME_BYTES
    assert len(caught.value.message) < 1000


def test_what_is_long_and_is_wanted() -> None:
    for request in (
        Generate(request_id="a", prompt=tuple(range(MOST))),
        Generate(request_id="a", prompt="x" * (MAX_FRAME_BYTES - 400)),
        Generate(request_id="a", prompt=tuple(Message(role="user", content="x" * 200) for _ in range(5000))),
        Generate(request_id="a", prompt="x" * 3000, stop=("y" * 256,) * 16, tenant="t" * 64),
        WriteTransfer(request_id="a", transfer="0" * 32, offset=0, data=bytes(PIECE_BYTES)),
    ):
        assert decode_request(encode(request), MOST) == request
    body = msgpack.packb({"type": "stats", "id": "a", "x": [0] * (MAX_FRAME_BYTES // 4)})
    assert decode_request([HEADER, body], MOST) == Stats(request_id="a"), "what is unknown is ignored"
    message = {"role": "user", "content": "x", "future": [{"a": [1]}, "y" * 3000]}
    body = msgpack.packb({"type": "generate", "id": "a", "messages": [message]})
    read = decode_request([HEADER, body], MOST)
    assert isinstance(read, Generate)
    assert read.prompt == (Message(role="user", content="x"),)


@pytest.mark.parametrize("name", ["tokens", "messages"])
def test_a_prompt_longer_than_the_model_takes_is_not_read(name: str) -> None:
    message = Message(role="user", content="x")
    prompt = tuple(range(5000)) if name == "tokens" else (message,) * 5000
    with pytest.raises(PromptTooLong, match=f"{name} has 5000 items; allowed: 4999") as caught:
        decode_request(encode(Generate(request_id="a", prompt=prompt)), 4999)
    assert caught.value.request_id == "a"
    body = {"type": "generate", "id": "a", "text": "x", "stop": ["s" * 1000] * 20}
    with pytest.raises(InvalidRequest, match="stop has 20063 bytes; allowed: 16384") as large:
        decode_request([HEADER, msgpack.packb(body)], 9)
    assert large.value.request_id == "a"


@settings(max_examples=500, deadline=None)
@given(message=st.sampled_from(REQUESTS), draw=DRAWS)
def test_careful_or_not_a_request_is_the_same(message: Request, draw: random.Random) -> None:
    """What is unpacked part by part is what is unpacked as a whole, and errors name the same message."""
    frames = mutated([encode(message)[0], _padded(encode(message)[1])], BODIES, draw)
    try:
        whole = decode(frames)
    except ProtocolError:
        return  # it may lie in what is ignored
    except InvalidRequest as error:
        with pytest.raises(SpilldError) as caught:
            decode_request(frames, 2**24)
        assert caught.value.request_id == error.request_id  # noqa: PT017 (another error than caught)
    else:
        assert decode_request(frames, 2**24) == whole


def _padded(body: bytes) -> bytes:
    """So long that it is unpacked with care."""
    return bytes(msgpack.packb({**msgpack.unpackb(body), "future": "x" * 3000}))


# The server


class Sender(Peer):
    def __init__(self, address: str) -> None:
        super().__init__(address, SNDHWM=0, RCVHWM=0)

    def all_answers(self) -> list[Reply]:
        """What comes until the server says hello again."""
        self.say(Hello(request_id="are you there"))
        replies: list[Reply] = []
        while not replies or replies[-1].request_id != "are you there":
            replies.append(self.reply(patience_ms=10_000))
        assert isinstance(replies[-1], Welcome)
        return replies[:-1]


@pytest.fixture
def running(start: Start) -> Running:
    """It takes no request to generate: what is mutated might ask for 2^63 tokens."""
    running = start(max_rate=1e6)
    running.echo.limit = 0
    return running


CODES = {
    "protocol_error",
    "invalid_request",
    "wrong_version",
    "frame_too_large",
    "overloaded",
    "prompt_too_long",
    "request_not_found",
}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, len(FRAMES) - 1), draw=DRAWS)
def test_the_server_answers(running: Running, number: int, draw: random.Random) -> None:
    with Sender(running.address) as sender:
        frames = mutated(FRAMES[number], BODIES, draw)
        sender.send(*frames)
        for reply in sender.all_answers():
            assert not isinstance(reply, Failed) or reply.code in CODES
    assert running.thread.is_alive()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_very_many(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """A million of them: no reply but a typed one, no word in the log, no memory that stays."""
    draw = random.Random(7)
    with Sender(running.address) as sender:
        sizes = []
        for batch in range(2000):
            for _ in range(500):
                frames = mutated(draw.choice(FRAMES), BODIES, draw)
                check_decode(frames)
                sender.send(*frames)
            for reply in sender.all_answers():
                assert not isinstance(reply, Failed) or reply.code in CODES
            running.echo.managed.clear()
            running.echo.resumed.clear()
            running.echo.transferred.clear()
            running.echo.cancelled.clear()
            running.echo.acknowledged.clear()
            if batch % 200 == 199:
                sizes.append(resident_bytes())
    print(f"resident MiB after each 100,000: {[size >> 20 for size in sizes]}")
    assert max(sizes[5:]) - sizes[4] < 8 << 20  # what libraries hold on to grows until about 400,000
    assert not caplog.records
    assert running.thread.is_alive()


def test_a_huge_frame_is_refused_by_its_head(running: Running) -> None:
    """Before a byte of it is there, and before there is room for it."""
    before = resident_bytes()
    for length in (2 * MAX_FRAME_BYTES + 1, 2**40, 2**63 - 1, 2**64 - 1):
        with zmtp(running.address) as peer:
            peer.sendall(b"\x01\x08" + HEADER + b"\x02" + struct.pack(">Q", length))
            with suppress(ConnectionResetError):
                while peer.recv(4096):  # its own greeting, then the end
                    pass
    assert resident_bytes() - before < 8 << 20
    with zmtp(running.address) as peer, Sender(running.address) as sender:
        hello = encode(Hello(request_id="h"))
        peer.sendall(b"\x01\x08" + hello[0] + b"\x00" + bytes([len(hello[1])]) + hello[1])
        got = b""
        while b"echo" not in got:
            got += received(peer, 1)
        assert sender.all_answers() == [], "the handshake of this test is one, and the server serves on"


# The code


PACKAGE = Path(spilld.__file__).parent
PASSED = ("protocol", "transport", "server", "engine", "scheduler", "sessions")
"""Rooms that messages pass through, and two modules."""
SOURCES = [path for room in PASSED for path in sorted((PACKAGE / room).glob("*.py"))]
SOURCES += [PACKAGE / "auth/authorized_clients.py", PACKAGE / "kv/sequence.py", PACKAGE / "runner/sampler.py"]
LOOKS_UP = {"getattr", "setattr", "delattr", "eval", "exec", "compile", "__import__", "globals", "open"}
LOADS_CODE = {"pickle", "marshal", "shelve", "runpy", "importlib"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_what_comes_from_the_wire_names_no_attribute_file_or_module(source: Path) -> None:
    """Modules that messages pass through use names from them as keys of dicts and of tables only."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Name):
            assert node.id not in LOOKS_UP
        elif isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & LOADS_CODE
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in LOADS_CODE
