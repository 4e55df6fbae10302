"""The listening socket: a zmq ROUTER, behind a gate or not, and for ipc a file that only we may replace."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Self

import zmq

from .address import check_address, socket_path
from .errors import ConfigError
from .gate import Gate
from .protocol import HEARTBEAT_MS, MAX_FRAME_BYTES, SILENT_MS

log = logging.getLogger(__name__)

LINGER_MS = 500
"""How long the last words to slow clients may take when the daemon ends."""


@contextmanager
def listen(
    address: str, send_queue: int, gate: Gate | None = None, *, open_to_group: bool = False
) -> Iterator[zmq.Socket[bytes]]:
    """A bound ROUTER that keeps at most send_queue messages for a client; without a gate all may connect who
    can reach the address. ConfigError if it cannot be had.

    An ipc socket is its owner's alone, or its group's, too: by the modes of its file, and by what the kernel
    says of who connects.
    """
    ipc = check_address(address, keyed=gate is not None).startswith("ipc://")
    if gate is None and not ipc:
        log.warning("every user of this machine can connect to %s; to change that: `spilld keys`", address)
    with (
        SocketFile(socket_path(address)) if ipc else nullcontext(),
        _router(address, send_queue, gate, open_to_group) as router,
    ):
        yield router


@contextmanager
def _router(
    address: str, send_queue: int, gate: Gate | None, open_to_group: bool
) -> Iterator[zmq.Socket[bytes]]:
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        if gate is not None:
            stack.enter_context(gate.answering(context))
        router = stack.enter_context(context.socket(zmq.ROUTER))
        if gate is not None:
            gate.lock(router)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_FRAME_BYTES)
        router.setsockopt(zmq.SNDHWM, send_queue)
        router.setsockopt(zmq.LINGER, LINGER_MS)
        router.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        router.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)
        router.setsockopt(zmq.IPV6, int("[" in address))
        if address.startswith("ipc://"):
            _look_at_peers(router, _group(socket_path(address).parent) if open_to_group else None)
        mask = 0o117 if open_to_group else 0o177
        before = os.umask(mask)  # the socket is never open to others, not even between bind and a chmod
        try:
            router.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen at {address}: {error}") from error
        finally:
            os.umask(before)
        yield router


def _look_at_peers(router: zmq.Socket[bytes], group: int | None) -> None:
    """Let in only the daemon's user, root, and members of the group, whatever the file's modes become."""
    if not _sees_all_users():
        log.info("in a user namespace only the modes of the socket's file say who may connect")
        return
    try:
        for user in {os.geteuid(), 0}:
            router.setsockopt(zmq.IPC_FILTER_UID, user)
        if group is not None:
            router.setsockopt(zmq.IPC_FILTER_GID, group)
    except zmq.ZMQError as error:  # they may be gone from a later libzmq
        log.warning("only the modes of the socket's file say who may connect: %s", error)


def _sees_all_users(users: Path = Path("/proc/self/uid_map")) -> bool:
    """Whether the kernel shows this process every user as who it is."""
    try:
        return users.read_text().split() == ["0", "0", "4294967295"]
    except OSError:
        return False


def _group(folder: Path) -> int:
    """Of a file that is made there."""
    status = folder.stat()
    return status.st_gid if status.st_mode & stat.S_ISGID else os.getegid()


class SocketFile:
    """The right to bind one ipc path, held as a context.

    libzmq replaces whatever lies at the path, so two daemons would steal each other's clients: a lock
    file beside it is held as long as the socket lives. It is never removed, because another daemon may
    be waiting with it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        """ConfigError if somebody listens there, if something else lies there, or if the folder refuses."""
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
