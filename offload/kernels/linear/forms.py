"""Forms of packed weights: how many bits a weight has, and where they and their scales lie.

A tile is 8 outputs. Its blocks follow one another: 32 inputs, or 256 in the forms that GGUF calls K-quants.
A block is uint16 words: first the codes of its groups of 32 inputs, then what scales them. The bits are those
of a GGUF block, in another order, so that a tile's block has as many bytes as 8 blocks of the file.

**Codes.** A vector is 16 words; its lane 2 o + e is for output o, and for inputs of parity e. A group has as
many vectors as a code has bits, and 16 pairs of inputs, 2 p + e, p = 0..15. "p at b" means that the code of
pair p lies in the bits from b on:

4 bits   vector j has p = 4 j + s at 4 s, s = 0..3
8 bits   vector j has p = 2 j + s at 8 s, s = 0..1
5 bits   vector j has p = 3 j + s at 1 + 5 s, s = 0..2, and at 0 bit 4 - j of p = 15
6 bits   vector 3 h + j has p = 8 h + 2 j + s at 4 + 6 s, s = 0..1, and at 0 four of the twelve bits, the
         upper ones first, that p = 8 h + 6 and p = 8 h + 7 make together; h = 0..1
3 bits   vector h has p = 8 h + s at 1 + 3 s, s = 0..4, and at 0 the lowest bit of p = 8 h + 7; vector 2 has
         at 8 h the two upper bits of p = 8 h + 7, at 8 h + 2 p = 8 h + 6 and at 8 h + 5 p = 8 h + 5; h = 0..1
2 bits   vector h has p = 8 h + s at 2 s, s = 0..7; h = 0..1

Codes are numbers, in two's complement where signed, or places in a table of values.

**Scales.** Of each field the 8 outputs' follow one another. Forms of 32 inputs have a float16 scale or, in
mxfp4, a power of two in a byte; int4 and q5_1 also a float16 minimum: weight = code * scale + minimum. Those
of 256 inputs have a float16 scale d, for q4_k, q5_k and q2_k another one for minimums, m, and small integers
for each 16 or 32 inputs, in the bytes of the GGUF block: weight = code * (d * scale) - m * minimum.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property

LANES = 8
"""Outputs of a tile."""

GROUP = 32
"""Inputs that rows are quantised by; weights share a scale among as many or half of them."""

VECTOR = 16
"""Words of a vector."""

FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the numbers of E2M1 (OCP Microscaling Formats 1.0, section 5.3.3)."""

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of llama.cpp's IQ4 types (ggml-common.h, kvalues_iq4nl)."""

Pieces = list[tuple[int, int, int, int, int]]


class Form(enum.StrEnum):
    """How weights are packed."""

    INT8 = "int8"
    INT4 = "int4"
    Q4_0 = "q4_0"
    Q5_0 = "q5_0"
    Q5_1 = "q5_1"
    IQ4_NL = "iq4_nl"
    MXFP4 = "mxfp4"
    Q2_K = "q2_k"
    Q3_K = "q3_k"
    Q4_K = "q4_k"
    Q5_K = "q5_k"
    Q6_K = "q6_k"
    IQ4_XS = "iq4_xs"

    @property
    def layout(self) -> FormLayout:
        """Where its bits lie."""
        return _LAYOUTS[self]

    @property
    def words(self) -> int:
        """uint16 words of a block of a tile, scales included."""
        return self.layout.words

    @property
    def block(self) -> int:
        """Inputs of a block."""
        return self.layout.block


@dataclass(frozen=True)
class CodeRun:
    """Some bits of the codes of neighbouring inputs of a group, in a GGUF block."""

    first: int
    """The first input."""
    count: int
    byte: int
    """The byte that has the first input's bits."""
    shift: int
    """Where they lie in it."""
    bits: int
    at: int = 0
    """The lowest of these bits in a code."""
    spread: bool = True
    """Each input has a byte; else each has the next bit of one byte."""


