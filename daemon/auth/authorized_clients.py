"""The authorised clients: a TOML file with a table for each, which may be edited while the daemon runs.

[alice]
key = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"  # her public key
tenant = "hers"                                     # the tenant of her sessions and KV
max_open = 4                                        # limits of her own, or those of the configuration
max_rate = 50
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from spilld.errors import AccessDenied, ConfigError
from spilld.fields import Int, Maybe, Real
from spilld.protocol.messages import TENANT, Request, Tenanted
from spilld.toml_file import TomlFile

from .keys import Key, refuse_if_others_write

log = logging.getLogger(__name__)

MAX_OPEN = Int(1, 65536)
MAX_RATE = Real(0, 1e6, above=True)


@dataclass(frozen=True, kw_only=True)
class AuthorizedClient:
    """A client that may connect: its key, its tenant, its limits."""

    key: Annotated[str, Key()]
    tenant: Annotated[str, TENANT]
    max_open: Annotated[int | None, Maybe(MAX_OPEN)] = None
    max_rate: Annotated[float | None, Maybe(MAX_RATE)] = None

    def restrict(self, message: Request) -> Request:
        """Restrict a message to this client's tenant.

        Returns:
            The message with this client's tenant, if it is of a kind that names one.

        Raises:
            AccessDenied: The message names another tenant.
        """
        if not isinstance(message, Tenanted):
            return message
        if message.tenant and message.tenant != self.tenant:
            raise AccessDenied("this key is of another tenant; name that of the key, or none")
        return replace(message, tenant=self.tenant)


class AuthorizedClients:
    """The clients that may connect, by their public keys.

    The file is read again when it has changed. While there is no file, no client may connect.
    """

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ConfigError: The file cannot be read, or something in it is wrong.
        """
        self._path = path
        self._known = self._stamp(), load_clients(path)

    def find(self, key: str) -> AuthorizedClient | None:
        """Return the client with this public key, or None. It may be called from any thread.

        If the file has become invalid, that is logged, and its previous contents stay in force.
        """
        if (stamp := self._stamp()) != self._known[0]:
            try:
                self._known = stamp, load_clients(self._path) if stamp else {}
            except ConfigError as error:
                log.error("%s; the authorised clients are as they were", error)
                self._known = stamp, self._known[1]
        return self._known[1].get(key)

    def _stamp(self) -> tuple[int, ...]:
        """What changes whenever the file does; empty if there is no file."""
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode, found.st_uid


def load_clients(path: Path) -> dict[str, AuthorizedClient]:
    """Read the authorised clients, by public key.

    Raises:
        ConfigError: The file cannot be read, something in it is wrong, or others can write it or its folder.
    """
    file = TomlFile(path)
    refuse_if_others_write(path)
    clients: dict[str, AuthorizedClient] = {}
    for name in file.values:
        client = file.read(AuthorizedClient, name)
        if client.key in clients:
            raise ConfigError(
                f"{file.where(name, 'key')}: key is that of another client, too; give each its own"
            )
        clients[client.key] = client
    return clients


def add_client(path: Path, name: str, client: AuthorizedClient) -> None:
    """Append a client to the file.

    Raises:
        ConfigError: The name is taken, or the file is wrong or cannot be written.
    """
    load_clients(path)
    file = TomlFile(path)
    if name in file.values:
        raise ConfigError(
            f"{file.where(name)}: there is {name!r} already; take it out, or choose another name"
        )
    tenant = json.dumps(client.tenant, ensure_ascii=False)
    try:
        # root may append in a folder of another user, who could replace the file by a link
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "a", encoding="utf-8") as end:
            end.write(f'\n[{name}]\nkey = "{client.key}"\ntenant = {tenant}\n')
            end.flush()
            os.fsync(end.fileno())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
