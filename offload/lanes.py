"""The inner loops of partial.py, written as LLVM vectors.

numba compiles plain loops for these too, but then LLVM's loop vectoriser reloads the sums at every token:
over int4 values it reached a quarter of this speed, and its choices vary with the number of rows. Here the
sums of a tile stay in registers. `head_dim` and `tile` (rows of queries) are literals: each pair is its own
code.

Arrays are C-contiguous; nothing is checked. "codes" is a record as int8, as float32, or as bf16 bits in
uint16; starts are indices into it. numba's on-disk cache does not notice edits of this file or of vectors.py:
clear __pycache__ after one.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .record import BLOCK, V4_GROUP
from .vectors import (
    F32,
    I32,
    Sums,
    address,
    broadcast,
    call,
    constant,
    each,
    exp,
    floats,
    load,
    multiply_add,
    pointers,
    splat,
    vector_address,
)

LANES = 16


@intrinsic(prefer_literal=True)
def dot_tile(_context: Any, codes: Any, start: Any, q: Any, out: Any, head_dim: Any, tile: Any) -> Any:
    """out[r, t] = sum over d of q[r, d] * codes[start + 64 * d + t].

    q: float32 [tile, head_dim]; out: float32 [tile, 64].
    """
    dim, rows = head_dim.literal_value, tile.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointers(context, builder, signature, args)
        # Four vectors of sums hide the latency of an addition; a tall tile has enough by its rows.
        width = LANES * {1: 4, 2: 2}.get(rows, 1)
        for first in range(0, BLOCK, width):
            sums = Sums(builder, [[None]] * rows, width)
            with each(builder, 0, dim) as d:
                keys = floats(builder, load(builder, at[0], [args[1], (d, BLOCK), first], width))
                for row in range(rows):
                    sums.add(row, 0, splat(builder, at[2], [d, row * dim], width), keys)
            sums.store([[address(builder, at[3], [row * BLOCK + first])] for row in range(rows)])
        return context.get_dummy_value()

    return types.void(codes, start, q, out, head_dim, tile), build


@intrinsic(prefer_literal=True)
def dot_rows(
    _context: Any, keys: Any, start: Any, last: Any, q: Any, out: Any, head_dim: Any, tile: Any
) -> Any:
    """dot_tile over keys that lie token by token, for t < last.

    out[r, t] = sum over d of q[r, d] * keys[start + head_dim * t + d].
    """
    dim, rows = head_dim.literal_value, tile.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointers(context, builder, signature, args)
        with each(builder, 0, args[2]) as t:
            sums: list[Any] = [constant(0.0, LANES)] * rows
            for part in range(0, dim, LANES):
                key = floats(builder, load(builder, at[0], [args[1], (t, dim), part], LANES))
                for row in range(rows):
                    numbers = load(builder, at[3], [row * dim + part], LANES)
                    sums[row] = multiply_add(builder, numbers, key, sums[row])
            for row in range(rows):
                total = call(builder, "llvm.vector.reduce.fadd", F32, F32(0.0), sums[row], flags=("reassoc",))
                builder.store(total, address(builder, at[4], [t, row * BLOCK]))
        return context.get_dummy_value()

    return types.void(keys, start, last, q, out, head_dim, tile), build


@intrinsic(prefer_literal=True)
def weigh_tile(
    _context: Any,
    codes: Any,
    start: Any,
    weights: Any,
    first: Any,
    last: Any,
    out: Any,
    head_dim: Any,
    tile: Any,
) -> Any:
    """out[r, d] += sum over tokens first <= t < last of weights[r, t] * codes[start + head_dim * t + d].

    weights: float32 [tile, 64]; out: float32 [tile, head_dim].
    """
    dim, rows = head_dim.literal_value, tile.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointers(context, builder, signature, args)
        for channel in range(0, dim, 2 * LANES):
            parts = range(channel, min(channel + 2 * LANES, dim), LANES)
            places = [[address(builder, at[5], [row * dim + part]) for part in parts] for row in range(rows)]
            sums = Sums(builder, places, LANES)
            with each(builder, args[3], args[4]) as t:
                values = [
                    floats(builder, load(builder, at[0], [args[1], (t, dim), part], LANES)) for part in parts
                ]
                for row in range(rows):
                    weight = splat(builder, at[2], [t, row * BLOCK], LANES)
                    for part, value in enumerate(values):
                        sums.add(row, part, weight, value)
            sums.store(places)
        return context.get_dummy_value()

    return types.void(codes, start, weights, first, last, out, head_dim, tile), build


@intrinsic(prefer_literal=True)
def weigh_tile4(
    _context: Any,
    codes: Any,
    start: Any,
    pairs: Any,
    pairs_start: Any,
    weights: Any,
    first: Any,
    last: Any,
    out: Any,
    head_dim: Any,
    tile: Any,
) -> Any:
    """weigh_tile over values of four bits: code * scale + minimum.

    codes: the record as uint8; byte i of a group of width w holds code[i] | code[i + w/2] << 4. pairs: the
    record as uint32 words, [64, groups] from pairs_start on: bf16 scale in the low half, minimum in the high.
    """
    dim, rows = head_dim.literal_value, tile.literal_value
    groups = -(-dim // V4_GROUP)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointers(context, builder, signature, args)
        for group in range(groups):
            channel = group * V4_GROUP
            half = min(V4_GROUP, dim - channel) // 2
            floats, words = ir.VectorType(F32, half), ir.VectorType(I32, half)
            places = [
                [address(builder, at[7], [row * dim + channel + i * half]) for i in range(2)]
                for row in range(rows)
            ]
            sums = Sums(builder, places, half)
            with each(builder, args[5], args[6]) as t:
                pair = splat(builder, at[2], [args[3], (t, groups), group], half)
                scale = builder.bitcast(builder.shl(pair, constant(16, half)), floats)
                minimum = builder.bitcast(builder.and_(pair, constant(0xFFFF0000, half)), floats)
                both = builder.zext(load(builder, at[0], [args[1], (t, dim // 2), channel // 2], half), words)
                low = builder.and_(both, constant(15, half))
                high = builder.lshr(both, constant(4, half))
                values = [
                    multiply_add(builder, builder.sitofp(code, floats), scale, minimum)
                    for code in (low, high)
                ]
                for row in range(rows):
                    weight = splat(builder, at[4], [t, row * BLOCK], half)
                    for i, value in enumerate(values):
                        sums.add(row, i, weight, value)
            sums.store(places)
        return context.get_dummy_value()

    return types.void(codes, start, pairs, pairs_start, weights, first, last, out, head_dim, tile), build


@intrinsic
def maximum64(_context: Any, numbers: Any) -> Any:
    """Largest of float32 numbers[:64]; NaN if one of them is."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = load(builder, pointers(context, builder, signature, args)[0], [], BLOCK)
        return call(builder, "llvm.vector.reduce.fmaximum", F32, vector)

    return types.float32(numbers), build


