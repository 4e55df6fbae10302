"""Operations of a step on its rows between products, on the CPU, without allocating."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from spilld.offload.kernels.threads import spreading, used
from spilld.offload.kernels.vectors import (
    F32,
    I32,
    address,
    broadcast,
    call,
    constant,
    exp,
    load,
    pointers,
    vector_address,
)

from .forms import GROUP

TOGETHER = 4
"""Rows that are multiplied together, unless there is one: memory is for a multiple of so many rows."""

ROWS_PER_UNIT = 8
"""Rows between products that one thread takes: a single decode row does not wake other threads."""

_LANES = 8
_LARGEST = 32767.0

Floats = NDArray[np.float32]

NOTHING: Floats = np.empty(0, np.float32)
"""Stands for a vector of factors that does not exist."""


class Inputs(NamedTuple):
    """Rows quantised for products with packed weights.

    They are int16 codes with a scale for each group of 32 numbers, and the sum of the group's numbers. One
    layer after another overwrites them. A number that is not finite makes its row's products NaN.
    """

    codes: NDArray[np.int16]
    scales: Floats
    sums: Floats
    halves: Floats
    """Sums of 16 numbers each."""
    numbers: Floats
    """Rows before they are quantised."""
    parts: int
    """Number of parts that the weights of a product are divided into, for the threads."""

    @classmethod
    def of(cls, rows: int, width: int) -> Inputs:
        """Allocate memory for rows.

        Args:
            rows: The most rows, a multiple of TOGETHER.
            width: The most numbers of a row, a multiple of 32.
        """
        groups = (rows, width // GROUP)
        return cls(
            codes=np.zeros((rows, width), np.int16),
            scales=np.zeros(groups, np.float32),
            sums=np.zeros(groups, np.float32),
            halves=np.zeros((rows, 2 * groups[1]), np.float32),
            numbers=np.zeros((rows, width), np.float32),
            parts=4 * used(),
        )


_plain = njit(nogil=True, error_model="numpy", cache=True)
_sums = njit(nogil=True, error_model="numpy", cache=True, fastmath={"reassoc", "contract", "nsz"})
"""For functions in which only the order of sums may change: NaN and infinities keep their meaning."""


_unit = njit(nogil=True, error_model="numpy")


@_plain
def take(x: Any, inputs: Any) -> None:
    """Quantise rows as they are: float32 [rows, width]."""
    _spread_take(_units(x), x, inputs)


@_unit
def _take(unit: Any, x: Any, inputs: Any) -> None:
    for r in _rows(unit, x):
        _quantise(x[r], inputs, r)


_spread_take = spreading(lambda: _take)


@_plain
def take_normed(x: Any, weight: Any, eps: Any, inputs: Any) -> None:
    """Quantise weight * x / rms(x), where rms(x)^2 = mean(x^2) + eps (Zhang and Sennrich 2019)."""
    _spread_take_normed(_units(x), x, weight, eps, inputs)


@_unit
def _take_normed(unit: Any, x: Any, weight: Any, eps: Any, inputs: Any) -> None:
    width = x.shape[1]
    for r in _rows(unit, x):
        factor, numbers = _inverse_rms(x[r], eps), inputs.numbers[r]
        for i in range(width):
            numbers[i] = x[r, i] * factor * weight[i]
        _quantise(numbers[:width], inputs, r)


_spread_take_normed = spreading(lambda: _take_normed)


@_plain
def take_gated(x: Any, gelu: Any, inputs: Any) -> None:
    """Quantise act(gate) * up of rows [gate, up]; act is SiLU, or GELU in its tanh form (Shazeer 2020)."""
    _spread_take_gated(_units(x), x, gelu, inputs)


@_unit
def _take_gated(unit: Any, x: Any, gelu: Any, inputs: Any) -> None:
    width = x.shape[1] // 2
    for r in _rows(unit, x):
        numbers = inputs.numbers[r]
        for i in range(0, width, _LANES):
            _gate8(x[r], i, i + width, gelu, numbers)
        _quantise(numbers[:width], inputs, r)


_spread_take_gated = spreading(lambda: _take_gated)


@_plain
def add_normed(x: Any, y: Any, weight: Any, eps: Any) -> None:
    """Add weight * y / rms(y) to x, row by row."""
    _spread_add_normed(_units(x), x, y, weight, eps)


@_unit
def _add_normed(unit: Any, x: Any, y: Any, weight: Any, eps: Any) -> None:
    for r in _rows(unit, x):
        factor = _inverse_rms(y[r], eps)
        for i in range(x.shape[1]):
            x[r, i] += y[r, i] * factor * weight[i]


_spread_add_normed = spreading(lambda: _add_normed)


@_plain
def rotate(heads: Any, first: Any, last: Any, cos: Any, sin: Any, weight: Any, eps: Any) -> None:
    """Apply RoPE (Su et al. 2021) in place to heads first <= h < last of heads [rows, heads, head_dim].

    cos, sin: float32 [rows, rotary], rotary <= head_dim. Unless weight is NOTHING, each head is first
    normalised as in take_normed.
    """
    _spread_rotate(_units(cos), heads, first, last, cos, sin, weight, eps)


@_unit
def _rotate(unit: Any, heads: Any, first: Any, last: Any, cos: Any, sin: Any, weight: Any, eps: Any) -> None:
    dim, half = heads.shape[2], cos.shape[1] // 2
    for r in _rows(unit, cos):
        for h in range(first, last):
            head = heads[r, h]
            if len(weight):
                factor = _inverse_rms(head, eps)
                for i in range(dim):
                    head[i] = head[i] * factor * weight[i]
            for i in range(half):
                a, b = head[i], head[half + i]
                head[i] = a * cos[r, i] - b * sin[r, i]
                head[half + i] = b * cos[r, half + i] + a * sin[r, half + i]


_spread_rotate = spreading(lambda: _rotate)


@_unit
def _units(x: Any) -> Any:
    """Return into how many units the rows of x are divided."""
    return (len(x) + ROWS_PER_UNIT - 1) // ROWS_PER_UNIT


@_unit
def _rows(unit: Any, x: Any) -> Any:
    return range(ROWS_PER_UNIT * unit, min(ROWS_PER_UNIT * (unit + 1), len(x)))


@_sums
def _inverse_rms(x: Any, eps: Any) -> Any:
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    return np.float32(1) / np.sqrt(total / np.float32(len(x)) + eps)


@_plain
def _quantise(x: Any, inputs: Any, row: Any) -> None:
    codes, scales, sums, halves = inputs.codes[row], inputs.scales[row], inputs.sums[row], inputs.halves[row]
    for group in range(len(x) // GROUP):
        sums[group] = _quantise32(x, group * GROUP, codes, scales, halves, group)


@intrinsic
def _quantise32(_context: Any, x: Any, start: Any, codes: Any, scales: Any, halves: Any, group: Any) -> Any:
    """Quantise 32 numbers from x[start] on, with one scale, and return scale * sum(codes).

    codes[start:start + 32] = round(x / scale), scales[group] = scale, halves[2 group + h] = the sums of both
    halves.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointers(context, builder, signature, args)
        numbers = load(builder, at[0], [args[1]], GROUP)
        size = call(builder, "llvm.fabs", numbers.type, numbers)
        largest = call(builder, "llvm.vector.reduce.fmaximum", F32, size)
        # NaN where the largest is infinite, too: infinity times a code of 0 is, times another it is not.
        scale = builder.fadd(builder.fdiv(largest, F32(_LARGEST)), builder.fmul(largest, F32(0.0)))
        some = builder.fcmp_ordered(">", scale, F32(0.0))
        inverse = builder.select(some, builder.fdiv(F32(1.0), scale), F32(0.0))
        scaled = builder.fmul(numbers, broadcast(builder, inverse, GROUP))
        rounded = call(builder, "llvm.rint", numbers.type, scaled)
        number = builder.fcmp_ordered("ord", rounded, rounded)
        rounded = builder.select(number, rounded, constant(0.0, GROUP))
        whole = builder.fptosi(rounded, ir.VectorType(ir.IntType(16), GROUP))
        builder.store(whole, vector_address(builder, address(builder, at[2], [args[1]]), GROUP), align=2)
        builder.store(scale, address(builder, at[3], [args[5]]))
        sums = []
        for half in range(2):
            places = [half * GROUP // 2 + i for i in range(GROUP // 2)]
            part = builder.shuffle_vector(
                rounded, rounded, ir.Constant(ir.VectorType(I32, len(places)), places)
            )
            sums.append(call(builder, "llvm.vector.reduce.fadd", F32, F32(0.0), part, flags=("reassoc",)))
            builder.store(builder.fmul(sums[half], scale), address(builder, at[4], [(args[5], 2), half]))
        return builder.fmul(builder.fadd(*sums), scale)  # the sums are whole numbers below 2^24: exact

    return types.float32(x, start, codes, scales, halves, group), build


@intrinsic
def _gate8(_context: Any, x: Any, gate: Any, up: Any, gelu: Any, out: Any) -> Any:
    """Compute out[gate:gate + 8] = g * sigmoid(s) * x[up:up + 8], g = x[gate:gate + 8].

    SiLU has s = g; GELU s = 2 sqrt(2 / pi) (g + 0.044715 g^3), as (1 + tanh(u)) / 2 = sigmoid(2 u).
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointers(context, builder, signature, args)
        g, factor = (load(builder, at[0], [args[i]], _LANES) for i in (1, 2))
        one = constant(1.0, _LANES)
        cubic = builder.fadd(one, builder.fmul(constant(0.044715, _LANES), builder.fmul(g, g)))
        argument = builder.fmul(g, builder.fmul(constant(1.5957691216057308, _LANES), cubic))
        s = builder.select(args[3], argument, g)
        sigmoid = builder.fdiv(one, builder.fadd(one, exp(builder, builder.fsub(constant(0.0, _LANES), s))))
        result = builder.fmul(builder.fmul(g, sigmoid), factor)
        builder.store(result, vector_address(builder, address(builder, at[4], [args[1]]), _LANES), align=4)
        return context.get_dummy_value()

    return types.void(x, gate, up, gelu, out), build


def padded(rows: int) -> int:
    """Return for how many rows memory is allocated: a multiple of TOGETHER."""
    return -(-rows // TOGETHER) * TOGETHER
