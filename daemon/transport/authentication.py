"""CURVE authentication at the listening socket: only authorised keys connect, each as its tenant."""

from __future__ import annotations

import logging
from pathlib import Path

from zmq.utils import z85

from spilld.auth.authorized_clients import AuthorizedClient, AuthorizedClients
from spilld.auth.keyring import CLIENTS, SERVER
from spilld.auth.keys import ServerKey
from spilld.errors import AccessDenied

from .curve import Curve

log = logging.getLogger(__name__)


class CurveAuthentication:
    """Authenticates clients by the daemon's key and the list of authorised clients.

    Args:
        folder: What `spilld keys` made.

    Raises:
        ConfigError: The folder lacks something, something in it is wrong, or there is no libsodium.
    """

    def __init__(self, folder: Path) -> None:
        key = ServerKey.load(folder / SERVER)
        self._public, self._secret = z85.decode(key.public), z85.decode(key.secret)
        self._clients = AuthorizedClients(folder / CLIENTS)
        self.mechanism()  # raises ConfigError without libsodium

    def mechanism(self) -> Curve:
        """Make the mechanism of a new connection."""
        return Curve(self._public, self._secret, self.is_authorized)

    def is_authorized(self, key: str) -> bool:
        """Whether the holder of a public key (in Z85) may connect."""
        known = self._clients.find(key) is not None
        if not known:
            log.warning("a client was refused, its public key is not authorised: %s", key)
        return known

    def client(self, key: str) -> AuthorizedClient:
        """Return the client with a public key.

        Raises:
            AccessDenied: The key was authorised once, and is not now.
        """
        client = self._clients.find(key)
        if client is None:
            raise AccessDenied("this key is not authorised any more; ask who runs the daemon")
        return client
