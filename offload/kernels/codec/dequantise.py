"""The kernel that unpacks records into token-major float32 arrays.

Eight codes are one uint64. K codes lie channel-major and pass through an 8 x 8 byte transpose first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from spilld.offload.kernels.bits import (
    bf16_to_f32,
    device,
    part,
    transpose8,
)
from spilld.offload.kernels.threads import spreading
from spilld.offload.record import BLOCK

from .rotation import rotate

K_CODES, K_SCALES, V_CODES, V_SCALES = range(4)
"""Rows of `planes`."""

EXACT, INT8, K8V4, INT4 = range(4)
"""Indices of record.SEALED."""

NOTHING = np.float32(0)
"""The minimum of int8: code * scale + 0 is code * scale, as no product is -0 (a scale of 0 has codes 0)."""


@njit(nogil=True, error_model="numpy")
def _unit(
    unit: Any,
    memory: Any,
    places: Any,
    width: Any,
    k: Any,
    k_head: Any,
    k_token: Any,
    v: Any,
    v_head: Any,
    v_token: Any,
    planes: Any,
    form: Any,
    heads: Any,
    dim: Any,
    nbytes: Any,
) -> None:
    """Unpack one KV head of one block; see Codec.open.

    k, v: bytes, with strides in bytes; planes: int64 [4, (offset, size)].

    nbytes: of an element, which only `exact` records hold. The functions below take the float32 outputs
    as uint32, with strides in numbers.
    """
    block, head = unit // heads, unit % heads
    record = memory[places[block] : places[block] + width]
    keys, key_stride = k[head * k_head + block * BLOCK * k_token :].view(np.uint32), k_token // 4
    values, value_stride = v[head * v_head + block * BLOCK * v_token :].view(np.uint32), v_token // 4
    k_codes = part(record, planes, K_CODES, heads, head)
    v_codes = part(record, planes, V_CODES, heads, head)
    if form == EXACT and nbytes == 4:
        _widen_keys(k_codes.view(np.uint32), np.uint32(0), keys, key_stride, dim)
        _widen_values(v_codes.view(np.uint32), np.uint32(0), values, value_stride, dim)
    elif form == EXACT:
        _widen_keys(k_codes.view(np.uint16), np.uint32(16), keys, key_stride, dim)
        _widen_values(v_codes.view(np.uint16), np.uint32(16), values, value_stride, dim)
    else:
        k_scales = part(record, planes, K_SCALES, heads, head).view(np.uint16)
        v_scales = part(record, planes, V_SCALES, heads, head).view(np.uint16)
        if form == INT4:
            _open_keys4(k_codes, k_scales, keys, key_stride, dim)
        else:
            _open_keys(k_codes.view(np.uint64), k_scales, keys, key_stride, dim)
        if form == INT8:
            _open_values8(v_codes.view(np.uint64), v_scales, values, value_stride, dim)
        else:
            _open_values4(v_codes.view(np.uint64), v_scales, values, value_stride, dim)


_spread = spreading(lambda: _unit)


@njit(nogil=True, cache=True, error_model="numpy")
def open_records(units: Any, *args: Any) -> Any:
    """Unpack blocks * heads units and return how many got no memory. args: what follows the unit of _unit."""
    return _spread(units, *args)


@device
def _widen_keys(source: Any, shift: Any, target: Any, stride: Any, dim: Any) -> None:
    """Elements [dim, 64], shifted left -> 64 rows of dim numbers, stride numbers apart."""
    for first in range(0, dim, 16):
        for t in range(BLOCK):
            to, at = np.uint64(t * stride + first), np.uint64(first * BLOCK + t)
            for i in range(16):
                target[to + np.uint64(i)] = np.uint32(source[at + np.uint64(i * BLOCK)]) << shift


@device
def _widen_values(source: Any, shift: Any, target: Any, stride: Any, dim: Any) -> None:
    """Elements [64, dim], shifted left -> 64 rows of dim numbers, stride numbers apart."""
    for t in range(BLOCK):
        to, at = np.uint64(t * stride), np.uint64(t * dim)
        for i in range(dim):
            target[to + np.uint64(i)] = np.uint32(source[at + np.uint64(i)]) << shift


@device
def _open_keys(codes: Any, scales: Any, target: Any, stride: Any, dim: Any) -> None:
    tile = np.empty(8, np.uint64)
    for j in range(8):
        for w in range(dim // 8):
            transpose8(codes, np.uint64(64 * w + j), tile)
            for i in range(8):
                t = 8 * j + i
                _put(tile[i], bf16_to_f32(scales[t]), NOTHING, target, t * stride + 8 * w)


@device
def _open_keys4(codes: Any, scales: Any, target: Any, stride: Any, dim: Any) -> None:
    x = np.empty(dim * BLOCK, np.float32)
    read_keys4(codes, scales, x, dim)
    _widen_keys(x.view(np.uint32), np.uint32(0), target, stride, dim)


@device
def read_keys4(codes: Any, scales: Any, x: Any, dim: Any) -> None:
    """Unpack keys of four bits, with the rotation undone, into x, float32 [dim, 64]."""
    scale = np.empty(BLOCK, np.float32)
    minimum = np.empty(BLOCK, np.float32)
    for first in range(0, dim, 32):
        half = min(32, dim - first) // 2
        for t in range(BLOCK):
            scale[t] = bf16_to_f32(scales[first * 4 + 2 * t])
            minimum[t] = bf16_to_f32(scales[first * 4 + 2 * t + 1])
        for i in range(half):
            both = codes[(first // 2 + i) * BLOCK :]
            low, high = x[(first + i) * BLOCK :], x[(first + half + i) * BLOCK :]
            for t in range(BLOCK):
                at = np.uint64(t)
                low[at] = np.float32(np.uint8(both[at] & np.uint8(15))) * scale[at] + minimum[at]
                high[at] = np.float32(np.uint8(both[at] >> np.uint8(4))) * scale[at] + minimum[at]
    rotate(x, BLOCK)


@device
def _open_values8(codes: Any, scales: Any, target: Any, stride: Any, dim: Any) -> None:
    for t in range(BLOCK):
        scale = bf16_to_f32(scales[t])
        for w in range(dim // 8):
            _put(codes[t * dim // 8 + w], scale, NOTHING, target, t * stride + 8 * w)


@device
def _open_values4(codes: Any, scales: Any, target: Any, stride: Any, dim: Any) -> None:
    """A word holds 8 channels in its low nibbles and 8 others, half a group on, in its high ones."""
    groups = (dim + 31) // 32
    low_nibbles = np.uint64(0x0F0F0F0F0F0F0F0F)
    for t in range(BLOCK):
        for w in range(dim // 16):
            group = w // 2
            scale = bf16_to_f32(scales[(t * groups + group) * 2])
            minimum = bf16_to_f32(scales[(t * groups + group) * 2 + 1])
            word = codes[t * dim // 16 + w]
            at = t * stride + 32 * group + 8 * (w % 2)
            half = min(32, dim - 32 * group) // 2
            _put(word & low_nibbles, scale, minimum, target, at)
            _put((word >> np.uint64(4)) & low_nibbles, scale, minimum, target, at + half)


@intrinsic
def _put(_context: Any, _codes: Any, _scale: Any, _minimum: Any, target: Any, _at: Any) -> Any:
    """Store code * scale + minimum of 8 signed bytes at target[at:], each operation rounded."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes, scale, minimum, _, at = args
        numbers = builder.sitofp(
            builder.bitcast(codes, ir.VectorType(ir.IntType(8), 8)), ir.VectorType(ir.FloatType(), 8)
        )
        products = builder.fmul(numbers, _splat(builder, scale))
        values = builder.fadd(products, _splat(builder, minimum))
        data = context.make_array(signature.args[3])(context, builder, args[3]).data
        address = builder.bitcast(builder.gep(data, [at]), values.type.as_pointer())
        builder.store(values, address, align=4)
        return context.get_dummy_value()

    return types.void(types.uint64, types.float32, types.float32, target, types.int64), build


def _splat(builder: Any, scalar: Any) -> Any:
    vector = ir.VectorType(scalar.type, 8)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8))
