"""The archive: tokens and KV of one sequence in one file, verified as a whole. FORMAT.md has the byte tables.

Its chain hashes are made without a tenant's secret: beside the tokens, a hash made with the secret would let
a reader of the file guess secrets and check each guess.
"""

from __future__ import annotations

import operator
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO

import msgpack
import numpy as np
import xxhash

from spilld.offload.disk.files import extent
from spilld.offload.disk.files.extent import ExtentIdentity, RunKey
from spilld.offload.errors import ArchiveDamaged, ArchiveUnknown, ExtentCorrupt
from spilld.offload.prefix_cache.block_hash import chain, root
from spilld.offload.record import (
    BLOCK,
    Element,
    Format,
    round_up,
)
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import PAGE, Bytes, page_aligned

MAGIC = b"SPILLARC"
VERSION = 2
END_MAGIC = b"SPILLEND"

_HEADER = struct.Struct("<8sIIQQ")
_TRAILER = struct.Struct("<8sQ16s")

EXTENT_LIMIT = 256 << 20
"""Bytes of the largest extent that an archive may have: a reader must have memory for it."""

MANIFEST_LIMIT = 256 << 20

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each extent; what it raises ends the work."""


@dataclass(frozen=True)
class ArchivedRun:
    """Blocks [first, first + count) of the sequence, or its checkpoint.

    Attributes:
        run: The run's key.
        first: Its first block.
        count: How many blocks it has.
        upto: The run belongs to the chain of so many blocks; those of a checkpoint are the ones before its
            tokens.
        checkpoint: Whether it is the checkpoint.
    """

    run: RunKey
    first: int
    count: int
    upto: int
    checkpoint: bool = False


@dataclass(frozen=True)
class Manifest:
    """What an archive holds.

    Attributes:
        layouts: Of the records.
        fingerprint: 32 bytes, of the model that the KV depends on.
        tokens: All tokens of the sequence.
        position: How many tokens need not be computed; 0 without runs.
        runs: Runs of blocks; the checkpoint is the last of them.
        about: Plain data for the program that wrote the archive.
    """

    layouts: StoreLayout
    fingerprint: bytes
    tokens: tuple[int, ...]
    position: int = 0
    runs: tuple[ArchivedRun, ...] = ()
    about: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layouts.format is Format.RAW:
            raise ValueError("an archive holds sealed blocks, not raw ones")
        if not 0 <= self.position <= len(self.tokens) or bool(self.runs) != bool(self.position):
            raise ValueError(f"{len(self.runs)} runs, {self.position} of {len(self.tokens)} tokens computed")
        for run in self.runs:
            if not 0 <= run.upto <= len(self.tokens) // BLOCK or not 0 <= run.first <= len(self.tokens):
                raise ValueError(f"run {run.run.hex()} does not belong to {len(self.tokens)} tokens")
            if self.identity(run).largest_extent > EXTENT_LIMIT:
                raise ValueError(f"an extent has more than {EXTENT_LIMIT} bytes")

    @cached_property
    def chain(self) -> list[bytes]:
        """The root and the chain hashes of all whole blocks, without a tenant."""
        first = root(self.fingerprint, self.layouts.format)
        return [first, *chain(first, self.tokens, len(self.tokens) // BLOCK)]

    def identity(self, run: ArchivedRun) -> ExtentIdentity:
        """Return what the headers of the run's extents in the file contain."""
        layouts = self.layouts.raw if run.checkpoint else self.layouts
        chain_hash = self.chain[run.upto]
        return ExtentIdentity(layouts, self.fingerprint, run.run, chain_hash, run.first, run.count)

    @property
    def largest(self) -> int:
        """Bytes of the largest extent."""
        return max((self.identity(run).largest_extent for run in self.runs), default=0)

    def pack(self) -> bytes:
        """Return the manifest as msgpack."""
        packed: bytes = msgpack.packb(
            {
                "format": str(self.layouts.format),
                "element": str(self.layouts.element),
                "shapes": self.layouts.shapes,
                "fingerprint": self.fingerprint,
                "tokens": np.asarray(self.tokens, "<u4").tobytes(),
                "position": self.position,
                "runs": [[run.run, run.first, run.count, run.upto, run.checkpoint] for run in self.runs],
                "about": self.about,
            }
        )
        return packed


def archive_bytes(manifest: Manifest) -> int:
    """Return the length of the file in bytes."""
    extents = sum(manifest.identity(run).run_bytes for run in manifest.runs)
    return _extents_at(len(manifest.pack())) + extents + _TRAILER.size


def write(
    file: BinaryIO,
    manifest: Manifest,
    records: Callable[[ArchivedRun, int, Bytes], None],
    progress: Progress = lambda _done, _all: None,
) -> None:
    """Write a whole archive to an empty file.

    Args:
        file: The file, at its beginning.
        manifest: What the archive holds.
        records: records(run, layer, into) fills `[count, record_bytes] uint8`. What it raises ends the work.
        progress: Called with (bytes done, bytes in all) after each extent. What it raises ends the work.

    Raises:
        OSError: The file cannot be written. After any error it does not hold an archive.
    """
    packed = manifest.pack()
    total, hasher = archive_bytes(manifest), xxhash.xxh3_128()

    def put(piece: bytes | memoryview) -> None:
        file.write(piece)
        hasher.update(piece)

    head = _HEADER.pack(MAGIC, VERSION, 0, len(packed), 0)[:-8]
    put(head + xxhash.xxh3_64_intdigest(head + packed).to_bytes(8, "little") + packed)
    put(bytes(_extents_at(len(packed)) - _HEADER.size - len(packed)))
    buffer = page_aligned(max(PAGE, manifest.largest))
    for run in manifest.runs:
        identity = manifest.identity(run)
        for layer in range(identity.layers):
            records(run, layer, extent.payload(buffer, identity, layer))
            extent.seal(buffer, identity, layer)
            put(buffer[: identity.extent_bytes(layer)].data)
            progress(file.tell(), total)
    file.write(_TRAILER.pack(END_MAGIC, total, hasher.digest()))
    file.flush()


