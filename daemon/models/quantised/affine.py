"""Weights that are integers with a scale and a zero point for each group of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spilld.offload.kernels.linear.forms import GROUP, Form
from spilld.offload.kernels.linear.packed import Packed, fits, pack4, pack8, quantise

from .tensors import Floats

_HALF_ROUNDING = 2.0**-11
"""float16 keeps 11 bits: what rounding a number in its normal range changes at most, as a share of it."""


def unpack_bits(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Return the codes in words of 32 bits, the lowest bits first: [..., n] to [..., n * 32 / bits]."""
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = octets[..., None] >> shifts & np.uint8((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], -1)


@dataclass(frozen=True)
class Affine:
    """weight = (code - zero) * scale.

    Attributes:
        codes: [outputs, inputs] uint8 or int8.
        scales: [outputs, groups] float32.
        zeros: [outputs, groups] integers.
        groups: [inputs], the group of each input.
    """

    codes: NDArray[np.uint8] | NDArray[np.int8]
    scales: Floats
    zeros: NDArray[np.int16]
    groups: NDArray[np.int64]

    def dense(self) -> Floats:
        """See Decoded.dense. The difference is exact, the product rounded once."""
        numbers = self.codes.astype(np.float32)
        numbers -= self.zeros.astype(np.float32)[:, self.groups]
        numbers *= self.scales[:, self.groups]
        return numbers

    def packed(self) -> list[Packed] | None:
        """See Decoded.packed.

        The codes are kept if 32 inputs share a group and float16 holds the scales: then int4 differs by the
        rounding of scale * zero to 11 bits, and not at all where zero is a power of two, as in symmetric
        quantisation. Else int8, of the numbers.
        """
        if not fits(*self.codes.shape):
            return None
        kept = self._kept()
        return as_int8(self.dense()) if kept is None else [kept]

    def _kept(self) -> Packed | None:
        by_group = self.groups.reshape(-1, GROUP)
        if (by_group != by_group[:, :1]).any():
            return None
        scales, zeros = self.scales[:, by_group[:, 0]], self.zeros[:, by_group[:, 0]].astype(np.float32)
        with np.errstate(over="ignore"):
            if (scales.astype(np.float16).astype(np.float32) != scales).any():
                return None
            if self.codes.dtype == np.uint8 and self.codes.max(initial=0) < 16:
                minimums = -scales * zeros
                rounded = minimums.astype(np.float16).astype(np.float32)
                if not (np.abs(rounded - minimums) <= _HALF_ROUNDING * np.abs(minimums)).all():
                    return None
                return pack4(self.codes, scales, minimums)
        signed = self.codes.astype(np.int16)
        signed -= self.zeros[:, self.groups]
        if signed.min(initial=0) < -128 or signed.max(initial=0) > 127:
            return None
        return pack8(signed, scales)


@dataclass(frozen=True)
class Floating:
    """Weights in a form that has no packed one: [outputs, inputs] float32."""

    numbers: Floats

    def dense(self) -> Floats:
        """See Decoded.dense."""
        return self.numbers

    def packed(self) -> list[Packed] | None:
        """See Decoded.packed: int8, the nearest codes."""
        return as_int8(self.numbers)


def as_int8(numbers: Floats) -> list[Packed] | None:
    """Return the nearest int8 for each 32 inputs; None where they do not fit."""
    if numbers.ndim != 2 or not fits(*numbers.shape):
        return None
    try:
        return [quantise(numbers, Form.INT8)]
    except ValueError:  # beyond float16
        return None
