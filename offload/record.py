"""The record: one block of 64 tokens of one layer, packed into bytes.

The same bytes lie in host memory, in disk extents and on PCIe. Records are also the unit of
accounting: a tier that holds n records of a layout uses n * layout.record_bytes.
FORMAT.md has the byte tables.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # config.py imports the names of formats, and clients load no numpy
    import numpy as np
    import numpy.typing as npt

BLOCK = 64
"""Tokens in a block."""

V4_GROUP = 32
"""Channels that share the scale and minimum of their four bits; a head_dim of 80 ends in a group of 16."""

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256, 512)


class Format(enum.StrEnum):
    """How a record stores its numbers."""

    EXACT = "exact"
    INT8 = "int8"
    K8V4 = "k8v4"
    INT4 = "int4"
    RAW = "raw"
    """Numbers that are not sealed: what a window holds. No queries run over it."""


SEALED = (Format.EXACT, Format.INT8, Format.K8V4, Format.INT4)
"""Formats that attention reads. Kernels know each by its index here."""


class Element(enum.StrEnum):
    """The compute dtype that `exact` records repeat bit for bit."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def nbytes(self) -> int:
        """Bytes of a number."""
        return 4 if self is Element.FLOAT32 else 2


@dataclass(frozen=True)
class Layout:
    """Where each plane of a record lies. All offsets and sizes are in bytes.

    Planes follow one another in this order without padding; the size of each is a multiple of 64:

    k_codes    [kv_heads, head_dim, 64]   channel-major: the 64 tokens of a channel are adjacent; int4 packs
                                          two codes a byte
    k_scales   int8 and k8v4: [kv_heads, 64] bf16; int4: [kv_heads, groups, 64, 2] bf16 (scale, minimum)
    v_codes    [kv_heads, 64, head_dim]   token-major; k8v4 and int4 pack two codes a byte
    v_scales   int8: [kv_heads, 64] bf16; k8v4 and int4: [kv_heads, 64, groups, 2] bf16 (scale, minimum)

    `raw` has one plane: numbers [64, 2, kv_heads, head_dim], token by token K and V in the compute dtype.
    """

    format: Format
    element: Element
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim {self.head_dim} is not supported; one of {HEAD_DIMS} is")
        if self.kv_heads < 1:
            raise ValueError(f"kv_heads must be at least 1, got {self.kv_heads}")

    @property
    def raw(self) -> Layout:
        """The layout of checkpoints beside records of this layout."""
        return Layout(Format.RAW, self.element, self.kv_heads, self.head_dim)

    @property
    def groups(self) -> int:
        """Groups of channels in one key or value of four bits."""
        return -(-self.head_dim // V4_GROUP)

    @cached_property
    def _planes(self) -> dict[str, tuple[int, int]]:
        numbers = self.kv_heads * self.head_dim * BLOCK
        per_token = 2 * self.kv_heads * BLOCK
        if self.format is Format.RAW:
            size = 2 * numbers * self.element.nbytes
            return {"numbers": (0, size), "end": (size, 0)}
        exact = numbers * self.element.nbytes, 0
        int8 = numbers, per_token
        int4 = numbers // 2, per_token * self.groups * 2
        k, v = {
            Format.EXACT: (exact, exact),
            Format.INT8: (int8, int8),
            Format.K8V4: (int8, int4),
            Format.INT4: (int4, int4),
        }[self.format]
        sizes = {"k_codes": k[0], "k_scales": k[1], "v_codes": v[0], "v_scales": v[1], "end": 0}
        begins = accumulate(sizes.values(), initial=0)
        return {name: (begin, size) for (name, size), begin in zip(sizes.items(), begins, strict=False)}

    def plane(self, name: str) -> tuple[int, int]:
        """Return (offset, size) of a plane, each a multiple of 64."""
        return self._planes[name]

    def offset(self, name: str) -> int:
        """Return the offset of a plane."""
        return self._planes[name][0]

    @property
    def record_bytes(self) -> int:
        """Size of one record: a multiple of 64."""
        return self.offset("end")

    @property
    def constants(self) -> dict[str, int]:
        """What CUDA kernels are compiled with; for sealed formats only.

        These are the bits of a key's and of a value's number, sizes, and where planes begin.
        """
        exact = 8 * self.element.nbytes
        codes = {Format.INT8: (8, 8), Format.K8V4: (8, 4), Format.INT4: (4, 4)}
        k, v = codes.get(self.format, (exact, exact))
        sizes = {"HEAD_DIM": self.head_dim, "KV_HEADS": self.kv_heads, "K_BITS": k, "V_BITS": v}
        sizes["ELEMENT_BYTES"] = self.element.nbytes
        return sizes | {name.upper(): offset for name, (offset, _) in self._planes.items() if name != "end"}


def check_places(memory: npt.NDArray[np.uint8], places: npt.NDArray[np.int64], layout: Layout) -> None:
    """Check that records lie within the memory, for kernels, which check no bounds.

    Args:
        memory: `[bytes] uint8`.
        places: `[n] int64`, byte offsets of records of this layout.
        layout: Of the records.

    Raises:
        ValueError: A record would not lie in the memory, or not at a multiple of 64.
    """
    if memory.ndim != 1 or memory.dtype != "uint8" or not memory.flags.c_contiguous:
        raise ValueError("memory must be a contiguous uint8 vector")
    if places.dtype != "int64" or places.ndim != 1 or not places.flags.c_contiguous:
        raise ValueError("places must be a contiguous int64 vector")
    if places.size and not 0 <= places.min() <= places.max() <= len(memory) - layout.record_bytes:
        raise ValueError(f"places {places.min()}..{places.max()} are not all in {len(memory)} bytes")
    if places.size and (places & 63).any():
        raise ValueError("places must be multiples of 64")


def round_up(n: int, unit: int) -> int:
    """Return the smallest multiple of unit that is at least n."""
    return -(-n // unit) * unit
