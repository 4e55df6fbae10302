"""Numbers as kernels take them, and records of them: float16, too, for which offload has no records."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spilld.offload.record import (
    BLOCK,
    Element,
    Format,
    Layout,
)

from ..offload import reference

Array = NDArray[Any]
F32 = NDArray[np.float32]


PLANES = ("k_codes", "k_scales", "v_codes", "v_scales")


class Number(enum.StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def nbytes(self) -> int:
        return 4 if self is Number.FLOAT32 else 2


@dataclass(frozen=True)
class HalfLayout(Layout):
    """A layout of bfloat16, the 16 bits of which are float16."""


def layout_of(form: Format, number: Number, head_dim: int, kv_heads: int = 2) -> Layout:
    if number is Number.FLOAT16:
        return HalfLayout(form, Element.BFLOAT16, kv_heads, head_dim)
    return Layout(form, Element(number), kv_heads, head_dim)


def number_of(layout: Layout) -> Number:
    return Number.FLOAT16 if isinstance(layout, HalfLayout) else Number(layout.element)


def integers(layout: Layout) -> dict[str, int]:
    """A record's layout as variant.py takes it."""
    return layout.constants | {"FLOAT16": int(isinstance(layout, HalfLayout))}


def narrow(x: F32, number: Number) -> Array:
    """The nearest numbers; bfloat16 as the uint16 of its bits. A NaN of 16 bits has a mantissa of ones."""
    if number is Number.FLOAT32:
        return x
    if number is Number.BFLOAT16:
        return np.where(np.isnan(x), np.uint16(0x7FFF), reference.bf16_nearest(x))
    with np.errstate(over="ignore"):
        halves = x.astype(np.float16)
    bits = halves.view(np.uint16)
    return np.where(np.isnan(x), bits | np.uint16(0x01FF), bits).view(np.float16)


def widen(x: Array) -> F32:
    return x.astype(np.float32) if x.dtype == np.float16 else reference.widen(x)


def seal(layout: Layout, k: Array, v: Array, records: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
    """As reference.seal; records of float16 are those of the same float32, but for exact numbers."""
    if not isinstance(layout, HalfLayout):
        return reference.seal(layout, k, v, records, rows)
    wide = Layout(layout.format, Element.FLOAT32, layout.kv_heads, layout.head_dim)
    sealed = np.empty((len(rows), wide.record_bytes), np.uint8)
    reference.seal(wide, widen(k), widen(v), sealed, np.arange(len(rows)))
    records[rows] = 0
    for name in PLANES:
        (to, size), (start, wide_size) = layout.plane(name), wide.plane(name)
        plane = sealed[:, start : start + wide_size]
        if size != wide_size:
            plane = narrow(np.ascontiguousarray(plane).view(np.float32), Number.FLOAT16).view(np.uint8)
        records[rows, to : to + size] = plane
    return None


def values(layout: Layout, record: NDArray[np.uint8]) -> tuple[F32, F32]:
    """As reference.values."""
    k, v = stored(layout, record)
    return reference.rotate(k) if layout.format is Format.INT4 else k, v


def stored(layout: Layout, record: NDArray[np.uint8]) -> tuple[F32, F32]:
    """As reference.stored."""
    if not isinstance(layout, HalfLayout) or layout.format is not Format.EXACT:
        return reference.stored(layout, record)
    k, v = (
        record[at : at + size].view(np.float16).astype(np.float32).reshape(layout.kv_heads, *shape)
        for (at, size), shape in (
            (layout.plane("k_codes"), (layout.head_dim, BLOCK)),
            (layout.plane("v_codes"), (BLOCK, layout.head_dim)),
        )
    )
    return k.swapaxes(1, 2), v
