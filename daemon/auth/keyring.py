"""The folder of keys of a daemon, as `spilld keys` makes it. All files have its owner and mode 0600.

server.key      the daemon's secret key
clients.toml    who may connect
NAME.key        what the client NAME needs to connect; to be copied to where the client runs
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import zmq

from spilld.errors import ConfigError
from spilld.protocol.address import home

from .authorized_clients import AuthorizedClient, add_client
from .keys import ServerKey

SERVICE_USER = "spilld"
"""The user of the system unit (systemd/spilld.sysusers). A folder that root makes is this user's."""

SERVER = "server.key"
CLIENTS = "clients.toml"

_SERVER = """\
# The secret key of a spilld daemon. Its public key, in every client's file, is {public}
secret = "{secret}"
"""

_CLIENTS = """\
# Who may connect to this daemon: a table for each client, with its public key and its tenant. Clients of one
# tenant share sessions and stored KV, those of different ones nothing. `spilld keys --client NAME` appends a
# table; a daemon that runs sees each change of this file at once.
"""

_CLIENT = """\
# The key of {name}, a client of a spilld daemon: who has this file is {name}. The public key is {public}
secret = "{secret}"
server = "{server}"
"""


def default_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of keys: /etc/spilld/keys for root, else in $XDG_CONFIG_HOME or ~/.config."""
    if os.geteuid() == 0:
        return Path("/etc/spilld/keys")
    base = Path(environ.get("XDG_CONFIG_HOME", ""))
    return (base if base.is_absolute() else home("XDG_CONFIG_HOME") / ".config") / "spilld/keys"


def make_server(folder: Path) -> Path:
    """Make a daemon's key, and an empty list of clients if there is none.

    Returns:
        The path of the key's file.

    Raises:
        ConfigError: There is a key already, or a file cannot be written.
    """
    try:
        _make(folder)
    except OSError as error:
        raise ConfigError(f"cannot make {folder}: {error.strerror}") from error
    public, secret = _pair()
    path = folder / SERVER
    _write_new(path, _SERVER.format(public=public, secret=secret))
    if not (folder / CLIENTS).exists():
        _write_new(folder / CLIENTS, _CLIENTS)
    return path


def make_client(folder: Path, name: str, tenant: str | None = None) -> Path:
    """Make a client's key and authorise it.

    Args:
        folder: The daemon's folder of keys.
        name: The client's name: 1 to 64 letters, digits, - and _.
        tenant: The client's tenant; by default a new one of its own.

    Returns:
        The path of the key's file. On any error there is no such file.

    Raises:
        ConfigError: There is such a client, the daemon has no key, or a file cannot be written.
    """
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) is None:
        raise ConfigError(f"NAME is {name!r}; allowed: 1 to 64 letters, digits, - and _")
    tenant = secrets.token_hex(16) if tenant is None else tenant
    if len(tenant) > 64 or not tenant.isprintable():
        raise ConfigError(f"tenant is {tenant!r}; allowed: up to 64 printable characters")
    if not (folder / SERVER).exists():
        raise ConfigError(f"there is no {folder / SERVER}; make the daemon's key first, by `spilld keys`")
    server = ServerKey.load(folder / SERVER).public
    public, secret = _pair()
    path = folder / f"{name}.key"
    _write_new(path, _CLIENT.format(name=name, public=public, secret=secret, server=server))
    try:
        add_client(folder / CLIENTS, name, AuthorizedClient(key=public, tenant=tenant))
    except ConfigError:
        path.unlink()
        raise
    return path


def _make(folder: Path) -> None:
    """Make a folder and those above it, where they are missing."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700)
        with suppress(KeyError):  # there is no such user
            if os.geteuid() == 0:
                service = pwd.getpwnam(SERVICE_USER)
                os.chown(path, service.pw_uid, service.pw_gid)


def _pair() -> tuple[str, str]:
    """Make a key pair: public key and secret key, in Z85."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _write_new(path: Path, text: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if os.geteuid() == 0:
                owner = path.parent.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists and is not replaced; move it away, or choose another name"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
