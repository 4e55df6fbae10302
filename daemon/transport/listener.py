"""The listening socket, and for ipc a socket file that only this daemon may replace."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from spilld.errors import ConfigError
from spilld.protocol.address import check_address, socket_path
from spilld.protocol.messages import HEARTBEAT_MS, SILENT_MS

from .authentication import CurveAuthentication
from .descriptors import connections
from .router import Router
from .zmtp import Null

log = logging.getLogger(__name__)

BACKLOG = 1024

SO_PEERGROUPS = 59
"""socket(7); not in Python's socket module."""

TCP_OPTIONS = (
    ((socket.IPPROTO_TCP, socket.TCP_NODELAY), 1),
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), HEARTBEAT_MS // 1000),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), HEARTBEAT_MS // 1000),
    ((socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT), SILENT_MS),
)
"""They detect a machine that lost its power, whether or not its client sends heartbeats."""


@contextmanager
def listen(
    address: str,
    send_queue: int,
    authentication: CurveAuthentication | None = None,
    *,
    open_to_group: bool = False,
    max_connections: int = 1000,
) -> Iterator[tuple[Router, str]]:
    """Listen at an address while the context lasts.

    An ipc socket is open to its owner alone, or to its group, too: by the modes of its file, and by what the
    kernel says of the peer that connects. Without authentication every client that can reach the address may
    connect.

    Args:
        address: Where to listen.
        send_queue: Messages that may wait for a client.
        authentication: Of clients, by keys; None for none.
        open_to_group: Whether an ipc socket is open to its group, too.
        max_connections: How many connections there may be; fewer where descriptors are short.

    Returns:
        The router, and the address with the port that it has.

    Raises:
        ConfigError: The address cannot be used.
    """
    ipc = check_address(address, keyed=authentication is not None).startswith("ipc://")
    if authentication is None and not ipc:
        log.warning("every user of this machine can connect to %s; to change that: `spilld keys`", address)
    most = connections(max_connections)
    with ExitStack() as stack:
        admits: Callable[[socket.socket], bool] = _anybody
        if ipc:
            path = socket_path(address)
            stack.enter_context(SocketFile(path))
            listening = _bind_path(path, open_to_group=open_to_group)
            admits = _Peers.of(_group(path.parent) if open_to_group else None)
        else:
            listening, address = _bind_tcp(address)
        stack.callback(listening.close)
        mechanism = Null if authentication is None else authentication.mechanism
        router = Router(listening, send_queue, most, mechanism, admits)
        stack.callback(router.close)
        yield router, address


def _bind_path(path: Path, *, open_to_group: bool) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o117 if open_to_group else 0o177)
    try:  # the socket is never open to others, not even between bind and a chmod
        path.unlink(missing_ok=True)
        listening.bind(os.fspath(path))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(f"cannot listen at ipc://{path}: {error}") from error
    finally:
        os.umask(before)
    return listening


def _bind_tcp(address: str) -> tuple[socket.socket, str]:
    """Return the socket, and its address with the port that it has."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    number = 0 if port == "*" else int(port)
    host = "0.0.0.0" if host == "*" else host.strip("[]")
    listening = None
    try:
        family, kind, proto, _, place = socket.getaddrinfo(
            host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, proto)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for option, value in TCP_OPTIONS:
            listening.setsockopt(*option, value)  # what is accepted has them, too
        listening.bind(place)
        listening.listen(BACKLOG)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise ConfigError(f"cannot listen at {address}: {error}") from error
    name = f"[{host}]" if ":" in host else host
    return listening, f"tcp://{name}:{listening.getsockname()[1]}"


def _anybody(_peer: socket.socket) -> bool:
    return True


@dataclass(frozen=True)
class _Peers:
    """Who may connect: the daemon's user, root, and members of a group, whatever the file's modes become."""

    users: frozenset[int]
    group: int | None

    @classmethod
    def of(cls, group: int | None) -> Callable[[socket.socket], bool]:
        if not _sees_all_users():
            log.info("in a user namespace only the modes of the socket's file say who may connect")
            return _anybody
        return cls(frozenset({os.geteuid(), 0}), group).admit

    def admit(self, peer: socket.socket) -> bool:
        try:
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            _process, user, group = struct.unpack("iII", credentials)
            if user in self.users or group == self.group:
                return True
            return self.group is not None and self.group in _groups(peer)
        except OSError:
            return False


def _groups(peer: socket.socket) -> Sequence[int]:
    """Return the supplementary groups of a peer."""
    found = peer.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
    return struct.unpack(f"{len(found) // 4}I", found)


def _sees_all_users(users: Path = Path("/proc/self/uid_map")) -> bool:
    """Whether the kernel shows this process every user by its real id."""
    try:
        return users.read_text().split() == ["0", "0", "4294967295"]
    except OSError:
        return False


def _group(folder: Path) -> int:
    """Return the group of a file that is made in a folder."""
    status = folder.stat()
    return status.st_gid if status.st_mode & stat.S_ISGID else os.getegid()


class SocketFile:
    """The right to bind one ipc path, as a context.

    The file that a killed daemon has left there is replaced, so two daemons could take each other's clients:
    a lock file beside it is locked as long as the socket exists. It is never removed, because another daemon
    may have it open and wait for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            ConfigError: Another process listens there, something else than a socket is there, or the folder
                cannot be used.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot listen at {self.path}: {error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._refuse_if_in_use()
        except BlockingIOError as error:
            os.close(lock)
            raise ConfigError(f"another spilld listens at {self.path}; stop it or set `listen`") from error
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock
        return self

    def _refuse_if_in_use(self) -> None:
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise ConfigError(f"{self.path} exists and is not a socket; move it away or set `listen`")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(os.fspath(self.path))
            except (ConnectionRefusedError, FileNotFoundError):
                return  # left behind by a process that is gone
            except BlockingIOError:
                pass  # a listener whose backlog is full
        raise ConfigError(f"another process listens at {self.path}; stop it or set `listen`")

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._lock)
