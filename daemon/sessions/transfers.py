"""Files that clients download or upload piece by piece, named by 128 random bits."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from spilld.errors import (
    InvalidRequest,
    Overloaded,
    StorageFailed,
    TransferNotFound,
)
from spilld.offload.system import SystemCalls
from spilld.protocol.messages import PIECE_BYTES

from .idle_contexts import new_handle

log = logging.getLogger(__name__)

MOST = 64
"""The most transfers that are open at a time."""

IDLE_S = 600.0
"""Seconds without a request after which a transfer ends."""

_NAME = re.compile(r"[0-9a-f]{32}\.transfer")


@dataclass
class _Transfer:
    path: Path
    file: BinaryIO
    nbytes: int
    received: int
    used: float
    busy: bool = False
    """The daemon builds or imports it: clients cannot read, write or close it, and it does not expire."""


class Transfers:
    """Files of mode 0600 in a folder of mode 0700, emptied at start. Thread-safe.

    Together they have at most `quota_bytes`, counted when they are opened, and leave `floor_bytes` of the
    file system free.
    """

    def __init__(
        self, folder: Path, quota_bytes: int, floor_bytes: int, system: SystemCalls | None = None
    ) -> None:
        """Make the folder, and delete the files of the last process.

        Args:
            folder: Where the files are.
            quota_bytes: The most bytes that all files may have together.
            floor_bytes: Bytes of the file system that are left free.
            system: System calls, which tests replace.

        Raises:
            OSError: The folder cannot be made or emptied.
        """
        self._folder = folder
        self._quota_bytes = quota_bytes
        self._floor_bytes = floor_bytes
        self._system = system or SystemCalls()
        self._open: dict[str, _Transfer] = {}
        self._lock = threading.Lock()
        folder.mkdir(mode=0o700, exist_ok=True)
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name):
                path.unlink()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, nbytes: int, *, busy: bool = False) -> str:
        """Open a file of `nbytes` bytes, and return its id.

        Args:
            nbytes: Bytes that the file will have.
            busy: Whether the caller fills the file, until `free`; clients cannot use it before.

        Raises:
            Overloaded: There is no room for it.
            StorageFailed: The file cannot be made.
        """
        with self._lock:
            self._expire()
            self._respect_quota(nbytes)
            name = new_handle()
            path = self._folder / f"{name}.transfer"
            try:
                descriptor = self._system.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            except OSError as error:
                raise StorageFailed(f"no transfer can begin: {error}") from error
            file = os.fdopen(descriptor, "w+b")
            received = nbytes if busy else 0
            self._open[name] = _Transfer(path, file, nbytes, received, time.monotonic(), busy)
            return name

    def read(self, name: str, offset: int) -> bytes:
        """Return a piece of a complete file: PIECE_BYTES bytes, or what is left.

        Raises:
            TransferNotFound: There is no such transfer.
            InvalidRequest: The file is incomplete, or the offset is beyond its end.
            StorageFailed: The file cannot be read.
        """
        with self._lock:
            transfer = self._whole(name)
            if offset >= transfer.nbytes:
                raise InvalidRequest(f"offset is {offset}; allowed: 0 to {transfer.nbytes - 1}")
            try:
                return os.pread(transfer.file.fileno(), PIECE_BYTES, offset)
            except OSError as error:
                raise StorageFailed(f"the transfer cannot be read: {error}; begin again") from error

    def write(self, name: str, offset: int, data: bytes) -> int:
        """Append a piece, and return the number of bytes received so far.

        Raises:
            TransferNotFound: There is no such transfer.
            InvalidRequest: The piece does not continue the file, or exceeds its size.
            StorageFailed: The file cannot be written; the transfer is ended.
        """
        with self._lock:
            transfer = self._find(name)
            if offset != transfer.received or offset + len(data) > transfer.nbytes:
                raise InvalidRequest(
                    f"offset is {offset}, with {len(data)} bytes; allowed: {transfer.received}, "
                    f"and at most {transfer.nbytes - transfer.received} bytes"
                )
            try:
                transfer.file.write(data)
                transfer.file.flush()
            except OSError as error:
                self._close(name)
                raise StorageFailed(f"the transfer cannot be written: {error}; begin again") from error
            transfer.received += len(data)
            return transfer.received

    def claim(self, name: str) -> BinaryIO:
        """Return a complete file, at its start; it is the caller's alone until `end`.

        Raises:
            TransferNotFound: There is no such transfer.
            InvalidRequest: The file is incomplete.
        """
        with self._lock:
            transfer = self._whole(name)
            transfer.busy = True
            transfer.file.seek(0)
            return transfer.file

    def file(self, name: str) -> BinaryIO:
        """Return the file of a busy transfer."""
        return self._open[name].file

    def free(self, name: str) -> None:
        """Let clients read the file of a busy transfer from now on."""
        with self._lock:
            transfer = self._open[name]
            transfer.busy, transfer.used = False, time.monotonic()

    def close(self, name: str) -> int:
        """End a transfer, and return the number of bytes that it had.

        Raises:
            TransferNotFound: There is no such transfer.
        """
        with self._lock:
            return self._close(self._known(name))

    def end(self, name: str) -> None:
        """End a transfer that is busy."""
        with self._lock:
            self._close(name)

    def expire(self) -> None:
        """End the transfers that no request was about in IDLE_S."""
        with self._lock:
            self._expire()

    def close_all(self) -> None:
        """End every transfer."""
        with self._lock:
            for name in list(self._open):
                self._close(name)

    def _find(self, name: str) -> _Transfer:
        transfer = self._open[self._known(name)]
        transfer.used = time.monotonic()
        return transfer

    def _whole(self, name: str) -> _Transfer:
        transfer = self._find(name)
        if transfer.received < transfer.nbytes:
            raise InvalidRequest(
                f"{transfer.received} of {transfer.nbytes} bytes of it have come; send the rest first"
            )
        return transfer

    def _known(self, name: str) -> str:
        if name not in self._open or self._open[name].busy:
            raise TransferNotFound(f"there is no transfer {name[:8]!r}: it has ended or expired; begin again")
        return name

    def _respect_quota(self, nbytes: int) -> None:
        taken = sum(transfer.nbytes for transfer in self._open.values())
        if len(self._open) >= MOST:
            raise Overloaded(f"{MOST} transfers are open; try again later")
        if taken + nbytes > self._quota_bytes:
            raise Overloaded(
                f"a transfer of {nbytes} bytes beside {taken} of others is more than the {self._quota_bytes} "
                "that transfers may take, as many as disk_budget; raise that, or try again later"
            )
        left = self._system.free_bytes(self._folder) - nbytes
        if left < self._floor_bytes:
            raise Overloaded(
                f"a transfer of {nbytes} bytes would leave {left} bytes free on disk; disk_floor asks for "
                f"{self._floor_bytes}"
            )

    def _expire(self) -> None:
        now = time.monotonic()
        for name, transfer in list(self._open.items()):
            if not transfer.busy and now - transfer.used > IDLE_S:
                log.info("transfer %s has expired: no client asked for it", name[:8])
                self._close(name)

    def _close(self, name: str) -> int:
        transfer = self._open.pop(name)
        try:
            transfer.file.close()
            transfer.path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("transfer %s stays behind until the next start: %s", name[:8], error)
        return transfer.received
