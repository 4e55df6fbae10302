"""The codec in plain numpy: the oracle that codec.py equals bit for bit. FORMAT.md states the arithmetic.

"Element arrays" are float32 for Element.FLOAT32 and uint16 (bfloat16 bits) for Element.BFLOAT16.
Inside, everything is float32; numpy rounds each operation once, as IEEE 754 asks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spilld.offload.record import (
    BLOCK,
    V4_GROUP,
    Element,
    Format,
    Layout,
)

F32 = npt.NDArray[np.float32]
Bf16 = npt.NDArray[np.uint16]
Array = npt.NDArray[Any]

NAN = np.uint16(0x7FC0)


def seal(layout: Layout, k: Array, v: Array, records: npt.NDArray[np.uint8], rows: Array) -> None:
    """Pack n blocks into records[rows[i]], every byte of them.

    k, v: element arrays [kv_heads, n*64, head_dim], any strides. records: uint8 [slots, record_bytes].
    """
    for i, row in enumerate(rows):
        tokens = slice(i * BLOCK, (i + 1) * BLOCK)
        with np.errstate(all="ignore"):
            planes = _planes(layout, k[:, tokens], v[:, tokens])
        records[row] = 0
        for name, plane in planes.items():
            offset, size = layout.plane(name)
            records[row, offset : offset + size] = np.ascontiguousarray(plane).view(np.uint8).reshape(-1)


def open(layout: Layout, records: npt.NDArray[np.uint8], rows: Array, k_out: F32, v_out: F32) -> None:  # noqa: A001
    """Unpack records[rows[i]] into float32 [kv_heads, n*64, head_dim], token-major."""
    for i, row in enumerate(rows):
        tokens = slice(i * BLOCK, (i + 1) * BLOCK)
        with np.errstate(all="ignore"):
            k_out[:, tokens], v_out[:, tokens] = values(layout, records[row])


def values(layout: Layout, record: npt.NDArray[np.uint8]) -> tuple[F32, F32]:
    """K and V of one record as float32 [kv_heads, 64, head_dim]."""
    k, v = stored(layout, record)
    return rotate(k) if layout.format is Format.INT4 else k, v


def stored(layout: Layout, record: npt.NDArray[np.uint8]) -> tuple[F32, F32]:
    """As values, but int4's keys are still rotated."""
    heads = layout.kv_heads
    if layout.format is Format.EXACT:
        dtype = np.dtype(np.float32 if layout.element is Element.FLOAT32 else np.uint16)
        k = widen(_codes(layout, record, "k_codes", dtype)).swapaxes(1, 2)
        return k, widen(_codes(layout, record, "v_codes", dtype))
    k_codes, v_codes = (_plane(layout, record, name) for name in ("k_codes", "v_codes"))
    k_scale, v_scale = (widen(_plane(layout, record, f"{name}_scales").view(np.uint16)) for name in "kv")
    if layout.format is Format.INT4:
        packed = k_codes.reshape(heads, -1, BLOCK).swapaxes(1, 2)
        k = _values4(layout, packed, k_scale.reshape(heads, -1, BLOCK, 2).swapaxes(1, 2))
    else:
        codes = k_codes.view(np.int8).reshape(heads, -1, BLOCK).astype(np.float32)
        k = (codes * k_scale.reshape(heads, 1, BLOCK)).swapaxes(1, 2)
    if layout.format is Format.INT8:
        codes = v_codes.view(np.int8).reshape(heads, BLOCK, -1).astype(np.float32)
        return k, codes * v_scale.reshape(heads, BLOCK, 1)
    return k, _values4(layout, v_codes.reshape(heads, BLOCK, -1), v_scale.reshape(heads, BLOCK, -1, 2))


def rotate(x: F32) -> F32:
    """The rotation of int4's keys, along the last axis."""
    size = 1 << (x.shape[-1].bit_length() - 1)
    turned, rest = x[..., :size], x[..., size:]
    span = 1
    while span < size:
        pairs = turned.reshape(*x.shape[:-1], -1, 2, span)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        turned = np.stack([a + b, a - b], axis=-2).reshape(*x.shape[:-1], size)
        span *= 2
    turned = turned * np.float32(1 / np.sqrt(size))
    turned = np.where(np.isnan(turned), np.float32(np.nan), turned)
    return np.concatenate([turned, rotate(rest)], axis=-1) if rest.shape[-1] else turned


def groups(layout: Layout) -> list[slice]:
    """The channels of each group of four bits."""
    starts = range(0, layout.head_dim, V4_GROUP)
    return [slice(start, min(start + V4_GROUP, layout.head_dim)) for start in starts]


def widen(x: Array) -> F32:
    """An element array as float32, exactly."""
    return x if x.dtype == np.float32 else (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_nearest(x: F32) -> Bf16:
    bits = np.ascontiguousarray(x).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.where(np.isnan(x), NAN, ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16))


