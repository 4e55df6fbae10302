"""The kernel that packs blocks into records.

A head's 64 tokens are the SIMD lanes: the numbers are held channel-major, and codes that the record wants
token-major are transposed as bytes. FORMAT.md states the arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from spilld.offload.kernels.bits import (
    bf16_to_f32,
    bits_f32,
    copy_rows,
    device,
    f32_bits,
    f32_to_bf16_down,
    f32_to_bf16_up,
    part,
    transpose8,
    words,
)
from spilld.offload.kernels.inline import inline
from spilld.offload.kernels.threads import spreading
from spilld.offload.record import BLOCK

from .dequantise import (
    EXACT,
    INT4,
    INT8,
    K_CODES,
    K_SCALES,
    V_CODES,
    V_SCALES,
)
from .rotation import rotate

KEY, VALUE = range(2)

NAN = np.uint16(0x7FC0)
INF_BITS = np.uint32(0x7F800000)
MAGNITUDE = np.uint32(0x7FFFFFFF)
LEAST, MOST = np.int32(-(2**31)), np.int32(2**31 - 1)


@njit(nogil=True, error_model="numpy")
def _unit(
    unit: Any,
    k: Any,
    k_head: Any,
    k_token: Any,
    v: Any,
    v_head: Any,
    v_token: Any,
    records: Any,
    rows: Any,
    planes: Any,
    form: Any,
    heads: Any,
    dim: Any,
    nbytes: Any,
) -> None:
    """Pack K or V of one head of one block; see Codec.seal.

    k, v: bytes, with strides in bytes; planes: int64 [4, (offset, size)].
    """
    block, head, side = unit // (2 * heads), unit // 2 % heads, unit % 2
    record = records[rows[block]]
    if side == KEY:
        source, stride = k[head * k_head + block * BLOCK * k_token :], k_token
    else:
        source, stride = v[head * v_head + block * BLOCK * v_token :], v_token
    _seal_side(source, stride, record, planes, form, heads, head, side, dim, nbytes)


_spread = spreading(lambda: _unit)


@njit(nogil=True, cache=True, error_model="numpy")
def seal(units: Any, *args: Any) -> Any:
    """Pack 2 * blocks * heads units and return how many got no memory.

    args: what follows the unit of _unit.
    """
    return _spread(units, *args)


@inline
@device
def _seal_side(
    source: Any,
    stride: Any,
    record: Any,
    planes: Any,
    form: Any,
    heads: Any,
    head: Any,
    side: Any,
    dim: Any,
    nbytes: Any,
) -> None:
    """Pack K or V of one head of one block."""
    target = part(record, planes, V_CODES if side == VALUE else K_CODES, heads, head)
    if form == EXACT and side == VALUE:
        copy_rows(source, stride, target, dim * nbytes, dim * nbytes)
        return
    x = np.empty(dim * BLOCK, np.float32)
    _load(source, stride, x, dim, nbytes)
    if form == EXACT:
        _store_bits(x, target, nbytes)
        return
    scales = part(record, planes, V_SCALES if side == VALUE else K_SCALES, heads, head).view(np.uint16)
    codes = target if side == KEY else np.empty(dim * BLOCK, np.uint8)
    if form == INT4 and side == KEY:
        rotate(x, BLOCK)
        _quantise4(x, codes, scales, dim, np.int64(1), np.int64(BLOCK))
    elif form != INT8 and side == VALUE:
        _quantise4(x, codes, scales, dim, (dim + 31) // 32, np.int64(1))
    else:
        _quantise8(x, codes, scales, dim)
    if side == VALUE:
        _store_transposed(codes, target)


@inline
@device
def _load(source: Any, stride: Any, x: Any, dim: Any, nbytes: Any) -> None:
    """Load 64 tokens of a head, stride bytes apart, as float32, channel-major."""
    wide, narrow = words(source), source.view(np.uint16)
    for first in range(0, dim, 16):
        for t in range(BLOCK):
            at, to = np.uint64(t * stride // nbytes + first), np.uint64(first * BLOCK + t)
            for i in range(16):
                if nbytes == 4:
                    bits = wide[at + np.uint64(i)]
                else:
                    bits = np.uint32(narrow[at + np.uint64(i)]) << np.uint32(16)
                x[to + np.uint64(i * BLOCK)] = bits_f32(np.uint32(bits))


@inline
@device
def _store_bits(x: Any, target: Any, nbytes: Any) -> None:
    """Store the elements that x was loaded from, channel-major; a widened bfloat16 is the upper half."""
    if nbytes == 4:
        wide = target.view(np.uint32)
        for i in range(len(x)):
            wide[i] = f32_bits(x[i])
    else:
        narrow = target.view(np.uint16)
        for i in range(len(x)):
            narrow[i] = np.uint16(f32_bits(x[i]) >> np.uint32(16))


@inline
@device
def _store_transposed(codes: Any, target: Any) -> None:
    """Transpose bytes [rows, 64] to [64, rows], rows a multiple of 8; only as many rows as target holds."""
    source, out = codes.view(np.uint64), target.view(np.uint64)
    per_token = len(out) // BLOCK
    tile = np.empty(8, np.uint64)
    for j in range(8):
        for w in range(per_token):
            transpose8(source, np.uint64(64 * w + j), tile)
            for i in range(8):
                out[np.uint64((8 * j + i) * per_token + w)] = tile[i]


@device
def _order(x: Any) -> Any:
    """Return the bits of a float32 as an int32 that sorts the same, -0 before +0."""
    bits = np.int32(f32_bits(x))
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(MAGNITUDE)))


@device
def _from_order(order: Any) -> Any:
    return bits_f32(np.uint32(order ^ ((order >> np.int32(31)) & np.int32(MAGNITUDE))))


@device
def _minimum_of(least: Any, most: Any) -> Any:
    """Return the bfloat16 bits of an ordered minimum, rounded down.

    NaN if one of the numbers was NaN, which shows in least or most.
    """
    if least < -np.int64(INF_BITS) - 1 or most > np.int64(INF_BITS):
        return NAN
    return f32_to_bf16_down(_from_order(least))


@device
def _scale_of(x: Any) -> Any:
    """Round a float32 up to bfloat16 bits; NaN if the result is not finite."""
    bits = f32_to_bf16_up(x)
    return bits if bits < np.uint16(0x7F80) else NAN


@device
def _code(x: Any, step: Any, low: Any, high: Any) -> Any:
    """Return rint(x / step) clipped to low..high, as float32; 0 where step is 0 or NaN."""
    usable = step > np.float32(0)
    q = np.rint(x / (step if usable else np.float32(1)))
    return min(max(q, np.float32(low)), np.float32(high)) if usable else np.float32(0)


@inline
@device
def _quantise8(x: Any, codes: Any, scales: Any, dim: Any) -> None:
    """Compute codes[d * 64 + t] and scales[t] of a head."""
    most = np.zeros(BLOCK, np.uint32)
    for d in range(dim):
        for t in range(BLOCK):
            most[t] = max(most[t], f32_bits(x[d * BLOCK + t]) & MAGNITUDE)
    scale = np.empty(BLOCK, np.float32)
    for t in range(BLOCK):
        scales[t] = _scale_of(bits_f32(most[t]) / np.float32(127))
        scale[t] = bf16_to_f32(scales[t])
    for d in range(dim):
        for t in range(BLOCK):
            codes[d * BLOCK + t] = np.uint8(np.int8(_code(x[d * BLOCK + t], scale[t], -127, 127)))


@device
def _quantise4(x: Any, codes: Any, scales: Any, dim: Any, per_token: Any, per_group: Any) -> None:
    """Compute packed codes and the steps and minimums of their groups.

    codes[i * 64 + t] and scales[(t * per_token + g * per_group) * 2 + (0 step, 1 minimum)].
    """
    step = np.empty(BLOCK, np.float32)
    minimum = np.empty(BLOCK, np.float32)
    for first in range(0, dim, 32):
        half = min(32, dim - first) // 2
        part = x[first * BLOCK : (first + 2 * half) * BLOCK]
        _int4_scales(part, step, minimum, scales[first // 32 * per_group * 2 :], per_token)
        for i in range(half):
            low, high = part[i * BLOCK :], part[(i + half) * BLOCK :]
            target = codes[(first // 2 + i) * BLOCK :]
            for t in range(BLOCK):
                at = np.uint64(t)
                lower = np.int32(_code(low[at] - minimum[at], step[at], 0, 15))
                upper = np.int32(_code(high[at] - minimum[at], step[at], 0, 15))
                target[at] = np.uint8(lower | (upper << np.int32(4)))


@device
def _int4_scales(x: Any, step: Any, minimum: Any, scales: Any, per_token: Any) -> None:
    """Compute the step and minimum of each token over the channels of one group, whose scales begin there."""
    least = np.full(BLOCK, MOST)
    most = np.full(BLOCK, LEAST)
    for d in range(len(x) // BLOCK):
        for t in range(BLOCK):
            order = _order(x[d * BLOCK + t])
            least[t] = min(least[t], order)
            most[t] = max(most[t], order)
    for t in range(BLOCK):
        low = _minimum_of(least[t], most[t])
        minimum[t] = bf16_to_f32(low)
        high = _scale_of((_from_order(most[t]) - minimum[t]) / np.float32(15))
        step[t] = bf16_to_f32(high)
        scales[t * per_token * 2] = high
        scales[t * per_token * 2 + 1] = low
