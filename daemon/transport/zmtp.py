"""ZMTP 3.1 (ZeroMQ RFC 37) as bytes, without sockets: greeting, frames, commands, the mechanism NULL.

Why the daemon has its own implementation: libzmq (4.3.5, and its master of July 2026) aborts the process when
a peer fills the receive queue (RCVHWM) and goes away. `in_event_internal` of stream_engine_base.cpp takes the
hang-up of a peer whose input is stopped for `_io_error`, and keeps the engine until the queue is drained;
then the next PING that it decodes, or its own heartbeat timer, comes to `out_event`, which asserts
`!_io_error`. Without heartbeats a PING of the peer's is enough; without a high-water mark input is never
stopped, and nothing bounds the memory, as nothing ever bounds the frames of one message. When descriptors run
out, it aborts, too. Here whatever a peer does ends that peer's connection, and no more.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Protocol

MORE, LONG, COMMAND = 1, 2, 4
"""Flags of a frame."""

GREETING_BYTES = 64

SENDERS = (b"DEALER", b"ROUTER", b"REQ")
"""Socket types that may talk to a ROUTER."""


class Broken(Exception):
    """The peer violates the protocol; its connection ends."""


def greeting(mechanism: bytes) -> bytes:
    """Make this side's greeting, which is the server's where the mechanism has such."""
    as_server = bytes((mechanism != Null.name,))
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + as_server + bytes(31)


def pings(given: bytes, mechanism: bytes) -> bool:
    """Whether the peer with this greeting knows PING (ZMTP 3.1).

    Raises:
        Broken: It is not ZMTP 3, or wants another mechanism.
    """
    if given[0] != 0xFF or given[9] & 1 == 0 or given[10] < 3:
        raise Broken("not ZMTP 3")
    if given[12:32].rstrip(b"\0") != mechanism:
        raise Broken("another security mechanism")
    return (given[10], given[11]) >= (3, 1)


def head(flags: int, length: int) -> bytes:
    """Make the header of a frame."""
    if length > 255:
        return struct.pack(">BQ", flags | LONG, length)
    return bytes((flags, length))


def frame_at(buffer: bytearray, start: int) -> tuple[int, int, int] | None:
    """Find the frame that begins at `start`.

    Returns:
        Its flags, and start and end of its body; None if its header is incomplete. The end may lie beyond the
        buffer.

    Raises:
        Broken: The flags are unknown.
    """
    if len(buffer) - start < 2:
        return None
    flags = buffer[start]
    if flags & ~(MORE | LONG | COMMAND):
        raise Broken("unknown flags")
    if not flags & LONG:
        return flags, start + 2, start + 2 + buffer[start + 1]
    if len(buffer) - start < 9:
        return None
    return flags & ~LONG, start + 9, start + 9 + int.from_bytes(buffer[start + 1 : start + 9], "big")


def command(name: bytes, data: bytes = b"") -> bytes:
    """Make the body of a ZMTP command."""
    return bytes((len(name),)) + name + data


def parse_command(body: bytes) -> tuple[bytes, bytes]:
    """Split the body of a command into name and data.

    Raises:
        Broken: It is not a command.
    """
    if not body or len(body) < 1 + body[0]:
        raise Broken("not a command")
    return body[1 : 1 + body[0]], body[1 + body[0] :]


def metadata(**properties: bytes) -> bytes:
    """Make the metadata of READY; the _ in a name stands for -."""
    return b"".join(
        bytes((len(name),)) + name.replace("_", "-").encode() + struct.pack(">I", len(value)) + value
        for name, value in properties.items()
    )


ROUTER = metadata(Socket_Type=b"ROUTER", Identity=b"")
"""The metadata of this side."""


def check_sender(data: bytes) -> None:
    """Check the metadata of a peer: its socket must be of a type that may talk to a ROUTER.

    Raises:
        Broken: It is not, or the metadata is malformed.
    """
    kinds = [value for name, value in _properties(data) if name == b"socket-type"]
    if len(kinds) != 1 or kinds[0] not in SENDERS:
        raise Broken("not a DEALER")


def _properties(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(data):
        name_end = at + 1 + data[at]
        if len(data) < name_end + 4:
            raise Broken("metadata cut short")
        end = name_end + 4 + int.from_bytes(data[name_end : name_end + 4], "big")
        if len(data) < end:
            raise Broken("metadata cut short")
        yield data[at + 1 : name_end].lower(), data[name_end + 4 : end]
        at = end


class Mechanism(Protocol):
    """How a connection is secured."""

    name: bytes
    key: str
    """The peer's public key in Z85; empty where there are none."""
    ready: bool
    """Whether the handshake is over."""
    refused: bool
    """Whether the handshake has failed; its last answer says why."""

    def handshake(self, body: bytes) -> bytes:
        """Take a command of the peer's handshake.

        Returns:
            The command to answer with.

        Raises:
            Broken: It is not the command that is due, or not valid.
        """

    def seal(self, flags: int, body: bytes) -> bytes:
        """Make a frame as it is sent."""

    def open(self, flags: int, body: bytes) -> tuple[int, bytes]:
        """Read a frame that was received.

        Returns:
            Its flags and its body.

        Raises:
            Broken: It was not sealed by the peer.
        """


class Null:
    """The mechanism NULL: no security."""

    name = b"NULL"
    key = ""
    refused = False

    def __init__(self) -> None:
        self.ready = False

    def handshake(self, body: bytes) -> bytes:
        """See Mechanism.handshake."""
        name, data = parse_command(body)
        if name != b"READY":
            raise Broken("not READY")
        check_sender(data)
        self.ready = True
        return command(b"READY", ROUTER)

    def seal(self, flags: int, body: bytes) -> bytes:
        """See Mechanism.seal."""
        return head(flags, len(body)) + body

    def open(self, flags: int, body: bytes) -> tuple[int, bytes]:
        """See Mechanism.open."""
        return flags, body
