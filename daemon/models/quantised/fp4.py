"""MXFP4 and NVFP4: numbers of four bits (E2M1) with scales for 32 and for 16 of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spilld.offload.kernels.linear.forms import FP4, GROUP, LANES
from spilld.offload.kernels.linear.packed import Packed
from spilld.offload.kernels.linear.repack import from_gguf

from .affine import Floating
from .config import Scheme
from .tensors import Floats, StoredTensors, StoredWeight, check

_VALUES = np.array(FP4, np.float32) / 2


@dataclass(frozen=True)
class Fp4Blocks:
    """weight = number * 2^(exponent - 127), one exponent for 32 inputs.

    Attributes:
        pairs: [..., outputs, blocks, 16] uint8, the even inputs in the lower halves.
        exponents: [..., outputs, blocks] uint8.
        transposed: The module has [experts, inputs, outputs].
    """

    pairs: NDArray[np.uint8]
    exponents: NDArray[np.uint8]
    transposed: bool

    def dense(self) -> Floats:
        """See Decoded.dense."""
        numbers = np.empty((*self.pairs.shape, 2), np.float32)
        numbers[..., 0], numbers[..., 1] = _VALUES[self.pairs & 15], _VALUES[self.pairs >> 4]
        numbers = np.ldexp(numbers, self.exponents.astype(np.int32)[..., None, None] - 127)
        numbers = numbers.reshape(*self.pairs.shape[:-2], -1)
        return np.ascontiguousarray(numbers.swapaxes(-1, -2)) if self.transposed else numbers

    def packed(self) -> list[Packed] | None:
        """See Decoded.packed: the same bits."""
        if self.pairs.shape[-3] % LANES:
            return None
        experts = self.pairs.reshape(-1, *self.pairs.shape[-3:])
        exponents = self.exponents.reshape(-1, *self.exponents.shape[-2:])
        return [_as_gguf(*both) for both in zip(experts, exponents, strict=True)]


def _as_gguf(pairs: NDArray[np.uint8], exponents: NDArray[np.uint8]) -> Packed:
    """Pack one matrix; a block of GGUF has the first 16 inputs in the lower halves of its 16 bytes."""
    codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(*pairs.shape[:2], 2, GROUP // 2)
    blocks = np.concatenate([exponents[..., None], codes[:, :, 0] | codes[:, :, 1] << 4], -1)
    return from_gguf(blocks.reshape(len(pairs), -1), "MXFP4")


def mxfp4(tensors: StoredTensors, stored: str, scheme: Scheme) -> StoredWeight | None:
    """Read the experts of gpt-oss.

    X_blocks is uint8 [experts, outputs, inputs / 32, 16], X_scales uint8 [experts, outputs, inputs / 32];
    X of the module is [experts, inputs, outputs] (OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4;
    transformers, integrations/mxfp4.py, convert_moe_packed_tensors).
    """
    if not stored.endswith("_blocks"):
        return None
    name = stored.removesuffix("_blocks")
    shape = tensors.shape(stored)
    check(len(shape) == 4 and shape[3] == GROUP // 2, stored, f"has a shape of {shape}")

    def decode() -> Fp4Blocks:
        exponents = tensors.integers(f"{name}_scales", ("U8",))
        check(exponents.shape == shape[:-1], name, f"scales of {exponents.shape} for blocks of {shape}")
        check(bool((exponents < 255).all()), name, "a scale that is no number")
        return Fp4Blocks(tensors.integers(stored, ("U8",)), exponents, transposed=True)

    whole = (shape[0], shape[2] * GROUP, shape[1])
    return StoredWeight(name, whole, frozenset({stored, f"{name}_scales"}), decode)


def packed_fp4(tensors: StoredTensors, stored: str, scheme: Scheme) -> StoredWeight | None:
    """Read FP4 linear layers of ModelOpt (X.weight) and compressed-tensors (X.weight_packed).

    NVFP4: uint8 [outputs, inputs / 2], the even inputs in the lower halves, weight_scale float8
    [outputs, inputs / 16], and one float32: weight = number * scale * weight_scale_2 (ModelOpt,
    torch/quantization/qtensor/nvfp4_tensor.py), or number * scale / weight_global_scale
    (compressed-tensors, compressors, nvfp4). compressed-tensors' MXFP4 has exponents, uint8
    [outputs, inputs / 32], and no third number.
    """
    base, _, kind = stored.rpartition(".")
    packed = kind == "weight_packed"
    if not packed and (kind != "weight" or f"{base}.weight_scale_2" not in tensors):
        return None
    if tensors.dtype(stored) != "U8":
        return None
    shape = tensors.shape(stored)
    check(len(shape) == 2, stored, f"has a shape of {shape}")
    whole = f"{base}.weight_global_scale" if packed else f"{base}.weight_scale_2"
    parts = frozenset({stored, f"{base}.weight_scale", whole} & {*tensors})
    outputs, inputs = shape[0], shape[1] * 2

    def decode() -> Floating | Fp4Blocks:
        pairs = tensors.integers(stored, ("U8",))
        if whole not in tensors:
            exponents = tensors.integers(f"{base}.weight_scale", ("U8",))
            check(exponents.shape == (outputs, inputs // GROUP), base, f"scales of {exponents.shape}")
            check(inputs % GROUP == 0 and bool((exponents < 255).all()), base, "a scale that is no number")
            return Fp4Blocks(pairs.reshape(*exponents.shape, -1), exponents, transposed=False)
        check(tensors.dtype(f"{base}.weight_scale") == "F8_E4M3", base, "scales that are no float8")
        scales, factor = tensors.floats(f"{base}.weight_scale"), tensors.floats(whole)
        check(scales.shape == (outputs, inputs // 16), base, f"scales of {scales.shape}")
        check(factor.size == 1 and bool((factor != 0).all()), base, f"{factor.size} factors instead of one")
        scales = scales / factor.reshape(()) if packed else scales * factor.reshape(())
        numbers = np.stack([_VALUES[pairs & 15], _VALUES[pairs >> 4]], -1).reshape(outputs, -1, 16)
        numbers *= scales[..., None]
        return Floating(numbers.reshape(outputs, inputs))

    return StoredWeight(f"{base}.weight", (outputs, inputs), parts, decode)
