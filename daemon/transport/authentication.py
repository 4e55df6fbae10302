"""CURVE at the listening socket: who has no authorised key does not get in; who has one has its tenant."""

from __future__ import annotations

import logging
from pathlib import Path

from zmq.utils import z85

from spilld.auth.clients import Guest, Guests
from spilld.auth.keyring import CLIENTS, SERVER
from spilld.auth.keys import ServerKey
from spilld.errors import AccessDenied

from .curve import Curve

log = logging.getLogger(__name__)


class Gate:
    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if the folder of keys lacks something."""
        key = ServerKey.load(folder / SERVER)
        self._public, self._secret = z85.decode(key.public), z85.decode(key.secret)
        self._guests = Guests(folder / CLIENTS)
        self.mechanism()  # without libsodium there is none

    def mechanism(self) -> Curve:
        """Of a new connection."""
        return Curve(self._public, self._secret, self.admits)

    def admits(self, key: str) -> bool:
        """Whether who has a public key may connect."""
        known = self._guests.find(key) is not None
        if not known:
            log.warning("a client was refused, its public key is not authorised: %s", key)
        return known

    def guest(self, key: str) -> Guest:
        """Who has a public key. AccessDenied if it was authorised once, and is not now."""
        guest = self._guests.find(key)
        if guest is None:
            raise AccessDenied("this key is not authorised any more; ask who runs the daemon")
        return guest
