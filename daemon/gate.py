"""CURVE at the listening socket: who has no authorised key does not get in; who has one has its tenant."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from .errors import AccessDenied
from .guests import Guest, Guests
from .keyring import CLIENTS, SERVER
from .keys import ServerKey

log = logging.getLogger(__name__)

DOMAIN = "spilld"
"""Of the ZAP requests (ZeroMQ RFC 27) by which libzmq asks about a key."""

LOG_S = 1.0
"""How often at most a refusal is logged: whoever is refused comes again at once."""


class Gate:
    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if the folder of keys lacks something."""
        self._key = ServerKey.load(folder / SERVER)
        self._guests = Guests(folder / CLIENTS)
        self._logged = 0.0

    @contextmanager
    def answering(self, context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[None]:
        """Inside, keys are looked at for the sockets of this context; bind in here."""
        authenticator = ThreadAuthenticator(context)
        authenticator.configure_curve_callback(DOMAIN, self)
        authenticator.start()
        try:
            yield
        finally:
            authenticator.stop()

    def lock(self, socket: zmq.Socket[bytes]) -> None:
        """Before it is bound. If nobody answers about keys, the domain makes libzmq refuse them all."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._key.secret.encode())
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN.encode())

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether a public key may connect; asked by the authenticator, in its thread."""
        known = self._guests.find(key.decode()) is not None
        if not known and time.monotonic() - self._logged >= LOG_S:
            self._logged = time.monotonic()
            log.warning("a client was refused, its public key is not authorised: %s", key.decode())
        return known

    def guest(self, frame: zmq.Frame) -> Guest:
        """Who sent a frame. AccessDenied if its key was authorised once, and is not now."""
        guest = self._guests.find(str(frame.get("User-Id")))
        if guest is None:
            raise AccessDenied("this key is not authorised any more; ask who runs the daemon")
        return guest
