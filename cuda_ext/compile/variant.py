"""Kernels, and the constants that each is compiled with.

A record's layout is a mapping of names to integers: HEAD_DIM, KV_HEADS, K_BITS and V_BITS (32 and 16:
float32 and bfloat16; 8 and 4: codes), ELEMENT_BYTES (of the compute dtype), FLOAT16 (1 where its 16 bits are
float16; it may be left out), and the byte offsets K_CODES, K_SCALES, V_CODES and V_SCALES.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).parents[1] / "kernels"

BLOCK = 64
ROWS = 16
"""Query rows of a warp in attention."""
SCALAR_BITS = 32
"""Numbers of this size are multiplied one by one, not by tensor cores."""

SHARED_WITHOUT_ASKING = 48 << 10
"""Dynamic shared memory that a block may have; for more, a kernel's attribute must be raised first."""
MOST_SHARED = 99 << 10
"""The most that all architectures which are compiled for allow (sm_86, sm_89 and sm_120 allow least)."""


@dataclass(frozen=True)
class Variant:
    """One kernel with its constants: what is compiled, and what each launch of it needs."""

    name: str
    """Name of the kernel, and of its file."""
    defines: tuple[tuple[str, int], ...]
    threads: int = 32
    shared_bytes: int = 0

    @property
    def source(self) -> Path:
        """The kernel's source file."""
        return KERNELS / f"{self.name}.cu"


PLANES = ("HEAD_DIM", "KV_HEADS", "K_BITS", "V_BITS", "K_CODES", "K_SCALES", "V_CODES", "V_SCALES")
"""Constants that describe the planes of a record."""


def attend_records(layout: Mapping[str, int]) -> Variant:
    """Attention of queries over records in the layout."""
    defines = {name: layout[name] for name in PLANES}
    if layout["K_BITS"] == 16:
        defines["FLOAT16"] = layout.get("FLOAT16", 0)
    return _attention("attend_records", defines, keys_by_token=False)


def attend_window(bits: int, head_dim: int, *, float16: bool = False) -> Variant:
    """Attention of queries over a KV window.

    Args:
        bits: Bits of the window's numbers, 32 or 16.
        head_dim: Numbers of a head.
        float16: Whether 16 bits are float16, not bfloat16.
    """
    defines = {"HEAD_DIM": head_dim, "K_BITS": bits, "V_BITS": bits, "FLOAT16": int(float16)}
    return _attention("attend_window", defines, keys_by_token=True)


def merge(head_dim: int, kv_heads: int) -> Variant:
    """The merge of partial attentions by log-sum-exp."""
    return _variant("merge", {"HEAD_DIM": head_dim, "KV_HEADS": kv_heads})


def rotate(head_dim: int) -> Variant:
    """The rotation of queries for records with rotated keys."""
    return _variant("rotate", {"HEAD_DIM": head_dim}, shared_bytes=4 * head_dim)


def seal(layout: Mapping[str, int]) -> Variant:
    """Packing of a window's blocks into records."""
    shared = 4 * BLOCK * (layout["HEAD_DIM"] + 1) if layout["K_BITS"] <= 8 else 0
    defines = _numbers(layout) | {"SHARED_BYTES": shared}
    return _variant("seal", defines, threads=BLOCK, shared_bytes=shared)


def dequantise(layout: Mapping[str, int]) -> Variant:
    """Unpacking of records into keys and values of the compute dtype."""
    return _variant("dequantise", _numbers(layout), threads=128)


def _variant(name: str, defines: Mapping[str, int], *, threads: int = 32, shared_bytes: int = 0) -> Variant:
    return Variant(name, tuple(sorted(defines.items())), threads, shared_bytes)


def _attention(name: str, defines: Mapping[str, int], *, keys_by_token: bool) -> Variant:
    """Choose how many planes are loaded ahead: as many as fit beside queries and logits."""
    fixed = _query_bytes(defines) + 4 * ROWS * (BLOCK + 8)
    plane = max(_shared_plane(defines, "K_BITS", keys_by_token), _shared_plane(defines, "V_BITS", True))
    fits = [n for n in (4, 3, 2) if fixed + n * plane <= SHARED_WITHOUT_ASKING]
    stages = max(fits, default=2 if fixed + 2 * plane <= MOST_SHARED else 1)
    shared = fixed + stages * plane
    return _variant(name, {**defines, "STAGES": stages, "SHARED_BYTES": shared}, shared_bytes=shared)


def _query_bytes(defines: Mapping[str, int]) -> int:
    dim = defines["HEAD_DIM"]
    if defines["K_BITS"] == SCALAR_BITS:
        return 4 * ROWS * dim
    sums = 4 * ROWS * -(-dim // 32) if defines["K_BITS"] == 4 else 0
    return 2 * 2 * ROWS * (dim + 8) + sums


def _shared_plane(defines: Mapping[str, int], side: str, by_token: bool) -> int:
    """Bytes of a plane in shared memory. Rows of whole vectors are padded by 16 bytes (tile.cuh)."""
    dim, bits = defines["HEAD_DIM"], defines[side]
    if by_token:
        rows, row = BLOCK, dim * bits // 8
    else:
        rows, row = (dim // 2, BLOCK) if bits == 4 else (dim, BLOCK * bits // 8)
    stride = row + 16 if row % 16 == 0 else row
    return rows * stride + _scale_bytes(bits, -(-dim // 32))


def _numbers(layout: Mapping[str, int]) -> dict[str, int]:
    """Constants of kernels that read or write numbers of the compute dtype."""
    more = {"ELEMENT_BYTES": layout["ELEMENT_BYTES"], "FLOAT16": layout.get("FLOAT16", 0)}
    return {name: layout[name] for name in PLANES} | more


def _scale_bytes(bits: int, groups: int) -> int:
    return {8: 2 * BLOCK, 4: 4 * BLOCK * groups}.get(bits, 0)
