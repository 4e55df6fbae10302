"""The extent: records of one layer as they lie in a segment file. FORMAT.md has the byte table."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import xxhash

from spilld.offload.errors import ExtentCorrupt
from spilld.offload.record import (
    BLOCK,
    Element,
    Format,
    Layout,
    round_up,
)
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import PAGE, Bytes

from .segment import Range

MAGIC = b"SPILLDKV"
VERSION = 2
HEADER_BYTES = 256
CHECKED_FROM = 16
"""The checksum covers the bytes from here to the end of the payload."""

RunKey = bytes
"""Identity of a run: 16 bytes, never used twice (`uuid.uuid4().bytes`)."""

_FORMAT_CODES = {Format.EXACT: 0, Format.INT8: 1, Format.K8V4: 2, Format.RAW: 3, Format.INT4: 4}
_ELEMENT_CODES = {Element.FLOAT32: 0, Element.BFLOAT16: 1}

_FIELDS = (
    ("magic", "8s"),
    ("checksum", "Q"),
    ("version", "I"),
    ("header length", "I"),
    ("format", "B"),
    ("element", "B"),
    ("tokens per block", "H"),
    ("kv_heads", "I"),
    ("head_dim", "I"),
    ("record bytes", "I"),
    ("layers", "I"),
    ("layer", "I"),
    ("first block", "Q"),
    ("count", "Q"),
    ("payload bytes", "Q"),
    ("extent bytes", "Q"),
    ("fingerprint", "32s"),
    ("chain hash", "32s"),
    ("run", "16s"),
    ("reserved", "96s"),
)
_HEADER = struct.Struct("<" + "".join(code for _, code in _FIELDS))
assert _HEADER.size == HEADER_BYTES

HEADER_FIELDS: dict[str, tuple[int, int]] = {}
"""(offset, size) of every field of the header, in bytes."""
_at = 0
for _name, _code in _FIELDS:
    _size = struct.calcsize("<" + _code)
    HEADER_FIELDS[_name] = (_at, _size)
    _at += _size


@dataclass(frozen=True)
class ExtentIdentity:
    """What the header of an extent must contain for the extent to be served.

    fingerprint and chain_hash are 32 bytes, run 16. first counts blocks of the sequence; chain_hash is
    that of the run's last block. All extents of a run share everything but the layer and its layout.
    """

    layouts: StoreLayout
    fingerprint: bytes
    run: RunKey
    chain_hash: bytes
    first: int
    count: int

    def __post_init__(self) -> None:
        if (len(self.fingerprint), len(self.chain_hash), len(self.run)) != (32, 32, 16):
            raise ValueError("fingerprint and chain hash have 32 bytes, a run key has 16")
        if self.count < 1 or self.first < 0:
            raise ValueError(f"a run of {self.count} blocks from block {self.first} does not exist")

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.layouts)

    def payload_bytes(self, layer: int) -> int:
        """Return the bytes of a layer's records."""
        return self.count * self.layouts[layer].record_bytes

    def extent_bytes(self, layer: int) -> int:
        """Return the bytes of a layer's extent: a multiple of 4096."""
        return extent_bytes(self.layouts[layer], self.count)

    def offset(self, layer: int) -> int:
        """Return the bytes of the extents before a layer's."""
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer {layer} of {self.layers}")
        before = 0
        for layers, layout in self.layouts.groups:
            before += min(layers, layer) * extent_bytes(layout, self.count)
            layer -= min(layers, layer)
        return before

    @property
    def run_bytes(self) -> int:
        """Bytes of all extents."""
        return run_bytes(self.layouts, self.count)

    @property
    def largest_extent(self) -> int:
        """Bytes of the largest extent: what a buffer must hold."""
        return largest_extent(self.layouts, self.count)


@dataclass(frozen=True)
class RunPlace:
    """Where a run lies and what its extents must contain: all that an I/O thread needs to read or write it.

    Extents are adjacent, layer 0 first. fresh: the name of the segment file may not be durable yet.
    """

    identity: ExtentIdentity
    range: Range
    file: int
    fresh: bool

    @property
    def run(self) -> RunKey:
        """The run's key."""
        return self.identity.run

    def offset(self, layer: int) -> int:
        """Return where a layer's extent begins in the segment file, in bytes."""
        return self.range.offset + self.identity.offset(layer)


