"""Packs blocks into records and unpacks them. FORMAT.md states the arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spilld.offload.kernels.threads import check
from spilld.offload.record import (
    BLOCK,
    SEALED,
    Element,
    Layout,
    check_places,
)

from . import dequantise, quantise

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]

PLANES = ("k_codes", "k_scales", "v_codes", "v_scales")
FLOAT32 = np.dtype(np.float32)


class Codec:
    """Packs blocks into the records of one layout and unpacks them.

    The kernels run in parallel over (block, KV head) and release the GIL. They take arrays as bytes, so that
    one compiled version, made at the first call and cached on disk, serves every layout.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.dtype = FLOAT32 if layout.element is Element.FLOAT32 else np.dtype(np.uint16)
        self._planes = np.array([layout.plane(name) for name in PLANES], np.int64)
        self._form = SEALED.index(layout.format)

    def seal(self, k: Array, v: Array, records: Bytes, rows: Rows) -> None:
        """Pack n blocks, every byte of records[rows[i]]. NaN and infinity are stored as FORMAT.md says.

        Args:
            k: `[kv_heads, n * 64, head_dim]` in the layout's element (bfloat16 as the uint16 of its bits),
                last axis contiguous.
            v: Like k.
            records: `[slots, record_bytes] uint8`, C-contiguous.
            rows: `[n] int64`, distinct.

        Raises:
            ValueError: A shape, dtype, stride or row is not that; nothing was written.
            MemoryError: A part of the call got no memory; the records are undefined.
        """
        self._check_rows(records, rows)
        self._check_numbers(k, v, rows.size, self.dtype)
        if rows.size:
            units = 2 * rows.size * self.layout.kv_heads
            numbers = (*_flat(k), *_flat(v))
            check(quantise.seal(units, *numbers, records, rows, self._planes, self._form, *self._sizes))

    def open(self, memory: Bytes, places: Rows, k_out: Array, v_out: Array) -> None:
        """Unpack n records into k_out and v_out, every number written.

        Args:
            memory: `[bytes] uint8`, contiguous, 64-byte aligned.
            places: `[n] int64`, byte offsets of the records, multiples of 64.
            k_out: `[kv_heads, n * 64, head_dim] float32` whatever the layout's element is, last axis
                contiguous. Nothing is rounded to that element; `exact` bfloat16 is widened.
            v_out: Like k_out.

        Raises:
            ValueError: A shape, dtype, stride or place is not that; nothing was written.
            MemoryError: A part of the call got no memory; k_out and v_out are undefined.
        """
        check_places(memory, places, self.layout)
        self._check_numbers(k_out, v_out, places.size, FLOAT32)
        if places.size:
            outputs = (*_flat(k_out), *_flat(v_out))
            units, width = places.size * self.layout.kv_heads, self.layout.record_bytes
            where = (memory, places, width, *outputs)
            check(dequantise.open_records(units, *where, self._planes, self._form, *self._sizes))

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.layout.kv_heads, self.layout.head_dim, self.layout.element.nbytes

    def _check_rows(self, records: Bytes, rows: Rows) -> None:
        """Check that all rows are rows of the records, because the kernels check no bounds."""
        if rows.dtype != np.int64 or rows.ndim != 1 or not rows.flags.c_contiguous:
            raise ValueError("rows must be a contiguous int64 vector")
        width = self.layout.record_bytes
        if records.dtype != np.uint8 or records.shape[1:] != (width,) or not records.flags.c_contiguous:
            raise ValueError(f"records must be contiguous uint8[slots, {width}]")
        if rows.size and not (rows.min() >= 0 and rows.max() < len(records)):
            raise ValueError(f"rows {rows.min()}..{rows.max()} are not all in 0..{len(records) - 1}")

    def _check_numbers(self, k: Array, v: Array, blocks: int, dtype: np.dtype[Any]) -> None:
        shape = (self.layout.kv_heads, blocks * BLOCK, self.layout.head_dim)
        for name, array in (("k", k), ("v", v)):
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype}{array.shape}, expected {dtype}{shape}")
            strides, size = array.strides, array.itemsize
            if array.size and (strides[2] != size or any(s < 0 or s % size for s in strides)):
                raise ValueError(f"{name} has strides {strides}: the last axis must be contiguous")


def _flat(array: Array) -> tuple[Bytes, int, int]:
    """Return the bytes that a non-empty array spans, its head stride and its token stride in bytes."""
    span = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True))
    flat = np.lib.stride_tricks.as_strided(array, (span // array.itemsize + 1,), (array.itemsize,))
    return flat.view(np.uint8), array.strides[0], array.strides[1]
