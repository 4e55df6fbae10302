"""Where the daemon listens: an ipc socket, or tcp, beyond the loopback with keys."""

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
    """The user's home directory; ConfigError where it is not known, which names what can be set `instead`."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise ConfigError(f"your home directory is not known; set HOME, or {instead}") from error


def default_address(environ: Mapping[str, str] = os.environ) -> str:
    """ipc in $RUNTIME_DIRECTORY (set by systemd), $XDG_RUNTIME_DIR/spilld, /run/spilld for root, or
    ~/.local/state/spilld: the first that applies.
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
    """default_address as a client of the same user has it, which systemd does not start."""
    return default_address({name: value for name, value in os.environ.items() if name != "RUNTIME_DIRECTORY"})


def check_address(address: str, *, keyed: bool = False) -> str:
    """The address to bind: ipc:// with a full path or tcp://, on loopback if not keyed; else ConfigError."""
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
    """host:port to serve metrics at: ConfigError unless the host is the loopback."""
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
    """The path of an ipc address."""
    return Path(address.removeprefix("ipc://"))
