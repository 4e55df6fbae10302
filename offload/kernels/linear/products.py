"""Products of rows with packed weights, on the CPU.

The inputs of a group become int16 with a scale of their own, exact to 2^-15 of their largest: then 16
products are one instruction (pmaddwd, which LLVM finds), and int32 sums of a group are exact. A row's result
does not depend on the other rows, nor on the number of threads.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from spilld.offload.kernels.threads import spreading
from spilld.offload.kernels.vectors import (
    F32,
    I32,
    I64,
    Sums,
    address,
    each,
    fetch,
    load,
    pointers,
    splat,
)

from .packed import (
    GROUP,
    LANES,
    Form,
    Packed,
)
from .row_operations import TOGETHER

I16 = ir.IntType(16)

PAIRS, SCALES, SUMS, OUT, TOP = range(4, 9)
"""Arguments of multiply_tiles."""

CACHED_ROWS = 64
"""Rows multiplied by a tile while it is in the L1 cache: their inputs stay in the L2 cache."""

AHEAD = 1024
"""Words: how far before their use weights are fetched. Hardware fetches no further than a page."""

LINES4, LINES8 = 4, 8
"""Vectors of codes in a group of a tile."""

_INTS = ir.VectorType(I32, LANES)


class Matrix(NamedTuple):
    """Packed weights as kernels take them."""

    words: NDArray[np.uint16]
    """The tiles, one after another."""
    groups: int
    """Groups of 32 inputs."""
    int4: bool
    lines: int
    """LINES4 or LINES8."""

    @classmethod
    def of(cls, weights: Packed) -> Matrix:
        """Packed weights as kernels take them."""
        int4 = weights.form is Form.INT4
        return cls(weights.tiles.reshape(-1), weights.tiles.shape[1], int4, LINES4 if int4 else LINES8)


@njit(nogil=True, error_model="numpy", cache=True)
def multiply_rows(inputs: Any, weights: Any, out: Any, rows: Any) -> None:
    """Add the rows of `inputs` times the weights to out[:rows]; out: float32 [., outputs], C-contiguous.

    The result is what float32 products of the quantised inputs give, up to the rounding of their sums. Rows
    of out up to the next multiple of TOGETHER are undefined afterwards.
    """
    _spread(min(inputs.parts, out.shape[1] // LANES), inputs, weights, out, rows)  # its units need no memory


@njit(nogil=True, error_model="numpy")
def _unit(part: Any, inputs: Any, weights: Any, out: Any, rows: Any) -> None:
    """Multiply one part of the tiles."""
    count = out.shape[1] // LANES
    parts = min(inputs.parts, count)
    first, last = count * part // parts, count * (part + 1) // parts
    if rows == 1:
        if weights.int4:
            _tiles(inputs, weights, out, first, last, LINES4, 0, 1, 1, 1, 1)
        else:
            _tiles(inputs, weights, out, first, last, LINES8, 0, 1, 1, 1, 0)
        return
    # weights.lines, not a literal: LLVM would unroll the loop and then compute row by row, which needs all
    # the codes at once.
    twos = first + (last - first) // 2 * 2
    for top in range(0, rows, CACHED_ROWS):
        end = min(top + CACHED_ROWS, rows)
        if weights.int4:
            _tiles(inputs, weights, out, first, twos, weights.lines, top, end, TOGETHER, 2, 1)
            _tiles(inputs, weights, out, twos, last, weights.lines, top, end, TOGETHER, 1, 1)
        else:
            _tiles(inputs, weights, out, first, twos, weights.lines, top, end, TOGETHER, 2, 0)
            _tiles(inputs, weights, out, twos, last, weights.lines, top, end, TOGETHER, 1, 0)


_spread = spreading(lambda: _unit)


@njit(nogil=True, error_model="numpy", inline="always")
def _tiles(
    inputs: Any,
    weights: Any,
    out: Any,
    first: Any,
    last: Any,
    lines: Any,
    top: Any,
    end: Any,
    height: Any,
    width: Any,
    int4: Any,
) -> None:
    """Multiply tiles first <= t < last, `width` at a time, by rows top <= r < end, `height` at a time.

    height, width, int4: literals.
    """
    for tile in range(first, last, width):
        for row in range(top, end, height):
            multiply_tiles(
                weights.words,
                tile,
                weights.groups,
                lines,
                inputs.codes.view(np.int32),
                inputs.scales,
                inputs.sums,
                out,
                row,
                height,
                width,
                int4,
            )


@intrinsic(prefer_literal=True)
def multiply_tiles(
    _context: Any,
    words: Any,
    tile: Any,
    groups: Any,
    lines: Any,
    pairs: Any,
    scales: Any,
    sums: Any,
    out: Any,
    top: Any,
    height: Any,
    width: Any,
    int4: Any,
) -> Any:
    """Add `width` tiles of weights times row r to out[r, 8 tile:8 (tile + width)], top <= r < top + height.

    lines: vectors of codes in a group of a tile. pairs: int32 [rows, .], two neighbouring int16 inputs each;
    scales, sums: of each group's inputs. height, width, int4: literals.
    """
    rows, tiles = height.literal_value, width.literal_value
    form = Form.INT4 if int4.literal_value else Form.INT8

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        here = _Place(context, builder, signature, args)
        if rows > 1:
            for r in range(rows):
                fetch(builder, here.out(rows + r, 0), [], LANES * tiles)
        totals = Sums(builder, [[here.out(r, t) for t in range(tiles)] for r in range(rows)], LANES)
        with each(builder, 0, args[2]) as group:
            starts = [here.group(t, group, form) for t in range(tiles)]
            products = [[cgutils.alloca_once(builder, _INTS) for _ in starts] for _ in range(rows)]
            for slot in chain.from_iterable(products):
                builder.store(ir.Constant(_INTS, [0] * LANES), slot)
            with each(builder, 0, args[3]) as line:
                for start in starts:
                    fetch(builder, here.words, [start, (line, 16), AHEAD], 16)
                for s, codes in enumerate(
                    zip(*(_codes(builder, here.words, start, line, form) for start in starts), strict=True)
                ):
                    for r in range(rows):
                        both = here.pair(r, group, line, s, form)
                        for slot, code in zip(products[r], codes, strict=True):
                            product = _pairwise(builder, code, builder.bitcast(both, code.type))
                            builder.store(builder.add(builder.load(slot), product), slot)
            for t, start in enumerate(starts):
                scale = _halves(builder, here.words, start, 0, form)
                minimum = _halves(builder, here.words, start, 1, form) if form is Form.INT4 else None
                for r in range(rows):
                    number = builder.sitofp(builder.load(products[r][t]), ir.VectorType(F32, LANES))
                    totals.add(r, t, builder.fmul(scale, here.number(SCALES, r, group)), number)
                    if minimum is not None:
                        totals.add(r, t, minimum, here.number(SUMS, r, group))
        totals.store([[here.out(r, t) for t in range(tiles)] for r in range(rows)])
        return context.get_dummy_value()

    return types.void(words, tile, groups, lines, pairs, scales, sums, out, top, height, width, int4), build


def _codes(builder: Any, words: Any, start: Any, line: Any, form: Form) -> list[Any]:
    """Load a vector's codes, int16 [8 outputs, 2 inputs], pair by pair of inputs; see packed.py."""
    word = load(builder, words, [start, (line, 16)], 16)
    if form is Form.INT8:
        return [builder.ashr(builder.shl(word, _words(8)), _words(8)), builder.ashr(word, _words(8))]
    codes = [builder.lshr(word, _words(4 * s)) if s else word for s in range(4)]
    return [*(builder.and_(code, _words(15)) for code in codes[:3]), codes[3]]


