"""Weights of linear layers, packed into few bits: a step of few rows takes as long as reading them does.

A thread reads memory in order. forms.py has where each bit lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .forms import GROUP, LANES, VECTOR, Form

Words = NDArray[np.uint16]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Packed:
    """A packed matrix. tiles: uint16 [outputs / 8, inputs / form.block, form.words], C-contiguous."""

    form: Form
    tiles: Words

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return len(self.tiles) * LANES

    @property
    def inputs(self) -> int:
        """Columns of the matrix."""
        return int(self.tiles.shape[1]) * self.form.block


def fits(outputs: int, inputs: int, form: Form = Form.INT8) -> bool:
    """Return whether a matrix of this shape can be packed."""
    return outputs % LANES == 0 and inputs % form.block == 0


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
    """Return the weights, float32 [outputs, inputs]: the numbers that the gguf package computes."""
    layout = packed.form.layout
    tiles, blocks, _ = packed.tiles.shape
    vectors = packed.tiles[..., : layout.code_words].reshape(
        tiles, blocks, layout.groups, layout.bits, VECTOR
    )
    codes = np.zeros((tiles, blocks, layout.groups, GROUP // 2, VECTOR), np.int16)
    for pair, low, vector, at, bits in layout.pieces:
        piece = vectors[..., vector, :] >> np.uint16(at) & np.uint16((1 << bits) - 1)
        codes[..., pair, :] |= (piece << np.uint16(low)).view(np.int16)
    if layout.table is not None:
        codes = np.array(layout.table, np.int16)[codes]
    elif layout.signed:
        codes = codes << (16 - layout.bits) >> (16 - layout.bits)
    codes = codes.reshape(tiles, blocks, -1, GROUP // 2 // layout.halves, LANES, 2)
    numbers = codes.transpose(0, 4, 1, 2, 3, 5).astype(np.float32)  # tile, output, block, scale, pair, parity
    with np.errstate(invalid="ignore", over="ignore"):
        scales, minimums = _scales(packed)
        numbers *= scales.transpose(0, 3, 1, 2)[..., None, None]
        if minimums is not None:
            numbers += minimums.transpose(0, 3, 1, 2)[..., None, None]
    return numbers.reshape(packed.outputs, packed.inputs)


def _scales(packed: Packed) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Return what codes are multiplied by, and what is added; float32 [tiles, blocks, scales, 8]."""
    form, layout = packed.form, packed.form.layout
    ends = [*layout.field_words[1:], form.words]
    fields: list[NDArray[Any]] = [
        np.ascontiguousarray(packed.tiles[..., first:last])
        for first, last in zip(layout.field_words, ends, strict=True)
    ]
    if form is Form.MXFP4:
        exponent = fields[0].view(np.uint8).astype(np.uint32)
        bits = np.where(exponent < 2, np.uint32(1 << 21) << exponent, (exponent - 1) << np.uint32(23))
        return bits.astype(np.uint32).view(np.float32)[..., None, :], None
    d = fields[0].view(np.float16).astype(np.float32)[..., None, :]
    if form in (Form.INT4, Form.Q5_1):
        return d, fields[1].view(np.float16).astype(np.float32)[..., None, :]
    if layout.groups == 1:
        return d, None
    if form is Form.Q6_K:
        return d * np.stack([field.view(np.int8) for field in fields[1:]], -2).astype(np.float32), None
    if form is Form.IQ4_XS:
        low, high = fields[1].view(np.uint32), fields[2].astype(np.uint32)
        small = [low >> 4 * g & 15 | (high >> 2 * g & 3) << 4 for g in range(8)]
        return d * _small(small, -32), None
    if form is Form.Q3_K:
        a, b, c = (field.view(np.uint32) for field in fields[1:])
        small = [
            (b if i & 4 else a) >> 8 * (i % 4) + 4 * (i // 8) & 15
            | (c >> 8 * (i % 4) + 2 * (i // 4) & 3) << 4
            for i in range(16)
        ]
        return d * _small(small, -32), None
    m = -fields[1].view(np.float16).astype(np.float32)[..., None, :]
    rest = [field.view(np.uint32) for field in fields[2:]]
    if form is Form.Q2_K:
        small = [rest[i // 4] >> 8 * (i % 4) & 255 for i in range(16)]
        return d * _small([both & 15 for both in small]), m * _small([both >> 4 for both in small])
    a, b, c = rest
    scales: list[NDArray[Any]] = [a >> 8 * g & 63 for g in range(4)]
    scales += [c >> 8 * g & 15 | a >> 8 * g + 2 & 48 for g in range(4)]
    minimums: list[NDArray[Any]] = [b >> 8 * g & 63 for g in range(4)]
    minimums += [c >> 8 * g + 4 & 15 | b >> 8 * g + 2 & 48 for g in range(4)]
    return d * _small(scales), m * _small(minimums)


def _small(numbers: Sequence[NDArray[Any]], add: int = 0) -> NDArray[Any]:
    """Return small integers as float32 [tiles, blocks, len(numbers), 8]."""
    return (np.stack(numbers, -2).astype(np.int32) + add).astype(np.float32)


def quantise(weight: Floats, form: Form) -> Packed:
    """Pack float32 [outputs, inputs] as the nearest codes; int4 spans each group's minimum to its maximum.

    Raises:
        ValueError: A number is not finite, or beyond float16; or the form is neither int8 nor int4.
    """
    if form not in (Form.INT8, Form.INT4):
        raise ValueError(f"nothing is quantised to {form}: only what is in a file already is kept so")
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
