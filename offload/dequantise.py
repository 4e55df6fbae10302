"""The kernel that unpacks records into token-major arrays, eight numbers at a time.

Eight codes are one uint64. K codes lie channel-major and pass through an 8 x 8 byte transpose first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from .bits import BF16_NAN, bf16_to_f32, copy_rows, device, part, transpose8, words
from .record import BLOCK

K_CODES, K_SCALES, V_CODES, V_SCALES = range(4)
EXACT, INT8 = range(2)


@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def open_records(
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
    """See Codec.open. k, v: bytes, with strides in bytes; planes: int64 [8, (offset, size)]."""
    for index in prange(len(places) * heads):
        unit = np.int64(index)
        block, head = unit // heads, unit % heads
        record = memory[places[block] : places[block] + width]
        keys = k[head * k_head + block * BLOCK * k_token :]
        values = v[head * v_head + block * BLOCK * v_token :]
        k_codes = part(record, planes, K_CODES, heads, head)
        v_codes = part(record, planes, V_CODES, heads, head)
        if form == EXACT:
            if nbytes == 4:
                _copy_transposed(k_codes.view(np.uint32), words(keys), k_token // 4, dim)
            else:
                _copy_transposed(k_codes.view(np.uint16), keys.view(np.uint16), k_token // 2, dim)
            copy_rows(v_codes, dim * nbytes, values, v_token, dim * nbytes)
        else:
            k_scales = part(record, planes, K_SCALES, heads, head).view(np.uint16)
            v_scales = part(record, planes, V_SCALES, heads, head).view(np.uint16)
            _open_keys(k_codes.view(np.uint64), k_scales, keys, k_token, dim, nbytes)
            if form == INT8:
                _open_values8(v_codes.view(np.uint64), v_scales, values, v_token, dim, nbytes)
            else:
                _open_values4(v_codes.view(np.uint64), v_scales, values, v_token, dim, nbytes)


@device
def _copy_transposed(source: Any, target: Any, stride: Any, dim: Any) -> None:
    """Elements [dim, 64] -> 64 rows of dim elements, stride elements apart."""
    for first in range(0, dim, 16):
        for t in range(BLOCK):
            to, at = np.uint64(t * stride + first), np.uint64(first * BLOCK + t)
            for i in range(16):
                target[to + np.uint64(i)] = source[at + np.uint64(i * BLOCK)]


@device
def _open_keys(codes: Any, scales: Any, target: Any, stride: Any, dim: Any, nbytes: Any) -> None:
    tile = np.empty(8, np.uint64)
    for j in range(8):
        for w in range(dim // 8):
            transpose8(codes, np.uint64(64 * w + j), tile)
            for i in range(8):
                t = 8 * j + i
                _put8(tile[i], bf16_to_f32(scales[t]), target, t * stride + 8 * w * nbytes, nbytes)


@device
def _open_values8(codes: Any, scales: Any, target: Any, stride: Any, dim: Any, nbytes: Any) -> None:
    for t in range(BLOCK):
        scale = bf16_to_f32(scales[t])
        for w in range(dim // 8):
            _put8(codes[t * dim // 8 + w], scale, target, t * stride + 8 * w * nbytes, nbytes)


@device
def _open_values4(codes: Any, scales: Any, target: Any, stride: Any, dim: Any, nbytes: Any) -> None:
    """A word holds 8 channels in its low nibbles and 8 others, half a group on, in its high ones."""
    groups = (dim + 31) // 32
    low_nibbles = np.uint64(0x0F0F0F0F0F0F0F0F)
    for t in range(BLOCK):
        for w in range(dim // 16):
            group = w // 2
            scale = bf16_to_f32(scales[(t * groups + group) * 2])
            minimum = bf16_to_f32(scales[(t * groups + group) * 2 + 1])
            word = codes[t * dim // 16 + w]
            at = t * stride + (32 * group + 8 * (w % 2)) * nbytes
            half = min(32, dim - 32 * group) // 2 * nbytes
            _put(word & low_nibbles, scale, minimum, target, at, nbytes)
            _put((word >> np.uint64(4)) & low_nibbles, scale, minimum, target, at + half, nbytes)


@device
def _put8(codes: Any, scale: Any, target: Any, at: Any, nbytes: Any) -> None:
    """code * scale + 0 is code * scale: a product is -0 only for a code that is not 0 and a scale that is."""
    _put(codes, scale, np.float32(0), target, at, nbytes)


@device
def _put(codes: Any, scale: Any, minimum: Any, target: Any, at: Any, nbytes: Any) -> None:
    if nbytes == 4:
        _store_f32(codes, scale, minimum, target, at)
    else:
        _store_bf16(codes, scale, minimum, target, at)


def _values(builder: Any, codes: Any, scale: Any, minimum: Any) -> Any:
    """IR for the 8 floats code * scale + minimum, each operation rounded."""
    numbers = builder.sitofp(
        builder.bitcast(codes, ir.VectorType(ir.IntType(8), 8)), ir.VectorType(ir.FloatType(), 8)
    )
    return builder.fadd(builder.fmul(numbers, _splat(builder, scale)), _splat(builder, minimum))


def _splat(builder: Any, scalar: Any) -> Any:
    vector = ir.VectorType(scalar.type, 8)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8))


def _store(context: Any, builder: Any, signature: Any, args: Any, vector: Any) -> Any:
    data = context.make_array(signature.args[3])(context, builder, args[3]).data
    address = builder.bitcast(builder.gep(data, [args[4]]), vector.type.as_pointer())
    builder.store(vector, address, align=2)
    return context.get_dummy_value()


@intrinsic
def _store_f32(_context: Any, _codes: Any, _scale: Any, _minimum: Any, target: Any, _at: Any) -> Any:
    """Store code * scale + minimum of the 8 signed bytes of a uint64 as float32 at target[at:]."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _store(context, builder, signature, args, _values(builder, *args[:3]))

    return types.void(types.uint64, types.float32, types.float32, target, types.int64), build


@intrinsic
def _store_bf16(_context: Any, _codes: Any, _scale: Any, _minimum: Any, target: Any, _at: Any) -> Any:
    """The same rounded to nearest even bfloat16, NaN to the one NaN."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _values(builder, *args[:3])
        wide, narrow = ir.VectorType(ir.IntType(32), 8), ir.VectorType(ir.IntType(16), 8)
        bits = builder.bitcast(values, wide)
        high = builder.lshr(bits, ir.Constant(wide, [16] * 8))
        odd = builder.and_(high, ir.Constant(wide, [1] * 8))
        rounded = builder.add(builder.add(bits, ir.Constant(wide, [0x7FFF] * 8)), odd)
        result = builder.trunc(builder.lshr(rounded, ir.Constant(wide, [16] * 8)), narrow)
        nan = builder.fcmp_unordered("uno", values, values)
        result = builder.select(nan, ir.Constant(narrow, [BF16_NAN] * 8), result)
        return _store(context, builder, signature, args, result)

    return types.void(types.uint64, types.float32, types.float32, target, types.int64), build
