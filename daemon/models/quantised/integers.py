"""AWQ and GPTQ: codes packed into words of 32 bits, with packed zero points."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .affine import Affine, unpack_bits
from .config import Scheme
from .tensors import StoredTensors, StoredWeight, check

_SUFFIX = ".qweight"

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the code of each of 8 outputs is: AutoAWQ packs outputs 0, 2, 4, 6, 1, 3, 5, 7 into the
nibbles from the lowest on (awq/utils/packing_utils.py, AWQ_ORDER)."""


def awq(tensors: StoredTensors, stored: str, scheme: Scheme) -> StoredWeight | None:
    """Read AWQ, version "gemm".

    qweight is int32 [inputs, outputs / 8], qzeros int32 [groups, outputs / 8], scales float16
    [groups, outputs]; weight = (code - zero) * scale (AutoAWQ, awq/utils/packing_utils.py, dequantize_gemm).
    """
    if not stored.endswith(_SUFFIX):
        return None
    base = stored.removesuffix(_SUFFIX)
    (inputs, words) = _two(tensors, stored)
    shape = (words * 8, inputs)

    def decode() -> Affine:
        codes = unpack_bits(tensors.integers(stored, ("I32",)), 4)
        zeros = unpack_bits(tensors.integers(base + ".qzeros", ("I32",)), 4)
        scales = tensors.floats(base + ".scales")
        check(
            zeros.shape == scales.shape and scales.shape[1] == shape[0] and inputs % len(scales) == 0,
            base,
            f"zero points of {zeros.shape} and scales of {scales.shape} for {shape}",
        )
        codes, zeros = (_in_order(some).T for some in (codes, zeros))
        groups = np.arange(inputs) // (inputs // len(scales))
        return Affine(codes, np.ascontiguousarray(scales.T), zeros.astype(np.int16), groups)

    parts = frozenset({stored, base + ".qzeros", base + ".scales"})
    return StoredWeight(base + ".weight", shape, parts, decode)


def _in_order(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return codes.reshape(len(codes), -1, 8)[..., _AWQ_PLACES].reshape(codes.shape)


def gptq(tensors: StoredTensors, stored: str, scheme: Scheme) -> StoredWeight | None:
    """Read GPTQ, of 2, 4 or 8 bits.

    qweight is int32 [inputs * bits / 32, outputs], packed along the inputs; qzeros int32
    [groups, outputs * bits / 32]; scales float16 [groups, outputs]; g_idx int32 [inputs], the group of each
    input, which act-order mixes; weight = (code - zero) * scale. The first format stores zero - 1, in as many
    bits (AutoGPTQ, qlinear_cuda.py, forward; GPTQModel, utils/model.py, convert_gptq_v1_to_v2_format).
    """
    if not stored.endswith(_SUFFIX):
        return None
    base, bits = stored.removesuffix(_SUFFIX), scheme.bits
    (words, outputs) = _two(tensors, stored)
    shape = (outputs, words * 32 // bits)

    def decode() -> Affine:
        codes = unpack_bits(tensors.integers(stored, ("I32",)).T, bits)
        zeros = unpack_bits(tensors.integers(base + ".qzeros", ("I32",)), bits).astype(np.int16)
        if scheme.zero_minus_one:
            zeros = (zeros + 1) & ((1 << bits) - 1)
        scales = tensors.floats(base + ".scales")
        check(
            zeros.shape == scales.shape and scales.shape[1] == outputs,
            base,
            f"zero points of {zeros.shape} and scales of {scales.shape} for {shape}",
        )
        if base + ".g_idx" in tensors:
            groups = tensors.integers(base + ".g_idx", ("I32", "I64")).astype(np.int64)
        else:
            check(shape[1] % len(scales) == 0, base, f"{len(scales)} groups of {shape[1]} inputs")
            groups = np.arange(shape[1]) // (shape[1] // len(scales))
        check(groups.shape == shape[1:], base, f"groups of {groups.shape} inputs for {shape}")
        check(bool((groups >= 0).all() and (groups < len(scales)).all()), base, "a group that has no scale")
        return Affine(codes, np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T), groups)

    parts = {stored, base + ".qzeros", base + ".scales", base + ".g_idx"}
    return StoredWeight(base + ".weight", shape, frozenset(parts & {*tensors}), decode)


def _two(tensors: StoredTensors, stored: str) -> tuple[int, int]:
    shape = tensors.shape(stored)
    check(len(shape) == 2, stored, f"has a shape of {shape}")
    return shape[0], shape[1]
