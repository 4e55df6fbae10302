"""The inner loops of partial.py, written as LLVM vectors.

numba compiles plain loops for these too, but then LLVM's loop vectoriser reloads the sums at every token:
over int4 values it reached a quarter of this speed, and its choices vary with the number of rows. Here the
sums of a tile stay in registers. `head_dim` and `tile` (rows of queries) are literals: each pair is its own
code.

Arrays are C-contiguous; nothing is checked. "codes" is a record as int8, as float32, or as bf16 bits in
uint16; starts are indices into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from spilld.offload.kernels.vectors import (
    F32,
    I32,
    I64,
    Sums,
    address,
    broadcast,
    call,
    constant,
    each,
    exp,
    fetch,
    floats,
    load,
    multiply_add,
    pointers,
    splat,
    vector_address,
)
from spilld.offload.record import BLOCK, V4_GROUP

LANES = 8

_VECTORS = 4
"""Vectors of sums a row: with MAX_TILE rows, and what else a loop needs, all registers are used."""

MAX_TILE = 3
"""Rows of a tile."""


@intrinsic(prefer_literal=True)
def dot_tile(
    _context: Any, codes: Any, start: Any, ahead: Any, q: Any, top: Any, out: Any, head_dim: Any, tile: Any
) -> Any:
    """Compute out[r, t] = sum over d of q[top + r, d] * codes[start + 64 * d + t].

    q: float32 [rows, head_dim]; out: float32 [tile, 64]. Here and below, `ahead` is where the next codes
    begin. They are fetched into the cache meanwhile, one line at a time, as many at once would stall.
    """
    dim, rows = head_dim.literal_value, tile.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointers(context, builder, signature, args)
        for tokens in _passes(BLOCK):
            width = len(tokens) * LANES
            sums = Sums(builder, [[None] * len(tokens)] * rows, LANES)
            with each(builder, 0, dim) as d:
                fetch(builder, at[0], [args[2], tokens.start * dim, (d, width)], width)
                factors = [
                    splat(builder, at[3], [(args[4], dim), d, row * dim], LANES) for row in range(rows)
                ]
                for i, t in enumerate(tokens):
                    keys = floats(builder, load(builder, at[0], [args[1], (d, BLOCK), t], LANES))
                    for row in range(rows):
                        sums.add(row, i, factors[row], keys)
            sums.store([[address(builder, at[5], [row * BLOCK + t]) for t in tokens] for row in range(rows)])
        return context.get_dummy_value()

    return types.void(codes, start, ahead, q, top, out, head_dim, tile), build


@intrinsic(prefer_literal=True)
def dot_rows(
    _context: Any, keys: Any, start: Any, last: Any, q: Any, top: Any, out: Any, head_dim: Any, tile: Any
) -> Any:
    """Do what dot_tile does for token-major keys, for t < last.

    out[r, t] = sum over d of q[top + r, d] * keys[start + head_dim * t + d].
    """
    dim, rows, width = head_dim.literal_value, tile.literal_value, 2 * LANES

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointers(context, builder, signature, args)
        with each(builder, 0, args[2]) as t:
            sums: list[Any] = [constant(0.0, width)] * rows
            for part in range(0, dim, width):
                key = floats(builder, load(builder, at[0], [args[1], (t, dim), part], width))
                for row in range(rows):
                    numbers = load(builder, at[3], [(args[4], dim), row * dim + part], width)
                    sums[row] = multiply_add(builder, numbers, key, sums[row])
            for row in range(rows):
                total = call(builder, "llvm.vector.reduce.fadd", F32, F32(0.0), sums[row], flags=("reassoc",))
                builder.store(total, address(builder, at[5], [t, row * BLOCK]))
        return context.get_dummy_value()

    return types.void(keys, start, last, q, top, out, head_dim, tile), build


@intrinsic(prefer_literal=True)
def weigh_tile(
    _context: Any,
    codes: Any,
    start: Any,
    ahead: Any,
    weights: Any,
    first: Any,
    last: Any,
    out: Any,
    top: Any,
    head_dim: Any,
    tile: Any,
) -> Any:
    """Add to out[top + r, d] the sum over tokens t of weights[r, t] * codes[start + head_dim * t + d].

    first <= t < last. weights: float32 [tile, 64]; out: float32 [rows, head_dim].
    """
    dim, rows = head_dim.literal_value, tile.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointers(context, builder, signature, args)
        for channels in _passes(dim):
            width = len(channels) * LANES
            places = [
                [address(builder, at[6], [(args[7], dim), row * dim + d]) for d in channels]
                for row in range(rows)
            ]
            sums = Sums(builder, places, LANES)
            with each(builder, args[4], args[5]) as t:
                fetch(builder, at[0], [args[2], channels.start * BLOCK, (t, width)], width)
                factors = [splat(builder, at[3], [t, row * BLOCK], LANES) for row in range(rows)]
                for i, d in enumerate(channels):
                    values = floats(builder, load(builder, at[0], [args[1], (t, dim), d], LANES))
                    for row in range(rows):
                        sums.add(row, i, factors[row], values)
            sums.store(places)
        return context.get_dummy_value()

    return types.void(codes, start, ahead, weights, first, last, out, top, head_dim, tile), build


def _passes(numbers: int) -> Iterator[range]:
    """Yield ranges of numbers whose sums are in registers together, in steps of a vector."""
    for first in range(0, numbers, _VECTORS * LANES):
        yield range(first, min(first + _VECTORS * LANES, numbers), LANES)


@intrinsic
def widen(_context: Any, codes: Any, start: Any, ahead: Any, out: Any) -> Any:
    """Fill out, float32 [a multiple of 64], with codes[start:] as numbers."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointers(context, builder, signature, args)
        count = context.make_array(signature.args[3])(context, builder, args[3]).nitems
        with each(builder, 0, builder.udiv(count, I64(BLOCK))) as i:
            fetch(builder, at[0], [args[2], (i, BLOCK)], BLOCK)
            for first in range(0, BLOCK, LANES):
                place = [(i, BLOCK), first]
                numbers = floats(builder, load(builder, at[0], [args[1], *place], LANES))
                _store(builder, numbers, at[3], place)
        return context.get_dummy_value()

    return types.void(codes, types.int64, types.int64, out), build


