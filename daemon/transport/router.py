"""Many connections as one socket: messages are received from all in turn, and sent to one by its name.

Nothing blocks but `close`. All methods are called by one thread at a time.
"""

from __future__ import annotations

import itertools
import logging
import select
import socket
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from .connection import (
    Connection,
    Full,
    Gone,
    ReceiveBudget,
)
from .zmtp import Broken, Mechanism

__all__ = ["Full", "Gone", "Received", "Router"]

R = TypeVar("R")

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often all connections are looked at."""

IDLE_S = 60.0

LINGER_S = 0.5
"""How long sending what waits for slow clients may take when the daemon ends."""

ACCEPT = 64
"""Connections accepted at once."""

IN_BYTES = 256 << 20
"""Bytes of large messages that are being received, of all connections."""

_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


@dataclass(frozen=True)
class Received:
    """A message. key: the public key of its sender; empty without keys."""

    client: bytes
    key: str
    frames: Sequence[bytes]


class Router:
    """Accepts connections at a listening socket, and moves their messages."""

    def __init__(
        self,
        listening: socket.socket,
        send_queue: int,
        most: int,
        mechanism: Callable[[], Mechanism],
        admits: Callable[[socket.socket], bool],
    ) -> None:
        """Take over a listening socket; the caller closes it as well.

        Args:
            listening: The socket.
            send_queue: Messages that may wait for a client.
            most: Connections that there may be.
            mechanism: Makes the mechanism of a new connection.
            admits: Whether the peer of a new connection may connect.
        """
        self._listening = listening
        self._send_queue = send_queue
        self._most = most
        self._mechanism = mechanism
        self._admits = admits
        self._names = itertools.count(1)
        self._room = ReceiveBudget(IN_BYTES)
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._clients: dict[bytes, Connection] = {}
        self._due: deque[Connection] = deque()
        self._queued: set[Connection] = set()
        self._keyed: defaultdict[str, set[bytes]] = defaultdict(set)
        """Connections of each key that has some."""
        self._departed: list[bytes] = []
        self._look_at = 0.0
        self._paused = False
        listening.setblocking(False)
        self._epoll.register(listening, select.EPOLLIN)

    def fileno(self) -> int:
        """The descriptor of an epoll, which is readable when `turn` has something to do."""
        return self._epoll.fileno()

    def wait_s(self) -> float:
        """Return for how many seconds `turn` has nothing to do if the descriptor does not become readable."""
        if self._due or not (self._connections or self._paused):
            return 0.0 if self._due else IDLE_S
        return max(0.0, self._look_at - time.monotonic())

    def turn(self) -> None:
        """Find out which connections are to be read, send what waits, and accept new connections."""
        for file, events in self._epoll.poll(0):
            if file == self._listening.fileno():
                self._accept()
            elif (connection := self._connections.get(file)) is not None:
                self._changed(connection, events)
        if (now := time.monotonic()) >= self._look_at:
            self._look_at = now + LOOK_S
            self._pause(False)
            if any(connection.lacks_room for connection in self._connections.values()):
                self._make_room(now)
            for connection in list(self._connections.values()):
                self._guarded(connection, partial(connection.look, now))
                self._queue(connection)  # there may be room for it now

    def receive(self) -> Received | None:
        """Return the next message, one of each client before the second of any; None if there is none."""
        for _ in range(len(self._due)):
            connection = self._due.popleft()
            self._queued.discard(connection)
            if connection.client not in self._clients or connection.behind:
                continue
            came = connection.ready
            message = self._guarded(connection, connection.receive)
            if connection.ready and not came:
                self._count_in(connection)
            if connection.eager:
                self._queue(connection)
            if message is not None and connection.client in self._clients:
                return Received(connection.client, connection.mechanism.key, message)
        return None

    def send(self, client: bytes, frames: Sequence[bytes], *, answer: bool = False) -> None:
        """Send a message to a client.

        Args:
            client: The client's name.
            frames: The message.
            answer: Whether it answers at once what the client just asked.

        Raises:
            Full: As much waits for the client as is allowed.
            Gone: There is no such client any more.
        """
        connection = self._clients.get(client)
        if connection is None:
            raise Gone
        try:
            connection.send(frames, answer=answer)
        except Gone:
            self._close(connection)
            raise

    def departed(self) -> list[bytes]:
        """Return the clients that have gone since the last call."""
        gone, self._departed = self._departed, []
        return gone

    def close(self) -> None:
        """Accept no more, send what waits for at most LINGER_S seconds, and end all connections."""
        self._epoll.close()
        self._listening.close()
        self._linger(time.monotonic() + LINGER_S)
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        self._clients.clear()

    def _linger(self, until: float) -> None:
        waits = {file: connection for file, connection in self._connections.items() if connection.pending}
        poll = select.poll()
        for file in waits:
            poll.register(file, select.POLLOUT)
        while waits and (left := until - time.monotonic()) > 0:
            for file, _events in poll.poll(left * 1000):
                waits[file].writable = True
                self._guarded(waits[file], waits[file].flush)
                if file not in self._connections or not waits[file].pending:
                    poll.unregister(file)
                    del waits[file]

    def _accept(self) -> None:
        for _ in range(ACCEPT):
            try:
                peer, _address = self._listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptor or memory: waiting peers stay in the backlog
                log.warning("no client can connect now: %s", error)
                self._pause(True)
                return
            if len(self._connections) >= self._most and not self._make_way():
                log.warning("%d clients are connected, which is as many as may be", self._most)
                peer.close()
            elif not self._admits(peer):
                peer.close()
            else:
                self._take_in(peer)

    def _pause(self, paused: bool) -> None:
        """Stop to accept connections, or start again."""
        self._paused = paused
        self._epoll.modify(self._listening, 0 if paused else select.EPOLLIN)

    def _make_way(self) -> bool:
        """End the oldest connection whose handshake is not done; whether there was one."""
        for connection in self._connections.values():
            if not connection.ready:
                self._close(connection)
                return True
        return False

    def _make_room(self, now: float) -> None:
        """End the connection whose message arrives most slowly.

        A peer that announces a long message and does not send it must not block the others.
        """
        found = ((c.receive_rate(now), c) for c in self._connections.values())
        rates = [(rate, connection) for rate, connection in found if rate is not None]
        if rates:
            log.warning("messages that come slowly make way for others: there is no room for more")
            self._close(min(rates, key=lambda each: each[0])[1])

    def _count_in(self, connection: Connection) -> None:
        """Count a connection whose handshake is done.

        One key has at most half of all connections, so that others can connect, too.
        """
        key = connection.mechanism.key
        if not key or connection.client not in self._clients:
            return
        self._keyed[key].add(connection.client)
        if len(self._keyed[key]) > max(1, self._most // 2):
            log.warning("a key has %d connections, which is half of all: %s", self._most // 2, key)
            self._close(connection)

    def _take_in(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        name = next(self._names).to_bytes(8, "big")
        try:
            connection = Connection(peer, name, self._mechanism(), self._send_queue, self._room)
        except Gone:
            peer.close()
            return
        self._connections[peer.fileno()] = self._clients[name] = connection
        self._epoll.register(peer, _EVENTS)
        self._queue(connection)

    def _changed(self, connection: Connection, events: int) -> None:
        if events & ~select.EPOLLOUT:
            connection.readable = True
        if events & (select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP):
            connection.writable = True
            self._guarded(connection, connection.flush)
        self._queue(connection)

    def _queue(self, connection: Connection) -> None:
        if connection not in self._queued and connection.client in self._clients:
            self._queued.add(connection)
            self._due.append(connection)

    def _guarded(self, connection: Connection, act: Callable[[], R]) -> R | None:
        try:
            return act()
        except (Gone, Broken) as why:
            log.debug("a connection has ended: %s", why)
        except Exception:
            log.exception("a connection is ended, because of a bug in spilld")
        self._close(connection)
        return None

    def _close(self, connection: Connection) -> None:
        if self._clients.pop(connection.client, None) is not None:
            del self._connections[connection.fileno()]
            key = connection.mechanism.key
            self._keyed[key].discard(connection.client)
            if not self._keyed[key]:
                del self._keyed[key]
            connection.close()
            self._departed.append(connection.client)