def bf16_up(x: F32) -> Bf16:
    """The smallest bfloat16 >= x."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    away = np.where(np.signbit(x), np.uint32(0), np.uint32(0xFFFF))
    return np.where(np.isnan(x), NAN, ((bits + away) >> np.uint32(16)).astype(np.uint16))


def bf16_down(x: F32) -> Bf16:
    """The largest bfloat16 <= x."""
    return np.where(np.isnan(x), NAN, bf16_up(-x) ^ np.uint16(0x8000))


def _plane(layout: Layout, record: npt.NDArray[np.uint8], name: str) -> npt.NDArray[np.uint8]:
    offset, size = layout.plane(name)
    return record[offset : offset + size]


def _codes(layout: Layout, record: npt.NDArray[np.uint8], name: str, dtype: np.dtype[Any]) -> Array:
    tail = (layout.head_dim, BLOCK) if name == "k_codes" else (BLOCK, layout.head_dim)
    return _plane(layout, record, name).view(dtype).reshape(layout.kv_heads, *tail)


def _values4(layout: Layout, packed: Array, scales: F32) -> F32:
    """Values [heads, 64, head_dim] of packed codes [heads, 64, head_dim // 2] and (scale, minimum)
    [heads, 64, groups, 2]."""
    values = np.empty((*packed.shape[:2], layout.head_dim), np.float32)
    for g, channels in enumerate(groups(layout)):
        both = packed[..., channels.start // 2 : channels.stop // 2]
        codes = np.concatenate([both & np.uint8(15), both >> np.uint8(4)], axis=-1)
        values[..., channels] = codes.astype(np.float32) * scales[..., g, :1] + scales[..., g, 1:]
    return values


def _planes(layout: Layout, k_in: Array, v_in: Array) -> dict[str, Array]:
    """The planes of one block, each in the shape that record.py gives."""
    if layout.format is Format.EXACT:
        return {"k_codes": k_in.swapaxes(1, 2), "v_codes": v_in}
    k, v = widen(k_in), widen(v_in)
    if layout.format is Format.INT4:
        k_codes, k_scales = _int4(rotate(k))
        k_scales = k_scales.swapaxes(1, 2)
    else:
        k_codes, k_scales = _int8(k)
    v_codes, v_scales = (_int8 if layout.format is Format.INT8 else _int4)(v)
    planes = {"k_codes": k_codes.swapaxes(1, 2), "k_scales": k_scales}
    return planes | {"v_codes": v_codes, "v_scales": v_scales}


def _scale(x: F32) -> Bf16:
    scale = bf16_up(x)
    return np.where(np.isfinite(widen(scale)), scale, NAN)


def _quotient(x: F32, scale: F32) -> F32:
    """rint(x / scale), 0 where the scale is 0 or NaN."""
    usable = scale > 0
    return np.where(usable, np.rint(x / np.where(usable, scale, np.float32(1))), np.float32(0))


def _int8(x: F32) -> tuple[Array, Bf16]:
    """Codes [heads, 64, head_dim] and scales [heads, 64]."""
    scales = _scale(np.abs(x).max(axis=-1) / np.float32(127))
    return np.clip(_quotient(x, widen(scales)[..., None]), -127, 127).astype(np.int8), scales


def _int4(x: F32) -> tuple[Array, Bf16]:
    """Packed codes [heads, 64, head_dim // 2] and (scale, minimum) [heads, 64, groups, 2]."""
    packed, scales = [], []
    for start in range(0, x.shape[-1], V4_GROUP):
        part = x[..., start : start + V4_GROUP]
        low, high = _bounds(part, axis=-1)
        minima = bf16_down(low)
        minimum = widen(minima)
        steps = _scale((high - minimum) / np.float32(15))
        step, minimum = widen(steps)[..., None], minimum[..., None]
        codes = np.clip(_quotient(part - minimum, step), 0, 15).astype(np.uint8)
        half = part.shape[-1] // 2
        packed.append(codes[..., :half] | codes[..., half:] << np.uint8(4))
        scales.append(np.stack([steps, minima], axis=-1))
    return np.concatenate(packed, axis=-1), np.stack(scales, axis=2)


def _order(bits: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Bits of a float32 as an integer that sorts the same, -0 before +0; its own inverse."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


def _bounds(x: F32, axis: int) -> tuple[F32, F32]:
    """Minimum and maximum along an axis; both NaN if one number is."""
    order = _order(np.ascontiguousarray(x).view(np.int32))
    nan = np.isnan(x).any(axis=axis)
    low, high = (_order(bound(axis=axis)).view(np.float32) for bound in (order.min, order.max))
    return np.where(nan, np.float32(np.nan), low), np.where(nan, np.float32(np.nan), high)
