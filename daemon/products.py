"""Products of a few rows with packed weights, on the CPU.

The inputs of a group become int16 with a scale of their own, exact to 2^-15 of their largest: then 16
products are one instruction (pmaddwd, which LLVM finds), and int32 sums of a group are exact. A row's result
does not depend on the other rows, nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

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
    broadcast,
    each,
    load,
    pointers,
)

from .packed import GROUP, LANES, Form, Packed
from .rows import MAX_ROWS, Inputs

I16 = ir.IntType(16)

_HEIGHTS = (0, 1, 2, 4, 4, 8, 8, 8, 8)
"""Rows that are computed, by those that are wanted: each number of rows is code of its own."""

Floats = NDArray[np.float32]


def multiply(inputs: Inputs, weights: Packed, out: Floats, rows: int) -> None:
    """out[:rows] += the rows times the weights; out: float32 [MAX_ROWS, outputs], C-contiguous.

    The result is what float32 products of the quantised inputs give, up to the rounding of their sums. Rows
    from `rows` on mean nothing afterwards. Raises ValueError if shapes disagree.
    """
    if out.shape != (MAX_ROWS, weights.outputs) or not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"{rows} rows of out {out.shape} for {weights.outputs} outputs")
    if weights.inputs > inputs.codes.shape[1]:
        raise ValueError(f"{weights.inputs} inputs where there are {inputs.codes.shape[1]}")
    _kernel(weights.form is Form.INT4, _HEIGHTS[rows])(
        weights.tiles.reshape(-1),
        weights.tiles.shape[1],
        inputs.codes,
        inputs.scales,
        inputs.sums,
        out,
        inputs.threads,
    )


@cache
def _kernel(int4: bool, height: int) -> Callable[..., None]:
    """The parallel loop for one form and one number of rows. Only numbers are captured, as in partial.py."""
    words = Form.INT4.words if int4 else Form.INT8.words

    @njit(parallel=True, nogil=True, error_model="numpy", cache=True)
    def kernel(tiles: Any, groups: Any, codes: Any, scales: Any, sums: Any, out: Any, parts: Any) -> None:
        pairs = codes.view(np.int32)
        count = out.shape[1] // LANES
        for part in prange(parts):
            for tile in range(count * part // parts, count * (part + 1) // parts):
                start = tile * groups * words
                if int4:
                    multiply4(tiles, start, groups, pairs, scales, sums, out, tile * LANES, height)
                else:
                    multiply8(tiles, start, groups, pairs, scales, out, tile * LANES, height)

    compiled: Callable[..., None] = kernel
    return compiled


@intrinsic(prefer_literal=True)
def multiply4(
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
) -> Any:
    """out[r, first:first + 8] += a tile of int4 weights, from tiles[start] on, times row r, r < height.

    pairs: int32 [rows, .], two neighbouring int16 inputs each; scales, sums: of each group's inputs.
    """
    rows = height.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows_of = _Rows(context, builder, signature, args, rows, inputs=3, scales=4, out=6, first=args[7])
        tile = pointers(context, builder, signature, args)[0]
        totals = Sums(builder, rows_of.places, LANES)
        with each(builder, 0, args[2]) as group:
            at = builder.add(args[1], builder.mul(group, I64(Form.INT4.words)))
            sums: list[Any] = [None] * rows
            for j in range(4):
                word = load(builder, tile, [at, 16 * j], 16)
                for s in range(4):
                    code = builder.lshr(word, _words(4 * s)) if s else word
                    code = builder.and_(code, _words(15)) if s < 3 else code
                    rows_of.add_products(sums, code, group, 4 * j + s)
            scale, minimum = (_halves(builder, tile, at, 64 + 8 * i) for i in range(2))
            for row in range(rows):
                number = builder.sitofp(sums[row], ir.VectorType(F32, LANES))
                totals.add(row, 0, builder.fmul(scale, rows_of.scale(row, group)), number)
                totals.add(row, 0, minimum, rows_of.number(5, row, group))
        totals.store(rows_of.places)
        return context.get_dummy_value()

    return types.void(tiles, start, groups, pairs, scales, sums, out, first, height), build


@intrinsic(prefer_literal=True)
def multiply8(
    _context: Any,
    tiles: Any,
    start: Any,
    groups: Any,
    pairs: Any,
    scales: Any,
    out: Any,
    first: Any,
    height: Any,
) -> Any:
    """multiply4 for int8 weights."""
    rows = height.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows_of = _Rows(context, builder, signature, args, rows, inputs=3, scales=4, out=5, first=args[6])
        tile = pointers(context, builder, signature, args)[0]
        totals = Sums(builder, rows_of.places, LANES)
        with each(builder, 0, args[2]) as group:
            at = builder.add(args[1], builder.mul(group, I64(Form.INT8.words)))
            sums: list[Any] = [None] * rows
            for j in range(8):
                word = load(builder, tile, [at, 16 * j], 16)
                low = builder.ashr(builder.shl(word, _words(8)), _words(8))
                for s, code in enumerate((low, builder.ashr(word, _words(8)))):
                    rows_of.add_products(sums, code, group, 2 * j + s)
            scale = _halves(builder, tile, at, 128)
            for row in range(rows):
                number = builder.sitofp(sums[row], ir.VectorType(F32, LANES))
                totals.add(row, 0, builder.fmul(scale, rows_of.scale(row, group)), number)
        totals.store(rows_of.places)
        return context.get_dummy_value()

    return types.void(tiles, start, groups, pairs, scales, out, first, height), build


class _Rows:
    """The rows of a product, as code at `builder`."""

    def __init__(
        self,
        context: Any,
        builder: Any,
        signature: Any,
        args: Any,
        rows: int,
        *,
        inputs: int,
        scales: int,
        out: int,
        first: Any,
    ) -> None:
        self._builder = builder
        self._at = pointers(context, builder, signature, args)
        self._inputs, self._scales = inputs, scales
        self._strides = [
            context.make_array(kind)(context, builder, arg).shape if isinstance(kind, types.Array) else None
            for kind, arg in zip(signature.args, args, strict=True)
        ]
        self.places = [[address(builder, self._at[out], [first, self._row(out, row)])] for row in range(rows)]

    def add_products(self, sums: list[Any], code: Any, group: Any, pair: int) -> None:
        """Add code [8 outputs, 2 inputs] times a pair of inputs of every row."""
        for row in range(len(sums)):
            both = broadcast(
                self._builder, self.number(self._inputs, row, group, GROUP // 2, pair, raw=True), LANES
            )
            product = _pairwise(self._builder, code, self._builder.bitcast(both, code.type))
            sums[row] = product if sums[row] is None else self._builder.add(sums[row], product)

    def scale(self, row: int, group: Any) -> Any:
        return self.number(self._scales, row, group)

    def number(
        self, array: int, row: int, group: Any, width: int = 1, offset: int = 0, *, raw: bool = False
    ) -> Any:
        """An element of a row in all lanes, or alone if `raw`."""
        at = address(self._builder, self._at[array], [self._row(array, row), (group, width), offset])
        element = self._builder.load(at)
        return element if raw else broadcast(self._builder, element, LANES)

    def _row(self, array: int, row: int) -> Any:
        length = self._builder.extract_value(self._strides[array], 1)
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


def _halves(builder: Any, tile: Any, at: Any, offset: int) -> Any:
    """Eight float16 as float32."""
    bits = load(builder, tile, [at, offset], LANES)
    return builder.fpext(
        builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), ir.VectorType(F32, LANES)
    )
