"""Weight files: what a folder's safetensors hold, and digests of files that are read once."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from .errors import ConfigError, CorruptModel, UnsupportedModel

_CHUNK = 4 << 20
_MAX_HEADER = 100 << 20
"""The limit of the safetensors format itself."""

_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Layout:
    """The safetensors of one folder: files in name order, dtypes of their tensors, how many numbers."""

    files: tuple[Path, ...]
    dtypes: frozenset[str]
    parameters: int


def read_layout(folder: Path) -> Layout:
    """Read every safetensors header and check that each file is exactly as long as its header says.

    Raises CorruptModel (damaged or cut off) or UnsupportedModel (no safetensors, or quantised weights).
    """
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise UnsupportedModel(f"{folder} has no .safetensors file; other weight files are not read")
    dtypes: set[str] = set()
    parameters = 0
    for file in files:
        found, count = _tensors(file)
        dtypes, parameters = dtypes | found, parameters + count
    if unknown := dtypes - set(_NAMES):
        raise UnsupportedModel(f"{folder}: weights stored as {', '.join(sorted(unknown))} are not supported")
    return Layout(files, frozenset(_NAMES[dtype] for dtype in dtypes), parameters)


def _tensors(file: Path) -> tuple[set[str], int]:
    """Their dtypes, and how many numbers they have."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CorruptModel(f"{file} is cut off or no safetensors file")
        try:
            header = json.loads(stream.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            end = max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
            dtypes = {str(entry["dtype"]) for entry in tensors}
            parameters = sum(math.prod(map(int, entry["shape"])) for entry in tensors)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise CorruptModel(f"{file}: the safetensors header is damaged ({error!r})") from error
    if 8 + length + end != size:
        raise CorruptModel(f"{file} has {size} bytes where its header says {8 + length + end}")
    return dtypes, parameters


def model_files(folder: Path) -> list[Path]:
    """A model folder's own files in name order, without weights in formats that are not read."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return [file for file in files if file.suffix not in (".bin", ".pt", ".pth", ".gguf", ".onnx")]


def digest(files: Iterable[Path], cache: Path) -> bytes:
    """16 bytes over the files' contents in the given order: xxh3_128 of their xxh3_128s.

    A file is read (never mapped, so it does not count as this process's memory) once; the result is kept in
    `cache/digests` for as long as its size and modification time stay. Raises ConfigError if that cannot be
    written.
    """
    return xxhash.xxh3_128_digest(b"".join(_file_digest(file.resolve(), cache) for file in files))


def _file_digest(file: Path, cache: Path) -> bytes:
    status = file.stat()
    state: list[str | int] = [str(file), status.st_size, status.st_mtime_ns]
    note = cache / "digests" / hashlib.blake2b(os.fsencode(file), digest_size=16).hexdigest()
    if (known := _noted(note, state)) is not None:
        return known
    hasher = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK):
            hasher.update(chunk)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own for every writer: two threads of one process may digest the same file.
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as writing:
            json.dump({"file": state, "xxh3_128": hasher.hexdigest()}, writing)
        Path(writing.name).replace(note)
    except OSError as error:
        raise ConfigError(f"the cache folder {cache} cannot be written: {error}") from error
    return hasher.digest()


def _noted(note: Path, state: list[str | int]) -> bytes | None:
    try:
        noted = json.loads(note.read_text())
        return bytes.fromhex(noted["xxh3_128"]) if noted["file"] == state else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):  # a torn or foreign note: read the file again
        return None
