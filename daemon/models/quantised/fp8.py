"""FP8: weights in float8 (E4M3) with scales for blocks, for outputs or for the whole."""

from __future__ import annotations

import numpy as np

from spilld.errors import CorruptModel

from .affine import Floating
from .config import Scheme
from .tensors import Floats, StoredTensors, StoredWeight, check


def fp8(tensors: StoredTensors, stored: str, scheme: Scheme) -> StoredWeight | None:
    """Read float8 weights: weight * scale, of the block where there are blocks.

    A scale is weight_scale_inv (DeepSeek V3, inference/kernel.py, weight_dequant: it is multiplied by,
    whatever its name) or weight_scale (compressed-tensors, ModelOpt), with one number, one for each output
    or one for each block; blocks at the edges may be smaller. Scales as powers of two (ue8m0) are F8_E8M0.
    """
    if not stored.endswith(".weight") or tensors.dtype(stored) != "F8_E4M3":
        return None
    shape = tensors.shape(stored)
    check(len(shape) == 2, stored, f"float8 of {shape}: only matrices are read")
    names = [name for name in (f"{stored}_scale_inv", f"{stored}_scale") if name in tensors]
    if len(names) != 1:
        raise CorruptModel(f"{stored} is stored as float8 with {len(names)} scales instead of one")

    def decode() -> Floating:
        numbers = tensors.floats(stored)
        return Floating(_scaled(numbers, tensors.floats(names[0]), scheme.block, stored))

    return StoredWeight(stored, shape, frozenset({stored, names[0]}), decode)


def _scaled(numbers: Floats, scales: Floats, block: tuple[int, int], name: str) -> Floats:
    """Multiply in place."""
    if scales.size == 1:
        numbers *= scales.reshape(())
        return numbers
    if scales.ndim == 1:
        scales = scales[:, None]
    check(scales.ndim == 2, name, f"scales of {scales.shape}")
    rows, columns = (_block(*sizes, name) for sizes in zip(numbers.shape, scales.shape, block, strict=True))
    for at in range(len(scales)):
        wide = np.repeat(scales[at], columns)[: numbers.shape[1]]
        numbers[at * rows : (at + 1) * rows] *= wide
    return numbers


def _block(size: int, count: int, block: int, name: str) -> int:
    """Return how many numbers each of `count` scales is for: all, one, or a block."""
    if count == 1:
        return size
    if count == size:
        return 1
    check(-(-size // block) == count, name, f"{count} scales for {size} numbers, {block} to a block")
    return block
