"""Vectors of float32 in LLVM IR, which tiles.py, products.py and row_operations.py build their loops from.

Every function emits code at `builder` and returns IR values; nothing here runs when a kernel does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

CACHE_LINE = 64
"""Bytes of a cache line."""

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


class Sums:
    """Vector sums [rows][parts] that LLVM keeps in registers; they start at what a place holds, or 0."""

    def __init__(self, builder: Any, places: Sequence[Sequence[Any]], width: int) -> None:
        self._builder = builder
        self._width = width
        self._slots = [[self._slot(place) for place in row] for row in places]

    def _slot(self, place: Any) -> Any:
        slot = cgutils.alloca_once(self._builder, ir.VectorType(F32, self._width))
        if place is None:
            start = constant(0.0, self._width)
        else:
            start = self._builder.load(vector_address(self._builder, place, self._width), align=4)
        self._builder.store(start, slot)
        return slot

    def add(self, row: int, part: int, factor: Any, vector: Any) -> None:
        """Add factor * vector to one of the sums."""
        slot = self._slots[row][part]
        self._builder.store(multiply_add(self._builder, factor, vector, self._builder.load(slot)), slot)

    def store(self, places: Sequence[Sequence[Any]]) -> None:
        """Store every sum at its place."""
        for row, slots in zip(places, self._slots, strict=True):
            for place, slot in zip(row, slots, strict=True):
                target = vector_address(self._builder, place, self._width)
                self._builder.store(self._builder.load(slot), target, align=4)


def exp(builder: Any, x: Any) -> Any:
    """Emit exp of a vector: relative error below 2^-21 + |x| 2^-24; 0 below -87, inf above 88, NaN of NaN.

    exp(x) = 2^n 2^f, n + f = x / ln 2, |f| <= 1/2. The polynomial is 1 at 0 and else the best for the
    relative error of 2^f, found by least squares at Chebyshev's nodes: 1.5e-7. n is added to the exponent.
    """
    width = x.type.count

    def number(value: float) -> Any:
        return constant(value, width)

    log2_e = number(1.44269504)
    n = call(builder, "llvm.rint", x.type, builder.fmul(x, log2_e))
    f = multiply_add(builder, x, log2_e, builder.fneg(n))
    y = number(1.32217976e-3)
    for c in (9.677217366e-3, 5.550958477e-2, 2.402213407e-1, 6.931467399e-1, 1.0):
        y = multiply_add(builder, y, f, number(c))
    words = ir.VectorType(I32, width)
    exponent = builder.shl(builder.fptosi(n, words), constant(23, width))
    y = builder.bitcast(builder.add(builder.bitcast(y, words), exponent), x.type)
    y = builder.select(builder.fcmp_ordered(">", x, number(88.0)), number(float("inf")), y)
    y = builder.select(builder.fcmp_ordered("<", x, number(-87.0)), number(0.0), y)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, y)


@contextmanager
def each(builder: Any, first: Any, last: Any) -> Iterator[Any]:
    """Emit a loop over first <= index < last; gives the index."""
    bounds = [I64(end) if isinstance(end, int) else end for end in (first, last)]
    with cgutils.for_range_slice(builder, *bounds, I64(1)) as (index, _):
        yield index


def pointers(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Return the data pointer of every array argument, None in the place of others."""
    return [
        context.make_array(kind)(context, builder, arg).data if isinstance(kind, types.Array) else None
        for kind, arg in zip(signature.args, args, strict=True)
    ]


def address(builder: Any, pointer: Any, terms: Sequence[Any]) -> Any:
    """Return pointer + the sum of terms: each is an int, an IR integer, or a pair (IR integer, factor)."""
    index: Any = I64(0)
    for term in terms:
        if isinstance(term, tuple):
            term = builder.mul(term[0], I64(term[1]))
        index = builder.add(index, I64(term) if isinstance(term, int) else term)
    return builder.gep(pointer, [index])


def vector_address(builder: Any, place: Any, width: int) -> Any:
    """Cast the address of a number to that of a vector of `width` numbers."""
    return builder.bitcast(place, ir.VectorType(place.type.pointee, width).as_pointer())


def load(builder: Any, pointer: Any, terms: Sequence[Any], width: int) -> Any:
    """Load `width` neighbours from pointer + terms; no alignment beyond the element's is assumed."""
    place = vector_address(builder, address(builder, pointer, terms), width)
    element = pointer.type.pointee
    return builder.load(place, align=4 if element == F32 else element.width // 8)


def fetch(builder: Any, pointer: Any, terms: Sequence[Any], count: int) -> None:
    """Bring `count` elements from pointer + terms on into the cache, without waiting for them."""
    element, byte = pointer.type.pointee, ir.IntType(8).as_pointer()
    size = 4 if element == F32 else element.width // 8
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    for first in range(0, count, CACHE_LINE // size):
        place = builder.bitcast(address(builder, pointer, [*terms, first]), byte)
        builder.call(prefetch, [place, I32(0), I32(3), I32(1)])  # to read, to keep, data


def broadcast(builder: Any, scalar: Any, width: int) -> Any:
    """Return a vector with the scalar in every lane."""
    empty = ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(empty, scalar, I32(0)), empty, constant(0, width))


def splat(builder: Any, pointer: Any, terms: Sequence[Any], width: int) -> Any:
    """Load the number at pointer + terms into every lane."""
    return broadcast(builder, builder.load(address(builder, pointer, terms)), width)


def constant(value: float, width: int) -> Any:
    """Return a constant vector with the value in every lane."""
    element = F32 if isinstance(value, float) else I32
    return ir.Constant(ir.VectorType(element, width), [value] * width)


def multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z, fused where the machine can."""
    return builder.fadd(builder.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def floats(builder: Any, codes: Any) -> Any:
    """Convert a vector of int8, bf16 bits or float32 to float32, exactly."""
    element, width = codes.type.element, codes.type.count
    floats = ir.VectorType(F32, width)
    if element == F32:
        return codes
    if element.width == 8:
        return builder.sitofp(codes, floats)
    bits = builder.shl(builder.zext(codes, ir.VectorType(I32, width)), constant(16, width))
    return builder.bitcast(bits, floats)


def call(builder: Any, name: str, result: Any, *args: Any, flags: Sequence[str] = ()) -> Any:
    """Call an LLVM intrinsic overloaded on its last argument, a vector of float32."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{args[-1].type.count}f32")
    return builder.call(function, args, fastmath=flags)
