"""Weights of linear layers, packed into few bits: a step of few rows takes as long as reading them does.

A tile is 8 outputs; its groups of 32 inputs follow one another, each with its codes and scales, so that a
thread reads memory in order. Everything is uint16 words:

int4   4 x 16 words of codes, then 8 scales, then 8 minimums (float16): weight = code * scale + minimum.
       Word j, lane 2 o + e holds the codes of output o for the inputs 8 j + 2 s + e, s = 0..3, in bits 4 s.
int8   8 x 16 words of codes, then 8 scales (float16): weight = code * scale. Word j, lane 2 o + e holds the
       signed codes of output o for the inputs 4 j + 2 s + e, s = 0..1, in bits 8 s.

Those of GGUF's Q4_0, Q4_1 and Q8_0 fit without a change: their groups are the same 32 inputs, their scales
the same float16.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES = 8
"""Outputs of a tile."""

GROUP = 32
"""Inputs that share a scale."""

Words = NDArray[np.uint16]
Floats = NDArray[np.float32]


class Form(enum.StrEnum):
    """Bits of a weight."""

    INT8 = "int8"
    INT4 = "int4"

    @property
    def words(self) -> int:
        """uint16 words of a group of a tile, scales included."""
        return {Form.INT8: 136, Form.INT4: 80}[self]


@dataclass(frozen=True)
class Packed:
    """A packed matrix. tiles: uint16 [outputs / 8, inputs / 32, form.words], C-contiguous."""

    form: Form
    tiles: Words

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return len(self.tiles) * LANES

    @property
    def inputs(self) -> int:
        """Columns of the matrix."""
        return int(self.tiles.shape[1]) * GROUP


def fits(outputs: int, inputs: int) -> bool:
    """Return whether a matrix of this shape can be packed."""
    return outputs % LANES == 0 and inputs % GROUP == 0


def stack(parts: Sequence[Packed]) -> Packed:
    """Stack the outputs of several matrices of one input and one form."""
    (form,) = {part.form for part in parts}
    return Packed(form, np.concatenate([part.tiles for part in parts]))


def pack4(codes: NDArray[Any], scales: NDArray[Any], minimums: NDArray[Any]) -> Packed:
    """Pack codes of four bits.

    Args:
        codes: `[outputs, inputs]`, 0 to 15.
        scales: `[outputs, inputs / 32]`, rounded to float16.
        minimums: `[outputs, inputs / 32]`, rounded to float16.
    """
    outputs, inputs = codes.shape
    by_lane = codes.reshape(outputs // LANES, LANES, inputs // GROUP, 4, 4, 2).astype(np.uint16)
    by_lane = by_lane.transpose(0, 2, 3, 1, 5, 4)  # tile, group, j, output, e, s
    words = np.zeros(by_lane.shape[:-1], np.uint16)
    for s in range(4):
        words |= by_lane[..., s] << np.uint16(4 * s)
    return _packed(Form.INT4, words, scales, minimums)


def pack8(codes: NDArray[Any], scales: NDArray[Any]) -> Packed:
    """Pack codes of eight bits.

    Args:
        codes: `[outputs, inputs]`, -128 to 127.
        scales: `[outputs, inputs / 32]`, rounded to float16.
    """
    outputs, inputs = codes.shape
    bits = codes.astype(np.int8).view(np.uint8).astype(np.uint16)
    by_lane = bits.reshape(outputs // LANES, LANES, inputs // GROUP, 8, 2, 2).transpose(0, 2, 3, 1, 5, 4)
    return _packed(Form.INT8, by_lane[..., 0] | by_lane[..., 1] << np.uint16(8), scales)


def _packed(form: Form, words: Words, *scales: NDArray[Any]) -> Packed:
    tiles, groups = words.shape[:2]
    planes = [
        plane.astype(np.float16).reshape(tiles, LANES, groups).transpose(0, 2, 1).view(np.uint16)
        for plane in scales
    ]
    return Packed(form, np.concatenate([words.reshape(tiles, groups, -1), *planes], axis=2))


def unpack(packed: Packed) -> Floats:
    """Return the weights, float32 [outputs, inputs]."""
    tiles, groups, _ = packed.tiles.shape
    planes = 2 if packed.form is Form.INT4 else 1
    words = packed.tiles[..., : -LANES * planes].reshape(tiles, groups, -1, LANES, 2)
    scales = packed.tiles[..., -LANES * planes :].copy().view(np.float16).astype(np.float32)
    if packed.form is Form.INT4:
        codes = np.stack([words >> np.uint16(4 * s) & np.uint16(15) for s in range(4)], -1).astype(np.float32)
    else:
        both = np.ascontiguousarray(words)[..., None].view(np.int8)  # little-endian: s = 0 first
        codes = both.astype(np.float32)
    codes = codes.transpose(0, 3, 1, 2, 5, 4).reshape(tiles, LANES, groups, GROUP)
    scale = scales[..., :LANES].transpose(0, 2, 1)[..., None]
    minimum = scales[..., LANES:].transpose(0, 2, 1)[..., None] if planes == 2 else np.float32(0)
    weights: Floats = (codes * scale + minimum).reshape(tiles * LANES, groups * GROUP)
    return weights


def quantise(weight: Floats, form: Form) -> Packed:
    """Pack float32 [outputs, inputs] as the nearest codes; int4 spans each group's minimum to its maximum.

    Raises:
        ValueError: A number is not finite, or beyond float16.
    """
    groups = weight.reshape(len(weight), -1, GROUP)
    if not np.abs(groups).max(initial=0) < np.finfo(np.float16).max:
        raise ValueError("weights beyond the range of float16 cannot be packed")
    if form is Form.INT8:
        scale = _half(np.abs(groups).max(-1) / 127)
        codes = np.rint(groups * _inverse(scale)).clip(-127, 127)
        return pack8(codes.reshape(weight.shape), scale[..., 0])
    low, high = _half(groups.min(-1)), groups.max(-1, keepdims=True)
    scale = _half((high - low)[..., 0] / 15)
    codes = np.rint((groups - low) * _inverse(scale)).clip(0, 15)
    return pack4(codes.reshape(weight.shape), scale[..., 0], low[..., 0])


def _half(numbers: Floats) -> Floats:
    """Rounded to float16, with an axis for the 32 inputs."""
    return numbers.astype(np.float16).astype(np.float32)[..., None]


def _inverse(scale: Floats) -> Floats:
    inverse: Floats = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    return inverse
