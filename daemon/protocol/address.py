"""Addresses of the daemon: an ipc socket, or tcp, which beyond the loopback needs keys."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path

from spilld.errors import ConfigError

FORMS = "an address is ipc:///path or tcp://host:port"

LONGEST_PATH = 107
"""Bytes of a unix socket's path (sun_path less its NUL)."""


def home(instead: str) -> Path:
    """Return the user's home directory.

    Args:
        instead: What can be set where it is not known; the error names it.

    Raises:
        ConfigError: The home directory is not known.
    """
    try:
        return Path.home()
    except RuntimeError as error:
        raise ConfigError(f"your home directory is not known; set HOME, or {instead}") from error


def default_address(environ: Mapping[str, str] = os.environ) -> str:
    """Return the address that is used where none is given: an ipc socket in a runtime directory.

    The directory is the first that applies of $RUNTIME_DIRECTORY (set by systemd), $XDG_RUNTIME_DIR/spilld,
    /run/spilld for root, and ~/.local/state/spilld.

    Raises:
        ConfigError: The home directory is needed and is not known.
    """
    if given := environ.get("RUNTIME_DIRECTORY"):
        folder = Path(given.split(":")[0])
    elif given := environ.get("XDG_RUNTIME_DIR"):
        folder = Path(given) / "spilld"
    elif os.geteuid() == 0:
        folder = Path("/run/spilld")
    else:
        folder = home("XDG_RUNTIME_DIR") / ".local/state/spilld"
    return f"ipc://{folder}/spilld.sock"


def user_address() -> str:
    """Return the default address of a client of the same user, without systemd's $RUNTIME_DIRECTORY."""
    return default_address({name: value for name, value in os.environ.items() if name != "RUNTIME_DIRECTORY"})


def check_address(address: str, *, keyed: bool = False) -> str:
    """Check an address to listen at: ipc:// with a full path, or tcp://, on the loopback if not keyed.

    Returns:
        The address to bind, in which localhost is 127.0.0.1.

    Raises:
        ConfigError: The address is of another form, or not on the loopback although not keyed.
    """
    if address.startswith("ipc://"):
        path = socket_path(address)
        if not path.is_absolute() or len(os.fsencode(path)) > LONGEST_PATH:
            raise ConfigError(
                f"listen is {address!r}; allowed: ipc:// and a full path of at most {LONGEST_PATH} bytes"
            )
        return address
    parts = re.fullmatch(r"tcp://(\[[^]]*\]|[^:;]+):(\d{1,5}|\*)", address)
    if parts is None or (parts[2] != "*" and int(parts[2]) > 65535):
        raise ConfigError(
            f"listen is {address!r}; allowed: ipc:///path or tcp://127.0.0.1:port, ports to 65535"
        )
    if not keyed and not _is_loopback(parts[1]):
        raise ConfigError(
            f"listen is {address!r}; allowed over tcp without keys: 127.0.0.0/8, localhost or [::1]. For "
            "other machines make keys by `spilld keys` and set `keys` to their folder"
        )
    return address.replace("//localhost:", "//127.0.0.1:")


def check_endpoint(endpoint: str) -> str:
    """Check host:port as an endpoint that serves metrics.

    Raises:
        ConfigError: It is of another form, or the host is not the loopback.
    """
    parts = re.fullmatch(r"(\[[^]]*\]|[^:]*):(\d{1,5})", endpoint)
    if parts is None or not _is_loopback(parts[1]) or int(parts[2]) > 65535:
        raise ConfigError(
            f"metrics is {endpoint!r}; allowed: a port of the loopback, such as 127.0.0.1:9470. There is no "
            "authentication: read them from another machine through an ssh tunnel"
        )
    return endpoint.replace("localhost:", "127.0.0.1:")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def socket_path(address: str) -> Path:
    """Return the path of an ipc address."""
    return Path(address.removeprefix("ipc://"))
