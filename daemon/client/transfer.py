"""Downloads and uploads the archive of a session, piece by piece.

The client has the file; the daemon never gets its path.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from spilld.errors import CorruptArchive, InvalidRequest, ProtocolError
from spilld.protocol.messages import (
    PIECE_BYTES,
    CloseTransfer,
    Exported,
    ExportSession,
    Imported,
    ImportSession,
    ListSessions,
    OpenTransfer,
    Piece,
    ReadTransfer,
    Sessions,
    Transfer,
    WriteTransfer,
)

from .query import Operation, ask

PIECE_S = 60.0
"""Seconds that a piece waits: the daemon serves other clients, too, and waits for its disk."""

BUILD_S = 3600.0
"""Seconds that export and import wait: the daemon reads or writes all of it, beside other work."""

NextId = Callable[[], str]


def download(session: str, tenant: str, path: Path, next_id: NextId) -> Operation[Exported]:
    """Export a session to a new file of mode 0600. On any error there is no file.

    Raises:
        InvalidRequest: The file exists or cannot be written.
        SpilldError: What the daemon answers.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}; name a new file") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            request = ExportSession(request_id=next_id(), session=session, tenant=tenant)
            exported = yield from ask(request, Exported, BUILD_S)
            for offset in range(0, exported.nbytes, PIECE_BYTES):
                read = ReadTransfer(request_id=next_id(), transfer=exported.transfer, offset=offset)
                data = (yield from ask(read, Piece, PIECE_S)).data
                if len(data) != min(PIECE_BYTES, exported.nbytes - offset):
                    raise ProtocolError(f"a piece of {len(data)} bytes came at {offset} of {exported.nbytes}")
                _put(file, data, path)
            _put(file, b"", path)
        close = CloseTransfer(request_id=next_id(), transfer=exported.transfer)
        yield from ask(close, Transfer, PIECE_S)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return exported


def upload(path: Path, session: str, tenant: str, next_id: NextId) -> Operation[Imported]:
    """Import a session from a file.

    Raises:
        CorruptArchive: The file cannot be read, or the daemon refuses it.
        InvalidRequest: The name is taken.
        SpilldError: What else the daemon answers.
    """
    listed = yield from ask(ListSessions(request_id=next_id(), tenant=tenant), Sessions, PIECE_S)
    if any(info.name == session for info in listed.sessions):  # before much is sent
        raise InvalidRequest(f"there is a session {session!r} already; delete it or choose another name")
    try:
        file = path.open("rb")
        nbytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CorruptArchive(f"cannot read {path}: {error.strerror}; name a file of an export") from error
    with file:
        begin = OpenTransfer(request_id=next_id(), nbytes=nbytes)
        transfer = (yield from ask(begin, Transfer, PIECE_S)).transfer
        offset = 0
        while data := _take(file, path):
            write = WriteTransfer(request_id=next_id(), transfer=transfer, offset=offset, data=data)
            yield from ask(write, Transfer, PIECE_S)
            offset += len(data)
    request = ImportSession(request_id=next_id(), transfer=transfer, session=session, tenant=tenant)
    return (yield from ask(request, Imported, BUILD_S))


def _put(file: BinaryIO, data: bytes, path: Path) -> None:
    """Write a piece; an empty one syncs the file to disk."""
    try:
        file.write(data)
        if not data:
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}; make room, or name another") from error


def _take(file: BinaryIO, path: Path) -> bytes:
    try:
        return file.read(PIECE_BYTES)
    except OSError as error:
        raise CorruptArchive(f"cannot read {path}: {error.strerror}; name a file of an export") from error
