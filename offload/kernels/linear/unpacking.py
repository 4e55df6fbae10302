"""How kernels unpack weights: LLVM IR for the codes and the scales of a block, as forms.py has them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils

from spilld.offload.kernels.vectors import F32, I32, I64, broadcast, load

from .forms import LANES, VECTOR, Form

I8, I16 = ir.IntType(8), ir.IntType(16)

SIZES = {2: (2, 4), 3: (1, 5), 4: (4, 4), 5: (5, 3), 6: (3, 2), 8: (8, 2)}
"""By bits of a code: how often vectors of a half of a group (2, 3, 6) or of a group are unpacked, and to how
many codes."""


class Codes:
    """The codes of a half of a group, or of a group whose weights share a scale: int16 [8 outputs, 2 inputs].

    Vectors are unpacked one by one, in a loop; then the codes follow whose bits are spread over them.
    """

    def __init__(self, builder: Any, form: Form, words: Any) -> None:
        self._builder, self._form, self._words = builder, form, words
        self._bits = form.layout.bits
        self.vectors, self.each = SIZES[self._bits]
        self._spare = VECTOR % self._bits
        """Bits of a vector's words that belong to the codes that follow."""

    def of(self, at: Any, number: Any) -> list[Any]:
        """Return the codes of the number-th vector from the word `at` on, pair by pair."""
        if self._bits == 2:
            return self._half_vector(at, number)
        word = load(self._builder, self._words, [at, (number, VECTOR)], VECTOR)
        if self._form.layout.table is not None:
            return self._looked_up(word, self._form.layout.table)
        return [self._field(word, self._spare + self._bits * s) for s in range(self.each)]

    def _half_vector(self, at: Any, number: Any) -> list[Any]:
        """Return half the codes of a vector of 2 bit codes: all eight at once would not stay in registers."""
        builder = self._builder
        word = load(builder, self._words, [at, (builder.lshr(number, I64(1)), VECTOR)], VECTOR)
        shift = builder.trunc(builder.shl(builder.and_(number, I64(1)), I64(3)), I16)
        word = builder.lshr(word, broadcast(builder, shift, VECTOR))
        return [builder.and_(builder.lshr(word, _same(2 * s)), _same(3)) for s in range(self.each)]

    def last(self, at: Any, half: int) -> list[Any]:
        """Return the codes that follow those of the vectors; at: where the group's begin."""
        if not self._spare:
            return []
        kept = self._joined(at, half)
        if self._bits == 5:
            return [self._field(kept, 0)]
        if self._bits == 6:
            return [self._field(kept, 6), self._field(kept, 0)]
        word = load(self._builder, self._words, [at, 2 * VECTOR], VECTOR)
        upper = self._builder.shl(word, _same(8)) if half == 0 else word
        seventh = self._builder.ashr(self._builder.shl(upper, _same(6)), _same(13))
        seventh = self._builder.or_(self._builder.and_(seventh, _same(-2)), kept)
        return [self._field(upper, 13), self._field(upper, 10), seventh]

    def _joined(self, at: Any, half: int) -> Any:
        """Return the spare bits of all vectors in one, those of the first on top."""
        joined: Any = None
        for number in range(half * self.vectors, (half + 1) * self.vectors):
            word = load(self._builder, self._words, [at, number * VECTOR], VECTOR)
            bits = self._builder.and_(word, _same((1 << self._spare) - 1))
            joined = bits if joined is None else self._pushed(joined, bits)
        return joined

    def _pushed(self, joined: Any, bits: Any) -> Any:
        return self._builder.or_(self._builder.shl(joined, _same(self._spare)), bits)

    def _field(self, word: Any, at: int) -> Any:
        """Return the number whose bits begin at `at`."""
        top = VECTOR - at - self._bits
        if self._form.layout.signed:
            word = self._builder.shl(word, _same(top)) if top else word
            return self._builder.ashr(word, _same(VECTOR - self._bits))
        word = self._builder.lshr(word, _same(at)) if at else word
        return self._builder.and_(word, _same((1 << self._bits) - 1)) if top else word

    def _looked_up(self, word: Any, table: Sequence[int]) -> list[Any]:
        """Return the values of a vector of 4 bit codes: two at a time, in the halves of words."""
        codes = []
        for both in (word, self._builder.lshr(word, _same(4))):
            places = self._builder.and_(both, _same(0x0F0F))
            values = self._builder.bitcast(_look_up(self._builder, places, table), word.type)
            low = self._builder.ashr(self._builder.shl(values, _same(8)), _same(8))
            codes.append((low, self._builder.ashr(values, _same(8))))
        (first, third), (second, fourth) = codes
        return [first, second, third, fourth]


