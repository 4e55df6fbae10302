"""One client's connection: frames in, frames out, within bounds.

Of received bytes it holds at most READ_BYTES beyond the message that is incomplete, and of messages to be
sent as many, and as many bytes, as `send_queue` and OUT_BYTES say. It is read only as fast as messages are
taken, and not while many answers wait to be sent: a client that asks and does not read is not read from.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Sequence

from spilld.protocol.messages import HEARTBEAT_MS, MAX_FRAME_BYTES, SILENT_MS

from .zmtp import (
    COMMAND,
    GREETING_BYTES,
    MORE,
    Broken,
    Mechanism,
    command,
    frame_at,
    greeting,
    head,
    parse_command,
    pings,
)

READ_BYTES = 64 << 10
"""How much is read at once, before other connections have their turn."""

HANDSHAKE_BYTES = 4096
"""The longest frame of a handshake."""

LONGEST = 2 * MAX_FRAME_BYTES
"""Bytes of a message; one that is longer ends the connection. A frame of over MAX_FRAME_BYTES is still
answered."""

MOST_FRAMES = 64
"""Frames of a message, likewise. A message of another number than two is still answered."""

OUT_BYTES = 2 * MAX_FRAME_BYTES
"""How much may wait to be sent; one message may be larger."""

BEHIND_BYTES = 256 << 10
"""While more answers wait to be sent nothing is read. Events of what runs are bounded otherwise, and a cancel
must get through beside them."""

HANDSHAKE_S = 10.0

MESSAGE_S = 60.0
"""How long a message may take, and one second more for each SLOWEST bytes."""

SLOWEST = 64 << 10

GRACE_S = 1.0
"""How long a message may take however many others wait for room."""


class Gone(Exception):
    """The connection has ended, or has to."""


class Full(Exception):
    """As much waits to be sent as is allowed."""


class ReceiveBudget:
    """Bytes that all connections share for messages that are being received."""

    def __init__(self, nbytes: int) -> None:
        self._left = nbytes

    def take(self, nbytes: int) -> bool:
        """Take bytes; False, and nothing is taken, if there are fewer left."""
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True

    def give(self, nbytes: int) -> None:
        """Give bytes back."""
        self._left += nbytes


class Connection:
    """One client's connection.

    When it has ended or has to end, its methods raise Gone or Broken; the caller then closes it.
    """

    def __init__(
        self, peer: socket.socket, client: bytes, mechanism: Mechanism, send_queue: int, room: ReceiveBudget
    ) -> None:
        """Take over a connected socket and queue the greeting.

        Args:
            peer: The socket, which does not block.
            client: The connection's name.
            mechanism: A new one.
            send_queue: Messages that may wait to be sent.
            room: Shared by all connections, for messages that are being received.
        """
        self.client = client
        self.mechanism = mechanism
        self.readable = self.writable = True  # as far as known: epoll reports changes only
        self._since = self._heard = self._pinged = time.monotonic()
        self.eager = True
        self.lacks_room = False
        """Whether its message waits for room that others have."""
        self._peer = peer
        self._send_queue = send_queue
        self._room = room
        self._greeted = self._pings = False
        self._in = bytearray()
        self._at = 0
        """Where the next frame begins in `_in`."""
        self._message: list[bytes] = []
        self._message_bytes = 0
        self._reserved = 0
        self._begun: float | None = None
        self._out: deque[tuple[bytes, bool]] = deque()
        """What is to be sent; True for an answer."""
        self._out_bytes = self._answer_bytes = self._out_at = 0
        self._deaf = False
        self._put(greeting(mechanism.name))

    def fileno(self) -> int:
        """The socket's descriptor, for a poll."""
        return self._peer.fileno()

    @property
    def ready(self) -> bool:
        """Whether the handshake is done."""
        return self.mechanism.ready

    @property
    def behind(self) -> bool:
        """Whether the client has to read before it is read from."""
        return self._answer_bytes > BEHIND_BYTES

    # in

    def receive(self) -> list[bytes] | None:
        """Return the next message if it takes at most one read; `eager` says whether to ask again."""
        if (message := self._parse()) is None and self.readable and self._has_room():
            self._read()
            message = self._parse()
        self.eager = message is not None or (self.readable and self._has_room())
        return message

    def _has_room(self) -> bool:
        """Take room for the message that has begun; whether there was enough."""
        found = frame_at(self._in, self._at) if self._greeted else None
        lacks = 0 if found is None else self._message_bytes + found[2] - found[1] - self._reserved
        if lacks <= READ_BYTES:
            self.lacks_room = False
            return True
        self.lacks_room = not self._room.take(lacks)
        if not self.lacks_room:
            self._reserved += lacks
        return not self.lacks_room

    def receive_rate(self, now: float) -> float | None:
        """Return the rate at which the current message arrives, in bytes a second, if it blocks others.

        None unless the message has taken room that others may need, and the peer has kept it waiting for
        GRACE_S.
        """
        if not self._reserved or self._begun is None or self.readable or now - self._begun < GRACE_S:
            return None
        return (self._message_bytes + len(self._in) - self._at) / (now - self._begun)

    def _read(self) -> None:
        try:
            data = self._peer.recv(READ_BYTES)
        except BlockingIOError:
            self.readable = False
            return
        except OSError as error:
            raise Gone(str(error)) from error
        if not data:
            raise Gone("closed")
        self._heard = time.monotonic()
        self._in += data

    def _parse(self) -> list[bytes] | None:
        if not self._greeted and not self._greet():
            return None
        while (frame := self._next_frame()) is not None:
            if (message := self._take(*frame)) is not None:
                return message
        return None

    def _greet(self) -> bool:
        if len(self._in) < GREETING_BYTES:
            if self._in and self._in[0] != 0xFF:
                raise Broken("not ZMTP")
            return False
        self._pings = pings(bytes(self._in[:GREETING_BYTES]), self.mechanism.name)
        self._at, self._greeted = GREETING_BYTES, True
        return True

    def _next_frame(self) -> tuple[int, bytes] | None:
        if (found := frame_at(self._in, self._at)) is not None:
            flags, begin, end = found
            if end - begin > (LONGEST if self.ready else HANDSHAKE_BYTES):
                raise Broken(f"a frame of {end - begin} bytes")
            if end <= len(self._in):
                self._at = end
                return flags, bytes(memoryview(self._in)[begin:end])
        del self._in[: self._at]
        self._at = 0
        if self._begun is None and (self._in or self._message):
            self._begun = time.monotonic()
        return None

    def _take(self, flags: int, body: bytes) -> list[bytes] | None:
        """Take a frame that has come; the message, if it was the last of one."""
        if not self.mechanism.ready:
            if not flags & COMMAND or flags & MORE or self.mechanism.refused:
                raise Broken("a message before the handshake")
            answer = self.mechanism.handshake(body)
            self._put(head(COMMAND, len(answer)) + answer)
            return None
        flags, body = self.mechanism.open(flags, body)
        if flags & COMMAND:
            self._obey(body)
            return None
        self._message.append(body)
        self._message_bytes += len(body)
        if len(self._message) > MOST_FRAMES or self._message_bytes > LONGEST:
            raise Broken("a message that is too long")
        if flags & MORE:
            return None
        message, self._message, self._message_bytes, self._begun = self._message, [], 0, None
        self._room.give(self._reserved)
        self._reserved = 0
        return message

    def _obey(self, body: bytes) -> None:
        name, data = parse_command(body)
        if name == b"PING":  # data: its timeout (2 bytes) and a context, which PONG returns
            self._put(self.mechanism.seal(COMMAND, command(b"PONG", data[2:18])), answer=True)

    # out

    def send(self, frames: Sequence[bytes], *, answer: bool) -> None:
        """Queue a message to be sent, and send what can be sent at once.

        Args:
            frames: The message.
            answer: Whether it answers at once what the client just asked.

        Raises:
            Full: As much waits as is allowed.
        """
        nbytes = sum(map(len, frames))
        waits = len(self._out) >= self._send_queue or self._out_bytes + nbytes > OUT_BYTES
        if self._out and waits:
            raise Full
        last = len(frames) - 1
        sealed = b"".join(self.mechanism.seal(MORE * (i < last), part) for i, part in enumerate(frames))
        self._put(sealed, answer=answer)

    def _put(self, data: bytes, *, answer: bool = False) -> None:
        self._out.append((data, answer))
        self._out_bytes += len(data)
        self._answer_bytes += answer * len(data)
        self.flush()

    def flush(self) -> None:
        """Send what can be sent without waiting."""
        while self._out and self.writable:
            data, answer = self._out[0]
            try:
                sent = len(data) if self._deaf else self._peer.send(memoryview(data)[self._out_at :])
            except BlockingIOError:
                self.writable = False
                return
            except OSError:  # what it sent before, such as a cancel, is still to be read
                self._deaf = True
                continue
            self._out_at += sent
            if self._out_at >= len(data):
                self._out.popleft()
                self._out_bytes -= len(data)
                self._answer_bytes -= answer * len(data)
                self._out_at = 0
        if self.mechanism.refused:
            raise Gone("refused")

    @property
    def pending(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._out)

    # time

    def look(self, now: float) -> None:
        """Check timeouts and send a heartbeat if one is due; to be called about once a second.

        Raises:
            Gone: The handshake, a message or a heartbeat is overdue.
        """
        if not self.ready and now - self._since > HANDSHAKE_S:
            raise Gone("no handshake")
        allowed_s = MESSAGE_S + (self._message_bytes + len(self._in)) / SLOWEST
        if self._begun is not None and not self.behind and now - self._begun > allowed_s:
            raise Gone("a message that takes too long")
        if self.readable:  # input was not read yet, so the peer may not be late
            self._heard = now
        if not self._pings or not self.ready:
            return
        if now - self._heard > SILENT_MS / 1000:
            raise Gone("silent")
        if now - max(self._heard, self._pinged) >= HEARTBEAT_MS / 1000 and not self.behind:
            self._pinged = now
            self._put(self.mechanism.seal(COMMAND, command(b"PING", bytes(2))))

    def close(self) -> None:
        """Close the socket, and give back what was taken of the budget."""
        self._room.give(self._reserved)
        self._reserved = 0
        self._peer.close()
