"""The daemon's end of ZMTP at its socket: handshakes, heartbeats, and messages that come slowly."""

from __future__ import annotations

import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest

from spilld.protocol.messages import (
    MAX_FRAME_BYTES,
    Cancel,
    Generate,
    Hello,
)
from spilld.transport import connection, router

from .peer import until
from .raw import PING, connected, frame, greeting, ready, received, said, zmtp
from .test_flood import served

if TYPE_CHECKING:
    from tests.daemon.conftest import Start


def ended(peer: socket.socket) -> bool:
    """Whether the server closes the connection, whatever it sends before."""
    try:
        while peer.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


def _open(peer: socket.socket) -> bool:
    peer.settimeout(0.05)
    try:
        return bool(peer.recv(1))
    except TimeoutError:
        return True
    except ConnectionResetError:
        return False


READY = ready()
HANDSHAKES = {
    "ZMTP 2": b"\xff" + bytes(8) + b"\x7f\x01\x05" + bytes(52),
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "another mechanism": greeting(b"CURVE"),
    "a message first": greeting() + said(Hello(request_id="h")),
    "a command that is not READY": greeting() + b"\x04\x06\x05HELLO",
    "a subscriber": greeting() + ready(b"SUB"),
    "no kind": greeting() + b"\x04\x06\x05READY",
    "READY cut short": greeting() + b"\x04" + bytes([len(READY) - 12]) + READY[2:-10],
    "a long READY": greeting() + struct.pack(">BQ", 6, 5000),
    "unknown flags": greeting() + b"\x84" + READY[1:],
    "an empty command": greeting() + READY + b"\x04\x00",
}


@pytest.mark.parametrize("words", HANDSHAKES.values(), ids=HANDSHAKES)
def test_what_is_no_handshake_ends_its_connection_only(start: Start, words: bytes) -> None:
    address = start().address
    with connected(address) as peer:
        peer.sendall(words)
        assert ended(peer)
    served(address)


def test_a_handshake_byte_by_byte(start: Start) -> None:
    with connected(start().address) as peer:
        for byte in greeting() + ready() + said(Hello(request_id="h")):
            peer.sendall(bytes([byte]))
        got = b""
        while b"echo" not in got:
            got += received(peer, 1)


@pytest.mark.parametrize("context", [b"", b"abc", b"x" * 16])
def test_a_ping_is_answered_with_what_it_has(start: Start, context: bytes) -> None:
    with zmtp(start().address, minor=1) as peer:
        body = b"\x04PING\x00\x00" + context
        peer.sendall(b"\x04" + bytes([len(body)]) + body)
        assert received(peer, 7 + len(context)) == b"\x04" + bytes([5 + len(context)]) + b"\x04PONG" + context


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that takes seconds takes a fraction of one."""
    for name, value in (("HEARTBEAT_MS", 50), ("SILENT_MS", 300), ("HANDSHAKE_S", 0.3), ("MESSAGE_S", 0.3)):
        monkeypatch.setattr(connection, name, value)
    monkeypatch.setattr(connection, "SLOWEST", 2**40)
    monkeypatch.setattr(router, "LOOK_S", 0.05)


@pytest.mark.usefixtures("impatient")
def test_who_is_silent_is_asked_and_then_missed(start: Start) -> None:
    address = start().address
    with zmtp(address, minor=1) as silent, zmtp(address, minor=1) as answers, zmtp(address) as old:
        assert received(silent, 9) == PING
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            assert received(answers, 9) == PING
            answers.sendall(b"\x04\x05\x04PONG")
        assert ended(silent)
        assert _open(answers)
        assert _open(old), "ZMTP 3.0 has no PING"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "words",
    [b"", greeting(), greeting() + READY + frame(b"", more=True)],
    ids=["nothing", "greeting", "half a message"],
)
def test_who_does_not_go_on_is_let_go(start: Start, words: bytes) -> None:
    """A handshake, or a message, that never ends."""
    with connected(start().address) as peer:
        peer.sendall(words)
        assert ended(peer)


@pytest.mark.usefixtures("impatient")
def test_a_large_frame_that_stops_is_let_go_and_idle_clients_are_not(start: Start) -> None:
    address = start().address
    with zmtp(address) as stops, zmtp(address) as idle:
        stops.sendall(struct.pack(">BQ", 2, MAX_FRAME_BYTES) + bytes(1000))
        assert ended(stops)
        assert _open(idle)


@pytest.mark.parametrize("leaves", [False, True])
def test_a_cancel_gets_through_beside_events_that_are_not_read(start: Start, leaves: bool) -> None:
    """Also if it is the last that a client says."""
    running = start()
    running.echo.pace_s, running.echo.piece = 0.001, "x" * 2000
    with zmtp(running.address) as peer:
        peer.sendall(said(Generate(request_id="x", prompt="a", max_tokens=10**6)))
        until(lambda: len(running.echo._said.get("x", ())) > 500)
        peer.sendall(said(Cancel(request_id="x")))
        if leaves:
            peer.close()
        until(lambda: running.echo.cancelled == ["x"])


def test_large_frames_wait_for_room_and_small_ones_do_not(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under way of large messages is bounded for all connections together."""
    monkeypatch.setattr(router, "IN_BYTES", 1 << 20)
    monkeypatch.setattr(router, "LOOK_S", 0.05)
    address = start().address
    half, head = 350 << 10, struct.pack(">BQ", 2, 700 << 10)
    with zmtp(address) as first, zmtp(address) as second:
        first.sendall(head + bytes(half))
        time.sleep(0.1)
        second.settimeout(0.3)
        with pytest.raises(TimeoutError):
            second.sendall(head + bytes(700 << 10))
        served(address)
        first.sendall(bytes(half))
        assert b"protocol_error" in received(first, 100), "one frame only"
    served(address)
    with zmtp(address) as third:  # the room of those that left is there again
        third.sendall(head + bytes(700 << 10))
        assert b"protocol_error" in received(third, 100)
