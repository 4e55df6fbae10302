"""The client's socket: moves frames between a DEALER and the calls, and sees the daemon come and go."""

from __future__ import annotations

import struct
import time

import zmq

from .calls import Calls
from .errors import ConfigError
from .protocol import MAX_FRAME_BYTES

BATCH = 256
"""Messages taken at once, so that an event loop gets its turn."""

LINGER_MS = 200
"""How long a cancel may take to leave once the socket is closed."""


class Link:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._sending = False
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, LINGER_MS)
        self.socket.setsockopt(zmq.SNDHWM, 0)  # a send never blocks
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_FRAME_BYTES)
        self.socket.setsockopt(zmq.IPV6, int("[" in calls.address))
        seen = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        self.monitor: zmq.Socket[bytes] = self.socket.get_monitor_socket(seen)
        try:
            self.socket.connect(calls.address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot connect to {calls.address!r}: {error}") from error

    def flush(self) -> None:
        """Send what the outbox holds."""
        if not self._sending and not self.socket.closed:  # a finaliser may run in the middle of a send
            self._sending = True
            try:
                while self._calls.outbox:
                    self.socket.send_multipart(self._calls.outbox.popleft())
            finally:
                self._sending = False

    def move(self) -> bool:
        """Send and take what can be without waiting; True if more may be there to take."""
        if self._calls.closed:
            return False
        self._watch()
        self.flush()
        more = self._take()
        self.flush()  # a reply may have caused a cancel
        return more

    def _watch(self) -> None:
        while self.monitor.poll(0):
            event, _value = struct.unpack("=hi", self.monitor.recv_multipart()[0])
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._calls.link_up()
            elif event == zmq.EVENT_DISCONNECTED:
                self._calls.link_lost(time.monotonic())

    def _take(self) -> bool:
        for _ in range(BATCH):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._calls.received(frames)
        return True

    def close(self) -> None:
        """Send what the outbox holds, the last cancels, and close."""
        if not self.socket.closed:
            self.flush()
            self.socket.disable_monitor()
            self.monitor.close(linger=0)
            self.socket.close()