class _Place:
    """Addresses of the arguments of multiply_tiles."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self._builder, self._args = builder, args
        self._at = pointers(context, builder, signature, args)
        self._lengths = [
            builder.extract_value(context.make_array(kind)(context, builder, arg).shape, kind.ndim - 1)
            if isinstance(kind, types.Array)
            else None
            for kind, arg in zip(signature.args, args, strict=True)
        ]
        self.words = self._at[0]

    def group(self, tile: int, group: Any, form: Form) -> Any:
        """Return the index of a group's words, of the tile-th tile from args[1] on."""
        number = self._builder.add(self._args[1], I64(tile))
        index = self._builder.add(self._builder.mul(number, self._args[2]), group)
        return self._builder.mul(index, I64(form.words))

    def out(self, row: int, tile: int) -> Any:
        """Return the address of a tile's 8 outputs of a row."""
        return address(
            self._builder, self._at[OUT], [(self._args[1], LANES), tile * LANES, self._row(OUT, row)]
        )

    def pair(self, row: int, group: Any, line: Any, s: int, form: Form) -> Any:
        """Return two inputs of a row, in all lanes: the s-th pair of those that a vector of codes is for."""
        each_line = 4 if form is Form.INT4 else 2
        terms = [self._row(PAIRS, row), (group, GROUP // 2), (line, each_line), s]
        return splat(self._builder, self._at[PAIRS], terms, LANES)

    def number(self, array: int, row: int, group: Any) -> Any:
        """Return a number of a group of a row, in all lanes."""
        return splat(self._builder, self._at[array], [self._row(array, row), group], LANES)

    def _row(self, array: int, row: int) -> Any:
        number = self._builder.add(self._args[TOP], I64(row))
        return self._builder.mul(number, self._lengths[array])


def _pairwise(builder: Any, a: Any, b: Any) -> Any:
    """Return a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1], int32 [8], of int16 [16]."""
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
    """Load the scales of a group, or its minimums (plane 1), as float32 [8]."""
    planes = 2 if form is Form.INT4 else 1
    bits = load(builder, tile, [at, form.words - LANES * (planes - plane)], LANES)
    halves = builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES))
    return builder.fpext(halves, ir.VectorType(F32, LANES))