@dataclass(frozen=True)
class FormLayout:
    """A form in memory and in a GGUF file."""

    bits: int
    block: int
    runs: tuple[CodeRun, ...]
    fields: tuple[tuple[int, int], ...]
    """Of what scales a block: (byte, bytes) in a GGUF block, in the order of memory."""
    halves: int = 1
    """Numbers of scales of a group."""
    signed: bool = False
    table: tuple[int, ...] | None = None
    bias: int = 0
    """What GGUF adds to a code that is signed in memory: its highest bit."""

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.block // GROUP

    @property
    def code_words(self) -> int:
        """Words of the codes of a block."""
        return self.groups * self.bits * VECTOR

    @property
    def block_bytes(self) -> int:
        """Bytes of a GGUF block."""
        return self.block * self.bits // 8 + sum(size for _, size in self.fields)

    @property
    def words(self) -> int:
        """Words of a block of a tile."""
        return self.block_bytes * LANES // 2

    @property
    def pieces(self) -> Pieces:
        """Where the codes of a group lie: (pair, lowest bit in the code, vector, at which bit, how many)."""
        return _PIECES[self.bits]

    @cached_property
    def field_words(self) -> tuple[int, ...]:
        """Return the words of a block at which its fields begin."""
        sizes = [size * LANES // 2 for _, size in self.fields]
        return tuple(int(self.code_words + sum(sizes[:i])) for i in range(len(sizes)))


def _even(bits: int) -> Pieces:
    each = 16 // bits
    return [(p, 0, p // each, p % each * bits, bits) for p in range(16)]


def _five() -> Pieces:
    whole = [(3 * j + s, 0, j, 1 + 5 * s, 5) for j in range(5) for s in range(3)]
    return whole + [(15, 4 - j, j, 0, 1) for j in range(5)]


def _six() -> Pieces:
    whole = [
        (8 * h + 2 * j + s, 0, 3 * h + j, 4 + 6 * s, 6) for h in (0, 1) for j in range(3) for s in (0, 1)
    ]
    rest = [(6, 2, 0, 0, 4), (6, 0, 1, 2, 2), (7, 4, 1, 0, 2), (7, 0, 2, 0, 4)]
    return whole + [(8 * h + p, low, 3 * h + j, at, bits) for h in (0, 1) for p, low, j, at, bits in rest]


def _three() -> Pieces:
    whole = [(8 * h + s, 0, h, 1 + 3 * s, 3) for h in (0, 1) for s in range(5)]
    rest = [(5, 0, 5, 3), (6, 0, 2, 3), (7, 1, 0, 2)]
    upper = [(8 * h + p, low, 2, 8 * h + at, bits) for h in (0, 1) for p, low, at, bits in rest]
    return whole + upper + [(8 * h + 7, 0, h, 0, 1) for h in (0, 1)]


_PIECES: dict[int, Pieces] = {
    2: _even(2),
    3: _three(),
    4: _even(4),
    5: _five(),
    6: _six(),
    8: _even(8),
}


def _nibbles(byte: int) -> tuple[CodeRun, ...]:
    """Return 4 bit codes of 32 inputs: the lower halves of 16 bytes, then the upper."""
    return tuple(CodeRun(16 * h, 16, byte, 4 * h, 4) for h in (0, 1))


def _fifth(byte: int) -> tuple[CodeRun, ...]:
    return tuple(CodeRun(8 * k, 8, byte + k, 0, 1, at=4, spread=False) for k in range(4))


def _long(byte: int, bits: int, at: int = 0, run: int = 32) -> tuple[CodeRun, ...]:
    """Return codes of 256 inputs of which `run` bytes hold one after another a few bits of so many inputs."""
    each = 8 // bits
    starts = [(i, k) for i in range(256 // run) for k in range(0, run, 32)]
    return tuple(
        CodeRun(run * i + k, 32, byte + run * (i // each) + k, bits * (i % each), bits, at) for i, k in starts
    )


_K_FIELDS = ((0, 2), (2, 2), (4, 4), (8, 4), (12, 4))
"""Of q4_k and q5_k: d, m, and 12 bytes of scales and minimums."""

_LAYOUTS = {
    Form.INT8: FormLayout(8, 32, (CodeRun(0, 32, 2, 0, 8),), ((0, 2),), signed=True),
    Form.INT4: FormLayout(4, 32, _nibbles(4), ((0, 2), (2, 2))),
    Form.Q4_0: FormLayout(4, 32, _nibbles(2), ((0, 2),), signed=True, bias=8),
    Form.Q5_0: FormLayout(5, 32, _nibbles(6) + _fifth(2), ((0, 2),), signed=True, bias=16),
    Form.Q5_1: FormLayout(5, 32, _nibbles(8) + _fifth(4), ((0, 2), (2, 2))),
    Form.IQ4_NL: FormLayout(4, 32, _nibbles(2), ((0, 2),), table=IQ4),
    Form.MXFP4: FormLayout(4, 32, _nibbles(1), ((0, 1),), table=FP4),
    Form.Q2_K: FormLayout(
        2, 256, _long(16, 2), ((80, 2), (82, 2), (0, 4), (4, 4), (8, 4), (12, 4)), halves=2
    ),
    Form.Q3_K: FormLayout(
        3,
        256,
        _long(32, 2) + _long(0, 1, at=2),
        ((108, 2), (96, 4), (100, 4), (104, 4)),
        halves=2,
        signed=True,
        bias=4,
    ),
    Form.Q4_K: FormLayout(4, 256, _long(16, 4), _K_FIELDS),
    Form.Q5_K: FormLayout(5, 256, _long(48, 4) + _long(16, 1, at=4), _K_FIELDS),
    Form.Q6_K: FormLayout(
        6,
        256,
        _long(0, 4, run=64) + _long(128, 2, at=4),
        ((208, 2), *((192 + i, 1) for i in range(16))),
        halves=2,
        signed=True,
        bias=32,
    ),
    Form.IQ4_XS: FormLayout(
        4,
        256,
        tuple(
            CodeRun(32 * g + run.first, 16, run.byte, run.shift, 4)
            for g in range(8)
            for run in _nibbles(8 + 16 * g)
        ),
        ((0, 2), (4, 4), (2, 2)),
        table=IQ4,
    ),
}

GGUF_FORMS = {
    "Q4_0": Form.Q4_0,
    "Q4_1": Form.INT4,
    "Q5_0": Form.Q5_0,
    "Q5_1": Form.Q5_1,
    "Q8_0": Form.INT8,
    "Q2_K": Form.Q2_K,
    "Q3_K": Form.Q3_K,
    "Q4_K": Form.Q4_K,
    "Q5_K": Form.Q5_K,
    "Q6_K": Form.Q6_K,
    "IQ4_NL": Form.IQ4_NL,
    "IQ4_XS": Form.IQ4_XS,
    "MXFP4": Form.MXFP4,
}
"""Forms by the names of the GGUF types whose bits they keep."""
