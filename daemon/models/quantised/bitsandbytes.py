"""bitsandbytes: nf4 and fp4 by a table, and int8 by rows."""

from __future__ import annotations

import json
import math

import numpy as np

from spilld.errors import CorruptModel

from .affine import Affine, Floating
from .config import Scheme
from .tensors import Floats, StoredTensors, StoredWeight, check

_STATE = ".quant_state.bitsandbytes__"
_LARGEST_BLOCK = 1 << 16
"""bitsandbytes' own are of 4096 at most: what is repeated so often stays small."""


def bitsandbytes(tensors: StoredTensors, stored: str, scheme: Scheme) -> StoredWeight | None:
    """Read a weight of four or of eight bits."""
    if not stored.endswith(".weight"):
        return None
    if tensors.dtype(stored) == "I8":
        return _eight(tensors, stored)
    if tensors.dtype(stored) == "U8":
        return _four(tensors, stored)
    return None


def _eight(tensors: StoredTensors, stored: str) -> StoredWeight:
    """Read LLM.int8(): weight is int8 [outputs, inputs], SCB float32 [outputs]: weight * SCB / 127.

    Outliers are of activations only (bitsandbytes, functional.py, int8_vectorwise_dequant).
    """
    base = stored.removesuffix(".weight")
    shape = tensors.shape(stored)
    check(len(shape) == 2, stored, f"has a shape of {shape}")

    def decode() -> Affine:
        layout = f"{base}.weight_format"
        if layout in tensors:
            check(not tensors.integers(layout, ("U8",)).any(), stored, "it is not stored by rows")
        scales = tensors.floats(f"{base}.SCB").reshape(-1, 1) * np.float32(1 / 127)
        check(len(scales) == shape[0], stored, f"{len(scales)} scales for {shape}")
        codes = tensors.integers(stored, ("I8",))
        return Affine(codes, scales, np.zeros(scales.shape, np.int16), np.zeros(shape[1], np.int64))

    parts = frozenset({stored, f"{base}.SCB", f"{base}.weight_format"} & {*tensors})
    return StoredWeight(stored, shape, parts, decode)


def _four(tensors: StoredTensors, stored: str) -> StoredWeight:
    """Read nf4 and fp4.

    weight is uint8 [n / 2, 1], of the flattened matrix, the first of two numbers in the upper half;
    quant_map float32 [16] their values; absmax what a block is multiplied by, float32, or with double
    quantisation uint8: nested_quant_map[absmax] * nested_absmax of its block + nested_offset
    (bitsandbytes, functional.py, QuantState and dequantize_4bit; QLoRA, section 3).
    """
    states = [name for name in (f"{stored}{_STATE}nf4", f"{stored}{_STATE}fp4") if name in tensors]
    if len(states) != 1:
        raise CorruptModel(f"{stored} has {len(states)} quant_states of nf4 or fp4 instead of one")
    shape, block, nested_block, offset = _state(tensors, states[0])
    ends = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
    parts = frozenset({stored, states[0], *(stored + end for end in ends)} & {*tensors})

    def decode() -> Floating:
        count = math.prod(shape)
        octets = tensors.integers(stored, ("U8",)).ravel()
        check(octets.size == -(-count // 2), stored, f"{octets.size} bytes for {count} numbers")
        scales = _absmax(tensors, stored, nested_block, offset)
        check(scales.size == -(-count // block), stored, f"{scales.size} scales for {count} numbers")
        table = tensors.floats(stored + ".quant_map").ravel()
        check(table.size == 16, stored, f"a table of {table.size} values")
        numbers = np.empty((octets.size, 2), np.float32)
        numbers[:, 0], numbers[:, 1] = table[octets >> 4], table[octets & 15]
        flat = numbers.ravel()[:count]
        flat *= np.repeat(scales, block)[:count]
        return Floating(flat.reshape(shape))

    return StoredWeight(stored, shape, parts, decode)


def _state(tensors: StoredTensors, name: str) -> tuple[tuple[int, int], int, int, float]:
    """Return shape, numbers of a block, scales of a block of scales, and what is added to scales."""
    try:
        state = json.loads(tensors.integers(name, ("U8",)).tobytes())
        outputs, inputs = map(int, state["shape"])
        block, nested = int(state["blocksize"]), int(state.get("nested_blocksize") or 256)
        offset = float(state.get("nested_offset") or 0)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, AttributeError) as error:
        raise CorruptModel(f"{name} is damaged: {error!r}") from error
    check(min(outputs, inputs) > 0, name, f"a shape of {outputs}, {inputs}")
    check(
        0 < min(block, nested) <= max(block, nested) <= _LARGEST_BLOCK, name, f"blocks of {block}, {nested}"
    )
    return (outputs, inputs), block, nested, offset


def _absmax(tensors: StoredTensors, stored: str, block: int, offset: float) -> Floats:
    name = f"{stored}.absmax"
    if name not in tensors or tensors.dtype(name) != "U8":
        return tensors.floats(name).ravel()
    codes = tensors.integers(name, ("U8",)).ravel()
    table = tensors.floats(f"{stored}.nested_quant_map").ravel()
    outer = tensors.floats(f"{stored}.nested_absmax").ravel()
    check(table.size == 256, stored, f"a table of scales with {table.size} values")
    check(outer.size == -(-codes.size // block), stored, f"{outer.size} scales of scales for {codes.size}")
    scales: Floats = table[codes] * np.repeat(outer, block)[: codes.size] + np.float32(offset)
    return scales
