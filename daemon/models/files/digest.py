"""Digests of files by all their bytes, each file read once.

What is stored for a model is tied to these: size and modification time may be the same for other weights
(reproducible images, `rsync -t`). 128 bits of xxh3 distinguish what differs by accident. They do not
withstand a deliberate collision, and need not: whoever may write a model's weights decides what it answers.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import xxhash

from spilld.errors import ConfigError, CorruptModel

log = logging.getLogger(__name__)

_CHUNK = 4 << 20
_SETTLED_NS = 2_000_000_000
"""A file that changed more recently is read again next time: a further write may not change its time."""

_LOGGED_FROM = 1 << 30
"""Files of at least so many bytes are logged while they are read."""

_LOGGED_EVERY_S = 10.0
_KNOW_NO_CHANGE = frozenset(
    {0x73717368, 0xE0F5E1E2, 0x9660, 0x28CD3D45, 0x7275, 0x65735546}
)  # squashfs, erofs, iso9660, cramfs, romfs, FUSE
"""File systems (statfs(2), f_type) whose times of change are not set by the kernel of this machine."""

_ATTEMPTS = 3


def digest(files: Iterable[Path], cache: Path) -> bytes:
    """Return 16 bytes over the files' contents in the given order: xxh3_128 of their xxh3_128s.

    A file is read (never mapped, so it does not count as this process's memory) once; the result is kept in
    `cache/digests` for as long as the file's device, inode, time of change (which no program can set) and
    size stay the same.

    Args:
        files: The files.
        cache: The cache folder.

    Raises:
        ConfigError: The cache cannot be written.
        CorruptModel: A file does not stop changing.
    """
    return xxhash.xxh3_128_digest(b"".join(_file_digest(file.resolve(), cache) for file in files))


def is_noted(file: Path, cache: Path) -> bool:
    """Whether `digest` knows the file without reading it."""
    file = file.resolve()
    return _noted(_note(file, cache), _state(file)) is not None


def _note(file: Path, cache: Path) -> Path:
    return cache / "digests" / hashlib.blake2b(os.fsencode(file), digest_size=16).hexdigest()


def _file_digest(file: Path, cache: Path) -> bytes:
    note = _note(file, cache)
    if (known := _noted(note, _state(file))) is not None:
        return known
    for _ in range(_ATTEMPTS):
        began, before = time.time_ns(), _state(file)
        found = _read(file)
        if _state(file) == before:
            break
    else:
        raise CorruptModel(f"{file} changes while it is read: start again when it is whole")
    if began - file.stat().st_ctime_ns > _SETTLED_NS and _file_system(file) not in _KNOW_NO_CHANGE:
        _keep(note, before, found, cache)
    return found


def _state(file: Path) -> list[int]:
    """Return what differs whenever the contents do."""
    status = file.stat()
    return [status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size]


def _read(file: Path) -> bytes:
    hasher, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as stream:
        size, read, logged = os.fstat(stream.fileno()).st_size, 0, time.monotonic()
        if size >= _LOGGED_FROM:
            log.info("reading %s (%.1f GiB), once, to know it again", file.name, size / 2**30)
        while count := stream.readinto(buffer):
            hasher.update(buffer[:count])
            read += count
            if size >= _LOGGED_FROM and time.monotonic() - logged > _LOGGED_EVERY_S:
                logged = time.monotonic()
                log.info("%s: %d %% read", file.name, 100 * read // size)
    return hasher.digest()


def _keep(note: Path, state: list[int], found: bytes, cache: Path) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own for every writer: two threads of one process may digest the same file.
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as writing:
            json.dump({"state": state, "xxh3_128": found.hex()}, writing)
        Path(writing.name).replace(note)
    except OSError as error:
        raise ConfigError(f"the cache folder {cache} cannot be written: {error}") from error


def _noted(note: Path, state: list[int]) -> bytes | None:
    try:
        noted = json.loads(note.read_text())
        return bytes.fromhex(noted["xxh3_128"]) if noted["state"] == state else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):  # a damaged or foreign note: read the file again
        return None


def _file_system(file: Path) -> int:
    """Return f_type of statfs(2), which Python does not give; 0 where the C library has none."""
    found = ctypes.create_string_buffer(256)
    try:
        failed = ctypes.CDLL(None).statfs(os.fsencode(file), found)
    except AttributeError:
        return 0
    return 0 if failed else int.from_bytes(found.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)
