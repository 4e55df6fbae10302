"""The kernels that multiply tiles of packed weights by rows, one for each form.

A kernel is compiled, or read from the cache, when a matrix of its form is first used, and called by its
address: what calls it is compiled once for all forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from spilld.offload.kernels.vectors import F32, I32, I64, Sums, address, each, fetch, splat

from .forms import GROUP, LANES, VECTOR, Form
from .row_operations import TOGETHER
from .unpacking import I16, SIZES, Codes, Scale, Scales

CACHED_ROWS = 64
"""Rows multiplied by a tile while it is in the L1 cache: their inputs stay in the L2 cache."""

AHEAD = 1024
"""Words: how far before their use weights are fetched. Hardware fetches no further than a page."""

ARGUMENTS = (types.int64,) * 14
"""Of a kernel: see `multiply` in `_kernel`."""

_FORMS = tuple(Form)

_INTS, _FLOATS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)


@cache
def kernel_address(form: Form) -> int:
    """Return the address of a form's kernel, a function of numba's calling convention that returns nothing.

    The first call in a machine's life takes seconds, the first in a process a fraction of one.
    """
    kernel = _kernel(_FORMS.index(form), SIZES[form.layout.bits][0])
    kernel.compile(ARGUMENTS)
    compiled = kernel.overloads[ARGUMENTS]
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))


@cache
def _kernel(form: int, vectors: int) -> Any:
    one, two, together = 1, 2, TOGETHER

    @njit(nogil=True, error_model="numpy", cache=True)
    def multiply(
        words: Any,
        first: Any,
        last: Any,
        blocks: Any,
        pairs: Any,
        scales: Any,
        sums: Any,
        halves: Any,
        width: Any,
        out: Any,
        stride: Any,
        rows: Any,
        lines: Any,
        parts: Any,
    ) -> None:
        """Add tiles first <= t < last times rows 0 <= r < rows to out.

        words, pairs, scales, sums, halves and out are addresses: of the tiles, of the rows' codes and so on
        (Inputs), `width` groups from row to row, and of float32 outputs, `stride` from row to row. lines is
        `vectors`, parts the groups of a block: if the compiler knew them it would unroll the loops and then
        compute row by row, which needs all the codes at once.
        """
        if rows > 1:
            twos = first + (last - first) // 2 * 2
            for top in range(0, rows, CACHED_ROWS):
                end = min(top + CACHED_ROWS, rows)
                for tile in range(first, twos, 2):
                    for row in range(top, end, TOGETHER):
                        multiply_tiles(
                            form, together, two,
                            words, tile, blocks, pairs, scales, sums, halves, width, out, stride, row,
                            lines, parts,
                        )  # fmt: skip
            first = twos
        for tile in range(first, last):
            for row in range(rows):
                multiply_tiles(
                    form, one, one,
                    words, tile, blocks, pairs, scales, sums, halves, width, out, stride, row, vectors, parts,
                )  # fmt: skip

    return multiply


@intrinsic(prefer_literal=True)
def multiply_tiles(
    _context: Any,
    form: Any,
    height: Any,
    wide: Any,
    words: Any,
    tile: Any,
    blocks: Any,
    pairs: Any,
    scales: Any,
    sums: Any,
    halves: Any,
    width: Any,
    out: Any,
    stride: Any,
    top: Any,
    lines: Any,
    parts: Any,
) -> Any:
    """Add tiles from `tile` on times row r to out[r], top <= r < top + height.

    form, height, wide (the number of tiles): literals. The rest is as in `multiply` in `_kernel`.
    """
    kind, rows, tiles = _FORMS[form.literal_value], height.literal_value, wide.literal_value

    def build(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _Tiles(builder, kind, rows, tiles, args[3:]).multiply()
        return context.get_dummy_value()

    return (
        types.void(
            form,
            height,
            wide,
            words,
            tile,
            blocks,
            pairs,
            scales,
            sums,
            halves,
            width,
            out,
            stride,
            top,
            lines,
            parts,
        ),
        build,
    )


class _Tiles:
    """Emits the product of some tiles with some rows."""

    def __init__(self, builder: Any, form: Form, rows: int, tiles: int, args: Any) -> None:
        words, tile, blocks, pairs, scales, sums, halves, width, out, stride, top, lines, parts = args
        self._builder, self._form, self._layout = builder, form, form.layout
        self._rows, self._tiles = range(rows), range(tiles)
        self._words, self._pairs, self._scales, self._sums, self._halves, self._out = (
            builder.inttoptr(place, kind.as_pointer())
            for place, kind in (
                (words, I16),
                (pairs, I32),
                (scales, F32),
                (sums, F32),
                (halves, F32),
                (out, F32),
            )
        )
        self._tile, self._blocks, self._width, self._stride, self._top = tile, blocks, width, stride, top
        self._lines, self._parts = lines, parts
        self._codes = [Codes(builder, form, self._words) for _ in self._tiles]
        self._products = [[cgutils.alloca_once(builder, _INTS) for _ in self._tiles] for _ in self._rows]
        count = 2 * self._layout.groups * self._layout.halves
        self._kept = [cgutils.alloca_once(builder, ir.ArrayType(_FLOATS, count)) for _ in self._tiles]

    def multiply(self) -> None:
        """Emit it all."""
        builder = self._builder
        places = [[self._place(r, t) for t in self._tiles] for r in self._rows]
        if len(self._rows) > 1:
            for r in self._rows:
                fetch(builder, self._place(len(self._rows) + r, 0), [], LANES * len(self._tiles))
        self._totals = Sums(builder, places, LANES)
        with each(builder, 0, self._blocks) as block:
            starts = [self._start(t, block) for t in self._tiles]
            if self._layout.groups == 1:
                self._group(block, starts, lambda t, _: self._scales_of(starts[t])[0])
            else:
                self._keep_scales(starts)
                with each(builder, 0, self._parts) as part:
                    self._part(block, starts, part)
        self._totals.store(places)

    def _part(self, block: Any, starts: Sequence[Any], part: Any) -> None:
        """Emit a group of a block of several."""
        builder, layout = self._builder, self._layout
        group = builder.add(builder.mul(block, I64(layout.groups)), part)
        offset = builder.mul(part, I64(layout.bits * VECTOR))
        places = [builder.add(start, offset) for start in starts]
        self._group(group, places, lambda t, half: self._kept_scale(t, part, half))

    def _group(self, group: Any, starts: Sequence[Any], scale_of: Callable[[int, int], Scale]) -> None:
        """Emit a group: its codes begin at the words `starts`."""
        for half in range(self._layout.halves):
            self._sum_products(group, starts, half)
            for t in self._tiles:
                scale, minimum = scale_of(t, half)
                for r in self._rows:
                    number = self._as_float(self._products[r][t])
                    factor = self._number(self._scales, r, group)
                    self._totals.add(r, t, self._builder.fmul(scale, factor), number)
                    if minimum is not None:
                        self._totals.add(r, t, minimum, self._sum(r, group, half))

    def _sum_products(self, group: Any, starts: Sequence[Any], half: int) -> None:
        """Emit the exact sums of a group's products with its codes, or of those of a half of it."""
        builder = self._builder
        for slot in chain.from_iterable(self._products):
            builder.store(ir.Constant(_INTS, [0] * LANES), slot)
        vectors, pairs = self._codes[0].vectors, GROUP // 2 // self._layout.halves
        first = I64(half * pairs)
        with each(builder, 0, self._lines) as line:
            number = builder.add(line, I64(half * vectors))
            for start in starts:
                fetch(builder, self._words, [start, (number, VECTOR), AHEAD], VECTOR)
            columns = [codes.of(start, number) for codes, start in zip(self._codes, starts, strict=True)]
            for s, pair in enumerate(zip(*columns, strict=True)):
                place = builder.add(first, builder.mul(line, I64(self._codes[0].each)))
                self._multiply_pair(group, builder.add(place, I64(s)), pair)
        rest = [codes.last(start, half) for codes, start in zip(self._codes, starts, strict=True)]
        for i, pair in enumerate(zip(*rest, strict=True)):
            self._multiply_pair(group, I64((half + 1) * pairs - len(rest[0]) + i), pair)

    def _multiply_pair(self, group: Any, place: Any, codes: Sequence[Any]) -> None:
        """Add the products of all rows with the codes of a pair of inputs, the place-th of the group."""
        builder = self._builder
        for r in self._rows:
            terms = [(self._row(r, self._width), GROUP // 2), (group, GROUP // 2), place]
            both = builder.bitcast(splat(builder, self._pairs, terms, LANES), ir.VectorType(I16, VECTOR))
            for slot, code in zip(self._products[r], codes, strict=True):
                builder.store(builder.add(builder.load(slot), _pairwise(builder, code, both)), slot)

    def _sum(self, row: int, group: Any, half: int) -> Any:
        """Return the sum of a row's inputs in a group, or in a half of it."""
        if self._layout.halves == 1:
            return self._number(self._sums, row, group)
        terms = [(self._row(row, self._width), 2), (group, 2), half]
        return splat(self._builder, self._halves, terms, LANES)

    def _scales_of(self, start: Any) -> list[Scale]:
        return Scales(self._builder, self._form, self._words).of(start)

    def _keep_scales(self, starts: Sequence[Any]) -> None:
        """Unpack the scales of a block of each tile."""
        for slots, start in zip(self._kept, starts, strict=True):
            fetch(self._builder, self._words, [start, self._layout.code_words, AHEAD], self._head_words)
            for i, scale in enumerate(self._scales_of(start)):
                for plane, vector in enumerate(scale):
                    if vector is not None:
                        self._builder.store(vector, self._slot(slots, I64(2 * i + plane)))

    @property
    def _head_words(self) -> int:
        return self._layout.words - self._layout.code_words

    def _kept_scale(self, tile: int, part: Any, half: int) -> Scale:
        builder, halves = self._builder, self._layout.halves
        index = builder.add(builder.mul(part, I64(2 * halves)), I64(2 * half))
        scale = builder.load(self._slot(self._kept[tile], index))
        if not self._has_minimums:
            return scale, None
        return scale, builder.load(self._slot(self._kept[tile], builder.add(index, I64(1))))

    @property
    def _has_minimums(self) -> bool:
        return self._form in (Form.Q2_K, Form.Q4_K, Form.Q5_K)

    def _slot(self, slots: Any, index: Any) -> Any:
        return self._builder.gep(slots, [I64(0), index])

    def _start(self, tile: int, block: Any) -> Any:
        """Return the first word of a block of the tile-th tile."""
        number = self._builder.add(self._tile, I64(tile))
        index = self._builder.add(self._builder.mul(number, self._blocks), block)
        return self._builder.mul(index, I64(self._layout.words))

    def _place(self, row: int, tile: int) -> Any:
        """Return the address of a tile's 8 outputs of a row."""
        terms = [(self._tile, LANES), tile * LANES, self._row(row, self._stride)]
        return address(self._builder, self._out, terms)

    def _number(self, array: Any, row: int, group: Any) -> Any:
        """Return a number of a group of a row, in all lanes."""
        return splat(self._builder, array, [self._row(row, self._width), group], LANES)

    def _row(self, row: int, stride: Any) -> Any:
        return self._builder.mul(self._builder.add(self._top, I64(row)), stride)

    def _as_float(self, slot: Any) -> Any:
        return self._builder.sitofp(self._builder.load(slot), _FLOATS)


def _pairwise(builder: Any, a: Any, b: Any) -> Any:
    """Return a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1], int32 [8], of int16 [16]: the instruction pmaddwd."""
    wide = ir.VectorType(I32, VECTOR)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    halves = [
        builder.shuffle_vector(products, products, ir.Constant(_INTS, [2 * i + odd for i in range(LANES)]))
        for odd in range(2)
    ]
    return builder.add(*halves)
