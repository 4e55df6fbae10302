"""Bits and bytes in numba kernels: float32 <-> bfloat16, planes, byte tiles.

A bfloat16 is the uint16 of its bits; numpy has none. A NaN becomes the one quiet NaN 0x7FC0, whatever
its sign and payload: CPUs and GPUs differ in what they make of `inf - inf`, and the stored bytes must not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from spilld.offload.record import BLOCK

from . import kernel_cache  # noqa: F401

BF16_NAN = 0x7FC0

device = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""A function that only kernels call. No fastmath: IEEE operations as written, no FMA, no reassociation."""

inlined = njit(
    nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True
)
"""The same, inlined by LLVM; inline.py says why not by numba."""


@intrinsic
def f32_bits(_context: Any, _x: Any) -> Any:
    """Return the bits of a float32 as uint32."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), build


@intrinsic
def bits_f32(_context: Any, _bits: Any) -> Any:
    """Return the float32 with these uint32 bits."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), build


@device
def bf16_to_f32(bits: Any) -> Any:
    """Widen a bfloat16 to float32, exactly."""
    return bits_f32(np.uint32(bits) << np.uint32(16))


@device
def f32_to_bf16_nearest(x: Any) -> Any:
    """Round to the nearest bfloat16, ties to even; beyond the largest finite one to infinity."""
    bits = f32_bits(x)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    return rounded if x == x else np.uint16(BF16_NAN)


@device
def f32_to_bf16_up(x: Any) -> Any:
    """Return the smallest bfloat16 >= x, possibly +inf."""
    bits = f32_bits(x)
    away = np.uint32(0) if bits >> np.uint32(31) else np.uint32(0xFFFF)
    rounded = np.uint16((bits + away) >> np.uint32(16))
    return rounded if x == x else np.uint16(BF16_NAN)


@device
def f32_to_bf16_down(x: Any) -> Any:
    """Return the largest bfloat16 <= x, possibly -inf."""
    bits = f32_bits(x)
    away = np.uint32(0xFFFF) if bits >> np.uint32(31) else np.uint32(0)
    rounded = np.uint16((bits + away) >> np.uint32(16))
    return rounded if x == x else np.uint16(BF16_NAN)


@device
def part(record: Any, planes: Any, plane: Any, parts: Any, index: Any) -> Any:
    """Return one of the equal parts of a plane, as bytes; planes is int64 [planes, (offset, size)]."""
    size = planes[plane, 1] // parts
    start = planes[plane, 0] + index * size
    return record[start : start + size]


@device
def words(source: Any) -> Any:
    """Return the whole uint32 words of an array of bytes."""
    return source[: len(source) // 4 * 4].view(np.uint32)


@device
def copy_rows(source: Any, source_stride: Any, target: Any, target_stride: Any, size: Any) -> None:
    """Copy the 64 rows of size bytes of a block; strides in bytes."""
    for t in range(BLOCK):
        at, to = np.uint64(t * source_stride), np.uint64(t * target_stride)
        for i in range(size):
            target[to + np.uint64(i)] = source[at + np.uint64(i)]


@device
def transpose8(source: Any, at: Any, tile: Any) -> None:
    """Transpose 8 x 8 bytes, whose rows are the uint64 source[at], source[at + 8], ..., into tile[0..7].

    Exchanges the off-diagonal squares of 1, 2 and 4 bytes (Warren, Hacker's Delight, section 7-3).
    """
    near = np.uint64(0x00FF00FF00FF00FF)
    middle = np.uint64(0x0000FFFF0000FFFF)
    far = np.uint64(0x00000000FFFFFFFF)
    a0, a1 = _exchange(source[at], source[at + np.uint64(8)], np.uint64(8), near)
    a2, a3 = _exchange(source[at + np.uint64(16)], source[at + np.uint64(24)], np.uint64(8), near)
    a4, a5 = _exchange(source[at + np.uint64(32)], source[at + np.uint64(40)], np.uint64(8), near)
    a6, a7 = _exchange(source[at + np.uint64(48)], source[at + np.uint64(56)], np.uint64(8), near)
    a0, a2 = _exchange(a0, a2, np.uint64(16), middle)
    a1, a3 = _exchange(a1, a3, np.uint64(16), middle)
    a4, a6 = _exchange(a4, a6, np.uint64(16), middle)
    a5, a7 = _exchange(a5, a7, np.uint64(16), middle)
    tile[0], tile[4] = _exchange(a0, a4, np.uint64(32), far)
    tile[1], tile[5] = _exchange(a1, a5, np.uint64(32), far)
    tile[2], tile[6] = _exchange(a2, a6, np.uint64(32), far)
    tile[3], tile[7] = _exchange(a3, a7, np.uint64(32), far)


@device
def _exchange(a: Any, b: Any, shift: Any, mask: Any) -> Any:
    t = ((a >> shift) ^ b) & mask
    return a ^ (t << shift), b ^ t
