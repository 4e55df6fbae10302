"""The client's socket: moves frames between a DEALER and the core, and watches the connection."""

from __future__ import annotations

import struct
import time

import zmq

from spilld.auth.keys import ClientKey
from spilld.errors import ConfigError
from spilld.protocol.address import FORMS
from spilld.protocol.messages import HEARTBEAT_MS, MAX_FRAME_BYTES, SILENT_MS

from .core import ClientCore

BATCH = 256
"""Messages taken at once, so that an event loop gets its turn."""

LINGER_MS = 200
"""How long sending a cancel may take once the socket is closed."""

SEEN = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)

MAKE_KEY = "`spilld keys --client NAME`, where the daemon runs,"

NO_KEY = f"it wants a key. {MAKE_KEY} makes a file: give it as keys=FILE, --keys FILE or $SPILLD_KEYS"
UNKNOWN_KEY = f"its clients.toml does not have this client's key. {MAKE_KEY} makes one that it knows"
WRONG_SERVER = (
    f"it has no keys, or another than this client's key file says. {MAKE_KEY} makes a file that fits"
)
FULL = "it closed the connection at once: it may have max_connections of them, or be another user's"


class ClientSocket:
    """The DEALER of one client, and the monitor that reports on its connection.

    Args:
        core: What frames come from and go to.
        key: For a daemon that has keys.

    Raises:
        ConfigError: The address cannot be connected to.
    """

    def __init__(self, core: ClientCore, key: ClientKey | None = None) -> None:
        self._core = core
        self._keyed = key is not None
        self._sending = False
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, LINGER_MS)
        self.socket.setsockopt(zmq.SNDHWM, 0)  # a send never blocks
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_FRAME_BYTES)
        self.socket.setsockopt(zmq.IPV6, int("[" in core.address))
        if key is not None:
            self.socket.setsockopt(zmq.CURVE_SERVERKEY, key.server.encode())
            self.socket.setsockopt(zmq.CURVE_PUBLICKEY, key.public.encode())
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, key.secret.encode())
        self.monitor: zmq.Socket[bytes] = self.socket.get_monitor_socket(SEEN)
        self.monitor.setsockopt(zmq.RCVHWM, 0)  # if it were full, libzmq would block, for all sockets
        try:
            self.socket.connect(core.address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot connect to {core.address!r}: {error}; {FORMS}") from error

    def flush(self) -> None:
        """Send what the outbox holds."""
        if not self._sending and not self.socket.closed:  # a finaliser may run in the middle of a send
            self._sending = True
            try:
                while self._core.outbox:
                    self.socket.send_multipart(self._core.outbox.popleft())
            finally:
                self._sending = False

    def move(self) -> bool:
        """Send and receive what is possible without waiting.

        Returns:
            Whether there may be more to receive.
        """
        if self._core.closed:
            return False
        self._watch()
        self.flush()
        more = self._take()
        answers = bool(self._core.outbox)  # acknowledgements, or a cancel
        self.flush()
        return more or answers  # Hazard: a send clears the descriptor's edge for what came meanwhile

    def _watch(self) -> None:
        while self.monitor.poll(0):
            event, _value = struct.unpack("=hi", self.monitor.recv_multipart()[0])
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._core.connection_made()
            elif event == zmq.EVENT_DISCONNECTED:
                self._core.connection_lost(time.monotonic())
            else:
                self._turned_away(event)

    def _turned_away(self, event: int) -> None:
        """Report why the handshake failed.

        Only where the other side closed without an error does libzmq connect again.
        """
        why = WRONG_SERVER if self._keyed else NO_KEY
        final = event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            why = UNKNOWN_KEY
        elif not final:
            why = f"{WRONG_SERVER}; or {FULL}" if self._keyed else FULL
        self._core.turned_away(why, time.monotonic(), final=final)

    def _take(self) -> bool:
        for _ in range(BATCH):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._core.received(frames)
        return True

    def close(self) -> None:
        """Send what the outbox holds, such as the last cancels, and close."""
        if not self.socket.closed:
            self.flush()
            self.socket.disable_monitor()
            self.monitor.close(linger=0)
            self.socket.close()
