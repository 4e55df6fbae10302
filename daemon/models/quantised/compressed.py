"""compressed-tensors: integers packed into words or one a byte, float8, FP4."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .affine import Affine, unpack_bits
from .config import Scheme
from .fp4 import packed_fp4
from .fp8 import fp8
from .tensors import StoredTensors, StoredWeight, check


def compressed(tensors: StoredTensors, stored: str, scheme: Scheme) -> StoredWeight | None:
    """Read a weight in whichever of its formats it is stored."""
    for read in (_packed_integers, _integers, packed_fp4, fp8):
        if (found := read(tensors, stored, scheme)) is not None:
            return found
    return None


def _packed_integers(tensors: StoredTensors, stored: str, scheme: Scheme) -> StoredWeight | None:
    """Read "pack-quantized".

    weight_packed is int32 [outputs, inputs * bits / 32], packed along the inputs from the lowest bits on,
    with 2^(bits - 1) added to each code; weight_scale [outputs, groups]; weight_zero_point, if any, int32
    [outputs * bits / 32, groups], packed along the outputs and as much added; weight_shape the true sizes;
    weight_g_idx, if any, the group of each input. weight = (code - zero) * scale
    (compressed_tensors, compressors/quantized_compressors/pack_quantized.py).
    """
    if not stored.endswith(".weight_packed") or tensors.dtype(stored) != "I32":
        return None
    base = stored.removesuffix("_packed")
    said = tensors.integers(f"{base}_shape", ("I64", "I32")).ravel().tolist()
    rows, words = tensors.shape(stored)
    check(len(said) == 2 and said[0] == rows and said[1] > 0, base, f"a shape of {said} in {rows} rows")
    outputs, inputs = said
    bits = next((bits for bits in (4, 8) if -(-inputs * bits // 32) == words), 0)
    check(bits > 0, base, f"{inputs} inputs in {words} words: only codes of 4 and of 8 bits are read")

    def decode() -> Affine:
        codes = unpack_bits(tensors.integers(stored, ("I32",)), bits)[:, :inputs]
        scales = tensors.floats(f"{base}_scale")
        zeros = np.full(scales.shape, 1 << bits - 1, np.int16)
        if f"{base}_zero_point" in tensors:
            words = tensors.integers(f"{base}_zero_point", ("I32",))
            zeros = unpack_bits(words.T, bits).T[:outputs].astype(np.int16)
        return _affine(tensors, base, codes, scales, zeros)

    rest = ("_packed", "_scale", "_zero_point", "_shape", "_g_idx")
    parts = frozenset({base + end for end in rest} & {*tensors})
    return StoredWeight(base, (outputs, inputs), parts, decode)


def _integers(tensors: StoredTensors, stored: str, scheme: Scheme) -> StoredWeight | None:
    """Read "int-quantized": weight is int8 [outputs, inputs], weight_zero_point of the scales' shape."""
    if not stored.endswith(".weight") or tensors.dtype(stored) != "I8":
        return None
    shape = tensors.shape(stored)
    check(len(shape) == 2, stored, f"has a shape of {shape}")

    def decode() -> Affine:
        codes, scales = tensors.integers(stored, ("I8",)), tensors.floats(f"{stored}_scale")
        zeros = np.zeros(scales.shape, np.int16)
        if f"{stored}_zero_point" in tensors:
            zeros = tensors.integers(f"{stored}_zero_point", ("I8",)).astype(np.int16)
        return _affine(tensors, stored, codes, scales, zeros)

    rest = ("", "_scale", "_zero_point", "_g_idx")
    return StoredWeight(stored, shape, frozenset({stored + end for end in rest} & {*tensors}), decode)


def _affine(
    tensors: StoredTensors,
    base: str,
    codes: NDArray[np.uint8] | NDArray[np.int8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.int16],
) -> Affine:
    outputs, inputs = codes.shape
    check(zeros.shape == scales.shape, base, f"zero points of {zeros.shape}, scales of {scales.shape}")
    if scales.ndim < 2:
        scales, zeros = scales.reshape(-1, 1), zeros.reshape(-1, 1)
    check(scales.shape[0] in (1, outputs) and scales.ndim == 2, base, f"scales of {scales.shape}")
    count = scales.shape[1]
    if f"{base}_g_idx" in tensors:
        groups = tensors.integers(f"{base}_g_idx", ("I32", "I64")).astype(np.int64)
        check(groups.shape == (inputs,), base, f"groups of {groups.shape} inputs")
        check(bool((groups >= 0).all() and (groups < count).all()), base, "a group that has no scale")
    else:
        check(inputs % count == 0, base, f"{count} groups of {inputs} inputs")
        groups = np.arange(inputs) // (inputs // count)
    wide = (outputs, count)
    return Affine(codes, np.broadcast_to(scales, wide), np.broadcast_to(zeros, wide), groups)