@intrinsic(prefer_literal=True)
def widen4(
    _context: Any, codes: Any, start: Any, ahead: Any, pairs: Any, pairs_start: Any, out: Any, head_dim: Any
) -> Any:
    """Unpack values of four bits, code * scale + minimum, into out, float32 [64 * head_dim].

    codes: the record as uint8; byte i of a group of width w holds code[i] | code[i + w/2] << 4. pairs: the
    record as uint32 words, [64, groups] from pairs_start on: bf16 scale in the low half, minimum in the high.
    """
    dim = head_dim.literal_value
    groups = -(-dim // V4_GROUP)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointers(context, builder, signature, args)
        with each(builder, 0, BLOCK) as t:
            fetch(builder, at[0], [args[2], (t, dim // 2)], dim // 2)
            for group in range(groups):
                channel = group * V4_GROUP
                half = min(V4_GROUP, dim - channel) // 2
                scale, minimum = _scale(builder, splat(builder, at[3], [args[4], (t, groups), group], LANES))
                for i in range(0, half, LANES):
                    place = [args[1], (t, dim // 2), channel // 2 + i]
                    low, high = _nibbles(builder, load(builder, at[0], place, LANES))
                    for code, d in ((low, channel + i), (high, channel + half + i)):
                        value = multiply_add(builder, code, scale, minimum)
                        _store(builder, value, at[5], [(t, dim), d])
        return context.get_dummy_value()

    return types.void(codes, start, ahead, pairs, pairs_start, out, head_dim), build


@intrinsic(prefer_literal=True)
def widen_keys4(
    _context: Any, codes: Any, start: Any, ahead: Any, pairs: Any, pairs_start: Any, out: Any, head_dim: Any
) -> Any:
    """Unpack keys of four bits, code * scale + minimum, still rotated, into out, float32 [head_dim, 64].

    codes: the record as uint8, [head_dim / 2, 64] from start on, a group's bytes as in widen4. pairs: as
    there, but [groups, 64].
    """
    dim = head_dim.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointers(context, builder, signature, args)

        def widen_group(group: Any, width: int) -> None:
            for tokens in _passes(BLOCK):
                scales = [
                    _scale(builder, load(builder, at[3], [args[4], (group, BLOCK), t], LANES)) for t in tokens
                ]
                with each(builder, 0, width // 2) as i:
                    row = [(group, V4_GROUP // 2 * BLOCK), (i, BLOCK)]
                    if tokens.start == 0:
                        fetch(builder, at[0], [args[2], *row], BLOCK)
                    for t, (scale, minimum) in zip(tokens, scales, strict=True):
                        both = _nibbles(builder, load(builder, at[0], [args[1], *row, t], LANES))
                        for code, d in zip(both, (0, width // 2), strict=True):
                            place = [(group, V4_GROUP * BLOCK), (i, BLOCK), d * BLOCK + t]
                            _store(builder, multiply_add(builder, code, scale, minimum), at[5], place)

        with each(builder, 0, dim // V4_GROUP) as group:
            widen_group(group, V4_GROUP)
        if dim % V4_GROUP:
            widen_group(I64(dim // V4_GROUP), dim % V4_GROUP)
        return context.get_dummy_value()

    return types.void(codes, start, ahead, pairs, pairs_start, out, head_dim), build


@intrinsic(prefer_literal=True)
def rotate_rows(_context: Any, q: Any, out: Any, head_dim: Any) -> Any:
    """Rotate rows of q as keys of four bits are, into out; q, out: float32 [rows, head_dim]."""
    dim = head_dim.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointers(context, builder, signature, args)
        rows = builder.extract_value(
            context.make_array(signature.args[0])(context, builder, args[0]).shape, 0
        )
        with each(builder, 0, rows) as row:
            parts = [load(builder, at[0], [(row, dim), d], LANES) for d in range(0, dim, LANES)]
            done: list[Any] = []
            while parts:
                size = 1 << (len(parts).bit_length() - 1)
                done += _rotated(builder, parts[:size])
                parts = parts[size:]
            for i, part in enumerate(done):
                _store(builder, part, at[1], [(row, dim), i * LANES])
        return context.get_dummy_value()

    return types.void(q, out, head_dim), build


def _rotated(builder: Any, parts: list[Any]) -> list[Any]:
    """The fast Walsh-Hadamard transform of a power of two of vectors."""
    lanes = range(LANES)
    for span in (1, 2, 4):
        order = ir.Constant(ir.VectorType(I32, LANES), [lane ^ span for lane in lanes])
        signs = ir.Constant(ir.VectorType(F32, LANES), [-1.0 if lane & span else 1.0 for lane in lanes])
        parts = [
            multiply_add(builder, part, signs, builder.shuffle_vector(part, part, order)) for part in parts
        ]
    span = 1
    while span < len(parts):
        pairs = [(parts[i & ~span], parts[i | span]) for i in range(len(parts))]
        parts = [builder.fsub(*pair) if i & span else builder.fadd(*pair) for i, pair in enumerate(pairs)]
        span *= 2
    factor = constant((len(parts) * LANES) ** -0.5, LANES)
    return [builder.fmul(part, factor) for part in parts]


def _scale(builder: Any, pairs: Any) -> tuple[Any, Any]:
    """(scale, minimum) of uint32 words with the first in the low half."""
    numbers = ir.VectorType(F32, LANES)
    minimum = builder.and_(pairs, constant(0xFFFF0000, LANES))
    return builder.bitcast(builder.shl(pairs, constant(16, LANES)), numbers), builder.bitcast(
        minimum, numbers
    )


def _nibbles(builder: Any, codes: Any) -> tuple[Any, Any]:
    """The low and the high four bits of bytes as float32."""
    numbers, both = ir.VectorType(F32, LANES), builder.zext(codes, ir.VectorType(I32, LANES))
    low, high = builder.and_(both, constant(15, LANES)), builder.lshr(both, constant(4, LANES))
    return builder.sitofp(low, numbers), builder.sitofp(high, numbers)


def _store(builder: Any, vector: Any, pointer: Any, terms: Sequence[Any]) -> None:
    place = vector_address(builder, address(builder, pointer, terms), vector.type.count)
    builder.store(vector, place, align=4)


@intrinsic
def maximum64(_context: Any, numbers: Any, row: Any) -> Any:
    """Return the largest of a row of float32 [rows, 64]; if one of them is NaN, that or any of them."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointers(context, builder, signature, args)[0]
        parts = [load(builder, at, [(args[1], BLOCK), first], LANES) for first in range(0, BLOCK, LANES)]
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [builder.select(builder.fcmp_ordered(">", a, b), a, b) for a, b in pairs]
        return call(builder, "llvm.vector.reduce.fmax", F32, parts[0])

    return types.float32(numbers, types.int64), build


@intrinsic
def exponentials64(_context: Any, numbers: Any, row: Any, centre: Any) -> Any:
    """Replace numbers[row] by exp(numbers[row] - centre), for numbers <= centre, and return their sum."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _row(context, builder, signature, args)
        shifted = builder.fsub(builder.load(place, align=4), broadcast(builder, args[2], BLOCK))
        result = exp(builder, shifted)
        builder.store(result, place, align=4)
        return call(builder, "llvm.vector.reduce.fadd", F32, F32(0.0), result, flags=("reassoc",))

    return types.float32(numbers, types.int64, types.float32), build


@intrinsic
def cap64(_context: Any, numbers: Any, row: Any, softcap: Any) -> Any:
    """Replace numbers[row] by softcap * tanh(numbers[row] / softcap), by tanh(x) = 1 - 2 / (exp(2x) + 1)."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _row(context, builder, signature, args)
        cap = broadcast(builder, args[2], BLOCK)
        one, two = constant(1.0, BLOCK), constant(2.0, BLOCK)
        power = exp(builder, builder.fmul(builder.load(place, align=4), builder.fdiv(two, cap)))
        tanh = builder.fsub(one, builder.fdiv(two, builder.fadd(power, one)))
        builder.store(builder.fmul(cap, tanh), place, align=4)
        return context.get_dummy_value()

    return types.void(numbers, types.int64, types.float32), build


def _row(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Where row args[1] of args[0], [rows, 64], lies, as a vector."""
    at = pointers(context, builder, signature, args)[0]
    return vector_address(builder, address(builder, at, [(args[1], BLOCK)]), BLOCK)