def _look_up(builder: Any, places: Any, table: Sequence[int]) -> Any:
    """Return the values at 32 places, int8."""
    count = 2 * VECTOR
    kind = ir.VectorType(I8, count)
    places = builder.bitcast(places, kind)
    if _shuffles():
        shuffle = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [kind, kind]), "llvm.x86.avx2.pshuf.b"
        )
        return builder.call(shuffle, [ir.Constant(kind, [*table] * 2), places])
    values = [ir.Constant(kind, [value] * count) for value in table]
    for bit in range(4):
        mask = ir.Constant(kind, [1 << bit] * count)
        there = builder.icmp_unsigned("==", builder.and_(places, mask), mask)
        values = [builder.select(there, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _shuffles() -> bool:
    """Return whether the machine looks up bytes in a table of 16."""
    return platform.machine() == "x86_64" and bool(llvmlite.binding.get_host_cpu_features().get("avx2"))


Scale = tuple[Any, Any]
"""Vectors of 8 outputs: what codes are multiplied by, and what is added, or None."""


class Scales:
    """What scales a block of a tile, as float32."""

    def __init__(self, builder: Any, form: Form, words: Any) -> None:
        self._builder, self._form, self._words = builder, form, words
        self._at: Any = None

    def of(self, at: Any) -> list[Scale]:
        """Return the scales of a block whose words begin at `at`, in the order of its inputs."""
        self._at = at
        form = self._form
        if form is Form.MXFP4:
            return [(self._power(), None)]
        d = self._half(0)
        if form in (Form.INT4, Form.Q5_1):
            return [(d, self._half(1))]
        if form.layout.groups == 1:
            return [(d, None)]
        if form is Form.Q6_K:
            return [(self._product(d, self._bytes(1 + i)), None) for i in range(16)]
        if form is Form.IQ4_XS:
            return [(self._product(d, small), None) for small in self._six_bits_of_8()]
        if form is Form.Q3_K:
            return [(self._product(d, small), None) for small in self._six_bits_of_16()]
        m = self._builder.fneg(self._half(1))
        both = self._bytes_of_16() if form is Form.Q2_K else self._scales_and_minimums()
        return [(self._product(d, scale), self._product(m, minimum)) for scale, minimum in both]

    def _bits(self, field: int, count: int) -> Any:
        return load(self._builder, self._words, [self._at, self._form.layout.field_words[field]], count)

    def _half(self, field: int) -> Any:
        """Load 8 numbers of float16."""
        halves = self._builder.bitcast(self._bits(field, LANES), ir.VectorType(ir.HalfType(), LANES))
        return self._builder.fpext(halves, ir.VectorType(F32, LANES))

    def _bytes(self, field: int) -> Any:
        """Load 8 signed bytes as int32."""
        numbers = self._builder.bitcast(self._bits(field, LANES // 2), ir.VectorType(I8, LANES))
        return self._builder.sext(numbers, ir.VectorType(I32, LANES))

    def _wide(self, field: int) -> Any:
        """Load four bytes of each output as int32."""
        return self._builder.bitcast(self._bits(field, 2 * LANES), ir.VectorType(I32, LANES))

    def _product(self, d: Any, small: Any) -> Any:
        return self._builder.fmul(d, self._builder.sitofp(small, ir.VectorType(F32, LANES)))

    def _power(self) -> Any:
        """Load powers of two: 2^(byte - 128)."""
        kind = ir.VectorType(I32, LANES)
        numbers = self._builder.bitcast(self._bits(0, LANES // 2), ir.VectorType(I8, LANES))
        exponent = self._builder.zext(numbers, kind)
        normal = self._builder.shl(self._builder.sub(exponent, _same32(1)), _same32(23))
        small = self._builder.shl(_same32(1 << 21), exponent)
        tiny = self._builder.icmp_unsigned("<", exponent, _same32(2))
        return self._builder.bitcast(self._builder.select(tiny, small, normal), ir.VectorType(F32, LANES))

    def _some(self, word: Any, at: int, mask: int) -> Any:
        """Return (word >> at) & mask; of a negative `at` shifted the other way."""
        if at:
            shift = self._builder.lshr if at > 0 else self._builder.shl
            word = shift(word, _same32(abs(at)))
        return self._builder.and_(word, _same32(mask))

    def _scales_and_minimums(self) -> list[Scale]:
        """Return the eight pairs of q4_k and q5_k (ggml-quants.c, get_scale_min_k4)."""
        a, b, c = (self._wide(field) for field in (2, 3, 4))
        found = [(self._some(a, 8 * g, 63), self._some(b, 8 * g, 63)) for g in range(4)]
        for g in range(4):
            scale = self._builder.or_(self._some(c, 8 * g, 15), self._some(a, 8 * g + 2, 48))
            minimum = self._builder.or_(self._some(c, 8 * g + 4, 15), self._some(b, 8 * g + 2, 48))
            found.append((scale, minimum))
        return found

    def _six_bits_of_8(self) -> list[Any]:
        low = self._wide(1)
        high = self._builder.zext(self._bits(2, LANES), ir.VectorType(I32, LANES))
        return [self._signed6(low, 4 * g, high, 2 * g) for g in range(8)]

    def _six_bits_of_16(self) -> list[Any]:
        a, b, c = (self._wide(field) for field in (1, 2, 3))
        return [
            self._signed6(b if i & 4 else a, 8 * (i % 4) + 4 * (i // 8), c, 8 * (i % 4) + 2 * (i // 4))
            for i in range(16)
        ]

    def _signed6(self, low: Any, at: int, high: Any, above: int) -> Any:
        """Return a number of 6 bits, less 32."""
        number = self._builder.or_(self._some(low, at, 15), self._some(high, above - 4, 48))
        return self._builder.sub(number, _same32(32))

    def _bytes_of_16(self) -> list[Scale]:
        rest = [self._wide(2 + i) for i in range(4)]
        return [
            (self._some(rest[i // 4], 8 * (i % 4), 15), self._some(rest[i // 4], 8 * (i % 4) + 4, 15))
            for i in range(16)
        ]


def _same(value: int) -> Any:
    return ir.Constant(ir.VectorType(I16, VECTOR), [value & 0xFFFF] * VECTOR)


def _same32(value: int) -> Any:
    return ir.Constant(ir.VectorType(I32, LANES), [value] * LANES)