class Archive:
    """An archive in a file that is open for reading. Do not trust it before `verify` has returned."""

    def __init__(self, file: BinaryIO) -> None:
        """Read the manifest.

        Raises:
            ArchiveDamaged: The file is no archive, or not what was written.
            ArchiveUnknown: It is an archive of another version.
            OSError: The file cannot be read.
        """
        self._file = file
        self._nbytes = os.fstat(file.fileno()).st_size
        packed = self._packed()
        try:
            self.manifest = _manifest(msgpack.unpackb(packed), self._nbytes)
        except (ValueError, TypeError, KeyError, OverflowError, msgpack.UnpackException) as error:
            raise ArchiveDamaged(f"malformed manifest: {error!r}") from error
        self._at: dict[RunKey, int] = {}
        at = _extents_at(len(packed))
        for run in self.manifest.runs:
            self._at[run.run] = at
            at += self.manifest.identity(run).run_bytes
        if len(self._at) != len(self.manifest.runs) or at + _TRAILER.size != self._nbytes:
            raise ArchiveDamaged(f"it has {self._nbytes} bytes; its manifest says {at + _TRAILER.size}")
        self._buffer = page_aligned(max(PAGE, self.manifest.largest))

    def verify(self, progress: Progress = lambda _done, _all: None) -> None:
        """Read and verify the whole file.

        Raises:
            ArchiveDamaged: Some byte is not what was written.
            OSError: The file cannot be read.
        """
        hasher = xxhash.xxh3_128()
        self._file.seek(0)
        first = min(self._at.values(), default=self._nbytes - _TRAILER.size)
        hasher.update(self._file.read(first))
        for run in self.manifest.runs:
            identity = self.manifest.identity(run)
            for layer in range(identity.layers):
                self.read(run, layer)
                hasher.update(self._buffer[: identity.extent_bytes(layer)].data)
                progress(self._file.tell(), self._nbytes)
        if self._file.read() != _TRAILER.pack(END_MAGIC, self._nbytes, hasher.digest()):
            raise ArchiveDamaged("wrong checksum at its end")

    def read(self, run: ArchivedRun, layer: int) -> Bytes:
        """Read the records of one layer of a run.

        Returns:
            Verified records, `[count, record_bytes] uint8`, valid until the next read.

        Raises:
            ArchiveDamaged: They are not what was written.
            OSError: The file cannot be read.
        """
        identity = self.manifest.identity(run)
        wanted = self._buffer[: identity.extent_bytes(layer)]
        self._file.seek(self._at[run.run] + identity.offset(layer))
        if _fill(self._file, wanted) < len(wanted):
            raise ArchiveDamaged("it ends within an extent")
        try:
            return extent.verify(wanted, identity, layer)
        except ExtentCorrupt as error:
            raise ArchiveDamaged(str(error)) from error

    def _packed(self) -> bytes:
        head = self._file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(MAGIC):
            raise ArchiveDamaged(f"it does not begin with {MAGIC!r}")
        _, version, reserved, nbytes, checksum = _HEADER.unpack(head)
        if version != VERSION or reserved:
            raise ArchiveUnknown(f"it has version {version} of the format; this spilld reads {VERSION}")
        if nbytes > min(MANIFEST_LIMIT, self._nbytes):
            raise ArchiveDamaged(f"{nbytes} bytes of manifest do not fit into {self._nbytes}")
        packed = self._file.read(nbytes)
        if xxhash.xxh3_64_intdigest(head[:-8] + packed) != checksum:
            raise ArchiveDamaged("wrong checksum of the manifest")
        return packed


def _manifest(fields: dict[str, Any], nbytes: int) -> Manifest:
    """Parse the manifest of a file of so many bytes; ValueError, TypeError and KeyError say it is wrong."""
    whole = operator.index
    shapes = [(whole(count), whole(heads), whole(dim)) for count, heads, dim in fields["shapes"]]
    layouts = StoreLayout.of(Format(fields["format"]), Element(fields["element"]), shapes)
    if len(fields["runs"]) * len(layouts) * PAGE > nbytes:  # before each of them takes time
        raise ValueError(
            f"{len(fields['runs'])} runs of {len(layouts)} layers do not fit into {nbytes} bytes"
        )
    runs = tuple(
        ArchivedRun(bytes(run), whole(first), whole(count), whole(upto), bool(checkpoint))
        for run, first, count, upto, checkpoint in fields["runs"]
    )
    return Manifest(
        layouts,
        bytes(fields["fingerprint"]),
        tuple(np.frombuffer(fields["tokens"], "<u4").tolist()),
        whole(fields["position"]),
        runs,
        dict(fields["about"]),
    )


def _extents_at(manifest_bytes: int) -> int:
    return round_up(_HEADER.size + manifest_bytes, PAGE)


def _fill(file: BinaryIO, buffer: Bytes) -> int:
    """Fill the buffer and return the bytes read, fewer than len(buffer) only at the end of the file."""
    done = 0
    view = memoryview(buffer.data)
    while done < len(view) and (count := _readinto(file, view[done:])):
        done += count
    return done


def _readinto(file: Any, view: memoryview) -> int:
    return int(file.readinto(view) or 0)
