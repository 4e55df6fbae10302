"""A decoder layer over packed weights: the kernels before and after its attention.

One description fits the families: norms before each half of a layer, in Gemma also after it; heads normed in
Qwen3 and Gemma3; a gated MLP. Activations are float32 throughout, in memory that is allocated once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .forms import LANES
from .products import Matrix, multiply_rows
from .row_operations import (
    Inputs,
    add_normed,
    rotate,
    take,
    take_gated,
    take_normed,
)

Floats = NDArray[np.float32]


class Layer(NamedTuple):
    """Weights of a layer; a norm or bias that its family lacks is NOTHING."""

    qkv: tuple[Matrix, Matrix, Matrix]
    """Parts whose outputs follow one another: of one form, or of several; what is not needed has no tiles."""
    bias: Floats
    out: Matrix
    gate_up: tuple[Matrix, Matrix]
    """Parts as of qkv."""
    down: Matrix
    before_attention: Floats
    after_attention: Floats
    before_mlp: Floats
    after_mlp: Floats
    q_norm: Floats
    k_norm: Floats


class Activations(NamedTuple):
    """Memory for the activations of a number of rows; a step uses the first of them."""

    inputs: Inputs
    x: Floats
    """The residual stream [rows, hidden]."""
    delta: Floats
    heads: Floats
    """Query, key and value heads [rows, heads + 2 kv_heads, head_dim]."""
    attended: Floats
    """[rows, heads, head_dim]"""
    gate_up: Floats

    @classmethod
    def of(
        cls, rows: int, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int
    ) -> Activations:
        """Allocate memory for so many rows, a multiple of TOGETHER."""

        def zeros(*shape: int) -> Floats:
            return np.zeros((rows, *shape), np.float32)

        return cls(
            inputs=Inputs.of(rows, max(hidden, heads * head_dim, intermediate)),
            x=zeros(hidden),
            delta=zeros(hidden),
            heads=zeros(heads + 2 * kv_heads, head_dim),
            attended=zeros(heads, head_dim),
            gate_up=zeros(2 * intermediate),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in (*self.inputs[:-1], *self[1:]))


_kernel = njit(nogil=True, error_model="numpy", cache=True)


@_kernel
def before_attention(layer: Any, rows: Any, cos: Any, sin: Any, eps: Any) -> None:
    """Compute rows.heads from rows.x; cos, sin: float32 [rows, rotary]."""
    count, heads = len(cos), rows.attended.shape[1]
    take_normed(rows.x[:count], layer.before_attention, eps, rows.inputs)
    flat = rows.heads.reshape(len(rows.heads), -1)
    for r in range(count):
        for i in range(flat.shape[1]):
            flat[r, i] = layer.bias[i] if len(layer.bias) else np.float32(0)
    _multiply_parts(rows.inputs, layer.qkv, flat, count)
    rotate(rows.heads, 0, heads, cos, sin, layer.q_norm, eps)
    rotate(rows.heads, heads, (heads + rows.heads.shape[1]) // 2, cos, sin, layer.k_norm, eps)


@_kernel
def after_attention(layer: Any, rows: Any, count: Any, eps: Any, gelu: Any) -> None:
    """Compute the next layer's rows.x from rows.x and rows.attended, for `count` rows."""
    take(rows.attended.reshape(len(rows.attended), -1)[:count], rows.inputs)
    _add(layer.out, layer.after_attention, rows, count, eps)
    take_normed(rows.x[:count], layer.before_mlp, eps, rows.inputs)
    _clear(rows.gate_up, count)
    _multiply_parts(rows.inputs, layer.gate_up, rows.gate_up, count)
    take_gated(rows.gate_up[:count], gelu, rows.inputs)
    _add(layer.down, layer.after_mlp, rows, count, eps)


@_kernel
def _add(weights: Any, norm: Any, rows: Any, count: Any, eps: Any) -> None:
    """Add a product, normed where the family does that, to the residual stream."""
    if len(norm) == 0:
        multiply_rows(rows.inputs, weights, rows.x, count)
        return
    _clear(rows.delta, count)
    multiply_rows(rows.inputs, weights, rows.delta, count)
    add_normed(rows.x[:count], rows.delta[:count], norm, eps)


@_kernel
def _multiply_parts(inputs: Any, parts: Any, out: Any, count: Any) -> None:
    """Add products with parts to the columns of `out` that follow one another."""
    first = 0
    for part in parts:
        last = first + LANES * part.tiles
        if part.tiles > 0:
            multiply_rows(inputs, part, out[:, first:last], count)
        first = last


@_kernel
def _clear(numbers: Any, count: Any) -> None:
    """Set the first rows to 0.

    By loops: of an assignment numba also compiles its error message, which takes seconds.
    """
    for r in range(count):
        for i in range(numbers.shape[1]):
            numbers[r, i] = 0
