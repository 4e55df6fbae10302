"""Matrices of GGUF files, packed without a change of their bits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from spilld.offload.kernels.threads import check, spreading
from spilld.offload.kernels.vectors import I64, address, each, load, pointers, vector_address

from .forms import GGUF_FORMS, GROUP, LANES, VECTOR, CodeRun, Form, FormLayout
from .packed import Packed

PARTS = 16
"""Parts that a matrix is divided into, for the threads."""

_FORMS = tuple(Form)

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)

_PAIRS = GROUP // 2


def from_gguf(raw: NDArray[np.uint8], kind: str) -> Packed:
    """Pack a matrix of a GGUF file.

    Args:
        raw: `[outputs, bytes of a row] uint8`, C-contiguous. Outputs up to the next multiple of 8 are added:
            their weights are 0.
        kind: Name of its GGUF type, one of GGUF_FORMS.

    Raises:
        ValueError: The type has no form, or rows are not whole blocks of it.
        MemoryError: There is no memory for it.
    """
    form = GGUF_FORMS.get(kind)
    if form is None:
        raise ValueError(f"{kind} has no packed form; those that have one: {', '.join(GGUF_FORMS)}")
    outputs, width = raw.shape
    size = form.layout.block_bytes
    if width == 0 or width % size:
        raise ValueError(f"rows of {width} bytes are not whole blocks of {kind}, which have {size}")
    tiles = np.empty((-(-outputs // LANES), width // size, form.words), np.uint16)
    whole, raw = outputs // LANES, np.ascontiguousarray(raw)
    _pack(form, raw[: whole * LANES], tiles[:whole])
    if whole < len(tiles):
        rest = np.zeros((LANES, width), np.uint8)
        rest[: outputs - whole * LANES] = raw[whole * LANES :]
        _pack(form, rest, tiles[whole:])
    return Packed(form, tiles)


def _pack(form: Form, raw: NDArray[np.uint8], tiles: NDArray[np.uint16]) -> None:
    if len(tiles):
        check(_kernel(_FORMS.index(form))(min(PARTS, len(tiles)), raw, tiles))


@cache
def _kernel(form: int) -> Any:
    @njit(nogil=True, error_model="numpy", cache=True)
    def pack(parts: Any, raw: Any, tiles: Any) -> Any:
        return _spread(parts, form, parts, raw, tiles)

    return pack


@cache
def _unit(form: int) -> Any:
    @njit(nogil=True, error_model="numpy")
    def unit(part: Any, parts: Any, raw: Any, tiles: Any) -> None:
        """Pack one part of the tiles."""
        for tile in range(len(tiles) * part // parts, len(tiles) * (part + 1) // parts):
            for block in range(tiles.shape[1]):
                _pack_block(form, raw, tile, block, tiles)

    return unit


_spread = spreading(_unit, literals=1)


@intrinsic(prefer_literal=True)
def _pack_block(_context: Any, form: Any, raw: Any, tile: Any, block: Any, tiles: Any) -> Any:
    """Pack a block of 8 outputs."""
    layout = _FORMS[form.literal_value].layout

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, source, _, _, target = pointers(context, builder, signature, args)
        width, blocks = (
            builder.extract_value(context.make_array(signature.args[i])(context, builder, args[i]).shape, 1)
            for i in (1, 4)
        )
        index = builder.add(builder.mul(args[2], blocks), args[3])
        target = address(builder, target, [(index, layout.words)])
        first = address(
            builder,
            source,
            [builder.mul(args[2], builder.mul(width, I64(LANES))), (args[3], layout.block_bytes)],
        )
        pairs = cgutils.alloca_once(builder, ir.ArrayType(_I32, layout.groups * _PAIRS * LANES))
        lanes = builder.bitcast(pairs, _I32.as_pointer())
        with each(builder, 0, LANES) as output:
            start = address(builder, first, [builder.mul(output, width)])
            for group in range(layout.groups):
                codes = _codes(builder, start, layout, group)
                for p in range(_PAIRS):
                    place = address(builder, lanes, [(group * _PAIRS + p) * LANES, output])
                    builder.store(builder.extract_element(codes, _I32(p)), place)
            _copy_fields(builder, start, target, output, layout)
        halves = builder.bitcast(pairs, _I16.as_pointer())
        for group in range(layout.groups):
            _store_vectors(builder, halves, target, layout, group)
        return context.get_dummy_value()

    return types.void(form, raw, tile, block, tiles), build


def _codes(builder: Any, start: Any, layout: FormLayout, group: int) -> Any:
    """Return the codes of a group of an output, two of 16 bits in each int32 [16]."""
    total = _bytes(layout.bias)
    for run in layout.runs:
        if run.first // GROUP == group:
            total = builder.xor(total, _run(builder, start, run))
    wide = builder.zext(total, ir.VectorType(_I16, GROUP))
    return builder.bitcast(wide, ir.VectorType(_I32, _PAIRS))


def _run(builder: Any, start: Any, run: CodeRun) -> Any:
    """Return the bits of a run where they lie in the codes of a group, int8 [32]."""
    begin = run.first % GROUP
    inside = [begin <= i < begin + run.count for i in range(GROUP)]
    count = run.count if run.spread else 1
    numbers = load(builder, start, [run.byte], count)
    steps = [(i - begin if run.spread else 0) if there else count for i, there in enumerate(inside)]
    places = ir.Constant(ir.VectorType(_I32, GROUP), steps)
    numbers = builder.shuffle_vector(numbers, ir.Constant(numbers.type, [0] * count), places)
    if not run.spread:
        masks = [1 << i - begin if there else 0 for i, there in enumerate(inside)]
        found = builder.and_(numbers, ir.Constant(numbers.type, masks))
        return builder.select(builder.icmp_unsigned("!=", found, _bytes(0)), _bytes(1 << run.at), _bytes(0))
    found = builder.and_(builder.lshr(numbers, _bytes(run.shift)), _bytes((1 << run.bits) - 1))
    return builder.shl(found, _bytes(run.at))


def _copy_fields(builder: Any, start: Any, target: Any, output: Any, layout: FormLayout) -> None:
    """Copy what scales a block of an output."""
    for (byte, size), word in zip(layout.fields, layout.field_words, strict=True):
        kind = ir.IntType(8 * size).as_pointer()
        source = builder.bitcast(address(builder, start, [byte]), kind)
        place = builder.bitcast(address(builder, target, [word]), kind)
        builder.store(builder.load(source, align=1), builder.gep(place, [output]), align=1)


def _store_vectors(builder: Any, lanes: Any, target: Any, layout: FormLayout, group: int) -> None:
    """Put the codes of a group together to vectors."""
    vectors: dict[int, Any] = {}
    for pair, low, vector, at, bits in layout.pieces:
        codes = load(builder, lanes, [(group * _PAIRS + pair) * VECTOR], VECTOR)
        if low:
            codes = builder.lshr(codes, _same(low))
        if low + bits < layout.bits:
            codes = builder.and_(codes, _same((1 << bits) - 1))
        codes = builder.shl(codes, _same(at)) if at else codes
        vectors[vector] = builder.or_(vectors[vector], codes) if vector in vectors else codes
    for vector, codes in vectors.items():
        place = address(builder, target, [(group * layout.bits + vector) * VECTOR])
        builder.store(codes, vector_address(builder, place, VECTOR), align=2)


def _bytes(value: int) -> Any:
    return ir.Constant(ir.VectorType(_I8, GROUP), [value] * GROUP)


def _same(value: int) -> Any:
    return ir.Constant(ir.VectorType(_I16, VECTOR), [value] * VECTOR)
