"""Products of a few rows with packed weights, on the CPU.

The inputs of a group become int16 with a scale of their own, exact to 2^-15 of their largest: then 16
products are one instruction (pmaddwd, which LLVM finds), and int32 sums of a group are exact. A row's result
does not depend on the other rows, nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from spilld.offload.vectors import (
    F32,
    I32,
    I64,
    Sums,
    address,
    each,
    load,
    pointers,
    splat,
)

from .packed import GROUP, LANES, Form, Packed
from .rows import MAX_ROWS, Inputs

I16 = ir.IntType(16)

PAIRS, SCALES, SUMS, OUT, FIRST = range(3, 8)
"""Arguments of multiply_tile."""

INT4_WORDS, INT8_WORDS = Form.INT4.words, Form.INT8.words

Floats = NDArray[np.float32]


class Matrix(NamedTuple):
    """Packed weights as kernels take them."""

    words: NDArray[np.uint16]
    """The tiles, one after another."""
    groups: int
    """Groups of 32 inputs."""
    int4: bool

    @classmethod
    def of(cls, weights: Packed) -> Matrix:
        return cls(weights.tiles.reshape(-1), weights.tiles.shape[1], weights.form is Form.INT4)


def multiply(inputs: Inputs, weights: Packed, out: Floats, rows: int) -> None:
    """multiply_rows; raises ValueError if shapes disagree."""
    if out.shape != (MAX_ROWS, weights.outputs) or not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"{rows} rows of out {out.shape} for {weights.outputs} outputs")
    if weights.inputs > inputs.codes.shape[1]:
        raise ValueError(f"{weights.inputs} inputs where there are {inputs.codes.shape[1]}")
    multiply_rows(inputs, Matrix.of(weights), out, rows)


@njit(parallel=True, nogil=True, error_model="numpy", cache=True)
def multiply_rows(inputs: Any, weights: Any, out: Any, rows: Any) -> None:
    """out[:rows] += the rows of `inputs` times the weights; out: float32 [MAX_ROWS, outputs], C-contiguous.

    The result is what float32 products of the quantised inputs give, up to the rounding of their sums. Rows
    from `rows` on mean nothing afterwards.
    """
    count, parts = out.shape[1] // LANES, inputs.threads
    for part in prange(parts):
        for tile in range(count * part // parts, count * (part + 1) // parts):
            _multiply_tile(inputs, weights, out, tile, rows)


@njit(nogil=True, error_model="numpy", cache=True)
def _multiply_tile(inputs: Any, weights: Any, out: Any, tile: Any, rows: Any) -> None:
    """Each number of rows is code of its own: 1, 2, 4 or 8 are computed."""
    pairs, groups = inputs.codes.view(np.int32), weights.groups
    words, scales, sums, first = weights.words, inputs.scales, inputs.sums, tile * LANES
    if weights.int4:
        at = tile * groups * INT4_WORDS
        if rows == 1:
            multiply_tile(words, at, groups, pairs, scales, sums, out, first, 1, 1)
        elif rows == 2:
            multiply_tile(words, at, groups, pairs, scales, sums, out, first, 2, 1)
        elif rows <= 4:
            multiply_tile(words, at, groups, pairs, scales, sums, out, first, 4, 1)
        else:
            multiply_tile(words, at, groups, pairs, scales, sums, out, first, 8, 1)
        return
    at = tile * groups * INT8_WORDS
    if rows == 1:
        multiply_tile(words, at, groups, pairs, scales, sums, out, first, 1, 0)
    elif rows == 2:
        multiply_tile(words, at, groups, pairs, scales, sums, out, first, 2, 0)
    elif rows <= 4:
        multiply_tile(words, at, groups, pairs, scales, sums, out, first, 4, 0)
    else:
        multiply_tile(words, at, groups, pairs, scales, sums, out, first, 8, 0)


@intrinsic(prefer_literal=True)
def multiply_tile(
    _context: Any,
    tiles: Any,
    start: Any,
    groups: Any,
    pairs: Any,
    scales: Any,
    sums: Any,
    out: Any,
    first: Any,
    height: Any,
    int4: Any,
) -> Any:
    """out[r, first:first + 8] += a tile of weights, from tiles[start] on, times row r, r < height.

    pairs: int32 [rows, .], two neighbouring int16 inputs each; scales, sums: of each group's inputs. height,
    int4: literals.
    """
    rows, form = height.literal_value, Form.INT4 if int4.literal_value else Form.INT8

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows_of = _Rows(context, builder, signature, args, rows)
        tile = pointers(context, builder, signature, args)[0]
        totals = Sums(builder, rows_of.places, LANES)
        with each(builder, 0, args[2]) as group:
            at = builder.add(args[1], builder.mul(group, I64(form.words)))
            products: list[Any] = [None] * rows
            for pair, code in enumerate(_pairs(builder, tile, at, form)):
                rows_of.add_products(products, code, group, pair)
            scale = _halves(builder, tile, at, 0, form)
            for row in range(rows):
                number = builder.sitofp(products[row], ir.VectorType(F32, LANES))
                totals.add(row, 0, builder.fmul(scale, rows_of.number(SCALES, row, group)), number)
                if form is Form.INT4:
                    minimum = _halves(builder, tile, at, 1, form)
                    totals.add(row, 0, minimum, rows_of.number(SUMS, row, group))
        totals.store(rows_of.places)
        return context.get_dummy_value()

    return types.void(tiles, start, groups, pairs, scales, sums, out, first, height, int4), build


def _pairs(builder: Any, tile: Any, at: Any, form: Form) -> Iterator[Any]:
    """The codes of a group, int16 [8 outputs, 2 inputs], pair by pair of inputs; packed.py says where."""
    for j in range(8 if form is Form.INT8 else 4):
        word = load(builder, tile, [at, 16 * j], 16)
        if form is Form.INT8:
            yield builder.ashr(builder.shl(word, _words(8)), _words(8))
            yield builder.ashr(word, _words(8))
            continue
        for s in range(4):
            code = builder.lshr(word, _words(4 * s)) if s else word
            yield builder.and_(code, _words(15)) if s < 3 else code


class _Rows:
    """The rows of a product, as code at `builder`; args are those of multiply_tile."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any, rows: int) -> None:
        self._builder = builder
        self._at = pointers(context, builder, signature, args)
        self._shapes = [
            context.make_array(kind)(context, builder, arg).shape if isinstance(kind, types.Array) else None
            for kind, arg in zip(signature.args, args, strict=True)
        ]
        self.places = [
            [address(builder, self._at[OUT], [args[FIRST], self._row(OUT, row)])] for row in range(rows)
        ]

    def add_products(self, sums: list[Any], code: Any, group: Any, pair: int) -> None:
        """Add code [8 outputs, 2 inputs] times a pair of inputs of every row."""
        for row in range(len(sums)):
            both = self.number(PAIRS, row, group, GROUP // 2, pair)
            product = _pairwise(self._builder, code, self._builder.bitcast(both, code.type))
            sums[row] = product if sums[row] is None else self._builder.add(sums[row], product)

    def number(self, array: int, row: int, group: Any, width: int = 1, offset: int = 0) -> Any:
        """An element of a row, of which a group has `width`, in all lanes."""
        terms = [self._row(array, row), (group, width), offset]
        return splat(self._builder, self._at[array], terms, LANES)

    def _row(self, array: int, row: int) -> Any:
        length = self._builder.extract_value(self._shapes[array], 1)
        return self._builder.mul(length, I64(row))


def _pairwise(builder: Any, a: Any, b: Any) -> Any:
    """int32 [8]: a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] of int16 [16]."""
    wide = ir.VectorType(I32, 16)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    halves = [
        builder.shuffle_vector(
            products, products, ir.Constant(ir.VectorType(I32, 8), [2 * i + odd for i in range(8)])
        )
        for odd in range(2)
    ]
    return builder.add(*halves)


def _words(value: int) -> Any:
    return ir.Constant(ir.VectorType(I16, 16), [value] * 16)


def _halves(builder: Any, tile: Any, at: Any, plane: int, form: Form) -> Any:
    """The scales of a group, or its minimums (plane 1), as float32 [8]."""
    planes = 2 if form is Form.INT4 else 1
    bits = load(builder, tile, [at, form.words - LANES * (planes - plane)], LANES)
    halves = builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES))
    return builder.fpext(halves, ir.VectorType(F32, LANES))