@intrinsic
def exponentials64(_context: Any, numbers: Any, centre: Any) -> Any:
    """numbers[:64] = exp(numbers - centre), for numbers <= centre; returns their sum."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = vector_address(builder, pointers(context, builder, signature, args)[0], BLOCK)
        shifted = builder.fsub(builder.load(place, align=4), broadcast(builder, args[1], BLOCK))
        result = exp(builder, shifted)
        builder.store(result, place, align=4)
        return call(builder, "llvm.vector.reduce.fadd", F32, F32(0.0), result, flags=("reassoc",))

    return types.float32(numbers, types.float32), build


@intrinsic
def cap64(_context: Any, numbers: Any, softcap: Any) -> Any:
    """numbers[:64] = softcap * tanh(numbers / softcap), by tanh(x) = 1 - 2 / (exp(2x) + 1)."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = vector_address(builder, pointers(context, builder, signature, args)[0], BLOCK)
        cap = broadcast(builder, args[1], BLOCK)
        one, two = constant(1.0, BLOCK), constant(2.0, BLOCK)
        power = exp(builder, builder.fmul(builder.load(place, align=4), builder.fdiv(two, cap)))
        tanh = builder.fsub(one, builder.fdiv(two, builder.fadd(power, one)))
        builder.store(builder.fmul(cap, tanh), place, align=4)
        return context.get_dummy_value()

    return types.void(numbers, types.float32), build
