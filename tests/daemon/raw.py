"""ZMTP without libzmq: what no library would send."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

from spilld.protocol.messages import Request
from spilld.protocol.wire import encode

PING = b"\x04\x07\x04PING\x00\x00"


def connected(address: str) -> socket.socket:
    kind, _, place = address.partition("://")
    peer = socket.socket(socket.AF_UNIX if kind == "ipc" else socket.AF_INET)
    peer.settimeout(5)
    if kind == "ipc":
        peer.connect(place)
    else:
        host, _, port = place.rpartition(":")
        peer.connect((host, int(port)))
    return peer


def greeting(mechanism: bytes = b"NULL", minor: int = 0) -> bytes:
    return b"\xff" + bytes(8) + b"\x7f\x03" + bytes([minor]) + mechanism.ljust(20, b"\0") + bytes(32)


def ready(kind: bytes = b"DEALER") -> bytes:
    body = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind + b"\x08Identity" + bytes(4)
    return b"\x04" + bytes([len(body)]) + body


def zmtp(address: str, minor: int = 0) -> socket.socket:
    """A connection that has shaken hands, as a DEALER (ZMTP 3.0, ZeroMQ RFC 23, mechanism NULL)."""
    peer = connected(address)
    peer.sendall(greeting(minor=minor))
    received(peer, 64)
    peer.sendall(ready())
    received(peer, received(peer, 2)[1])
    return peer


def received(peer: socket.socket, count: int) -> bytes:
    """The next so many bytes."""
    got = b""
    while len(got) < count:
        more = peer.recv(count - len(got))
        assert more, "the server has closed the connection"
        got += more
    return got


def frame(body: bytes, *, more: bool = False) -> bytes:
    if len(body) < 256:
        return bytes([more, len(body)]) + body
    return struct.pack(">BQ", 2 | more, len(body)) + body


def message(frames: Sequence[bytes]) -> bytes:
    return b"".join(frame(body, more=number < len(frames)) for number, body in enumerate(frames, 1))


def said(request: Request) -> bytes:
    return message(encode(request))