@dataclass(frozen=True)
class RunMove:
    """A run that is being copied from one place to another."""

    source: RunPlace
    target: RunPlace

    @property
    def run(self) -> RunKey:
        """The run's key."""
        return self.source.run

    @property
    def nbytes(self) -> int:
        """Bytes that are copied."""
        return self.target.range.nbytes


def extent_bytes(layout: Layout, count: int) -> int:
    """Return the bytes on disk of one layer of a run of count blocks: a multiple of 4096."""
    return round_up(HEADER_BYTES + count * layout.record_bytes, PAGE)


def run_bytes(layouts: StoreLayout, count: int) -> int:
    """Return the bytes on disk of a run of count blocks, all layers."""
    return sum(layers * extent_bytes(layout, count) for layers, layout in layouts.groups)


def largest_extent(layouts: StoreLayout, count: int) -> int:
    """Return the bytes of the largest extent of a run of count blocks."""
    return max(extent_bytes(layout, count) for _, layout in layouts.groups)


def payload(buffer: Bytes, identity: ExtentIdentity, layer: int) -> Bytes:
    """Return a view of an extent's records in a buffer, uint8 [count, record_bytes], 64-byte aligned."""
    records = buffer[HEADER_BYTES : HEADER_BYTES + identity.payload_bytes(layer)]
    return records.reshape(identity.count, identity.layouts[layer].record_bytes)


def seal(buffer: Bytes, identity: ExtentIdentity, layer: int) -> int:
    """Write header, checksum and padding around the payload in the buffer and return the checksum."""
    end = HEADER_BYTES + identity.payload_bytes(layer)
    buffer[:HEADER_BYTES] = np.frombuffer(_header(identity, layer, 0), dtype=np.uint8)
    buffer[end : identity.extent_bytes(layer)] = 0
    checksum = xxhash.xxh3_64_intdigest(buffer[CHECKED_FROM:end].data)
    offset, size = HEADER_FIELDS["checksum"]
    buffer[offset : offset + size] = np.frombuffer(checksum.to_bytes(size, "little"), dtype=np.uint8)
    return checksum


def verify(buffer: Bytes, identity: ExtentIdentity, layer: int) -> Bytes:
    """Check an extent in a buffer and return its records, as payload does.

    Raises:
        ExtentCorrupt: It is not the one asked for; the message names the first field of the header that
            differs, or the checksum.
    """
    found = buffer[:HEADER_BYTES].tobytes()
    offset, size = HEADER_FIELDS["checksum"]
    stored = int.from_bytes(found[offset : offset + size], "little")
    wanted = _header(identity, layer, stored)
    if found != wanted:
        field = next(name for name, (a, n) in HEADER_FIELDS.items() if found[a : a + n] != wanted[a : a + n])
        raise ExtentCorrupt(f"layer {layer} of run {identity.run.hex()}: foreign or damaged {field}")
    end = HEADER_BYTES + identity.payload_bytes(layer)
    if xxhash.xxh3_64_intdigest(buffer[CHECKED_FROM:end].data) != stored:
        raise ExtentCorrupt(f"layer {layer} of run {identity.run.hex()}: wrong checksum")
    return payload(buffer, identity, layer)


def _header(identity: ExtentIdentity, layer: int, checksum: int) -> bytes:
    layout = identity.layouts[layer]
    return _HEADER.pack(
        MAGIC,
        checksum,
        VERSION,
        HEADER_BYTES,
        _FORMAT_CODES[layout.format],
        _ELEMENT_CODES[layout.element],
        BLOCK,
        layout.kv_heads,
        layout.head_dim,
        layout.record_bytes,
        identity.layers,
        layer,
        identity.first,
        identity.count,
        identity.payload_bytes(layer),
        identity.extent_bytes(layer),
        identity.fingerprint,
        identity.chain_hash,
        identity.run,
        bytes(96),
    )
