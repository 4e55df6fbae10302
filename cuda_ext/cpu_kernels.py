"""Attention of one query over a window, where the device is the CPU.

A window is a few hundred tokens, so one thread does it: waking a second costs more than its half of the work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from spilld.offload.bits import f32_to_bf16_nearest
from spilld.offload.lanes import dot_rows, weigh_tile
from spilld.offload.record import BLOCK
from spilld.offload.softmax import finish, soften, start

MAX_TILE = 7
"""Query heads that share a load of keys; of more, those of one KV head go in equal parts."""

KEY, VALUE = range(2)

Floats = NDArray[np.float32]


def attend_rows(
    q: Floats,
    k: NDArray[Any],
    v: NDArray[Any],
    ranges: NDArray[np.int64],
    scale: float,
    softcap: float,
    out: Floats,
    lse: Floats,
) -> None:
    """Attend from one query q [heads, head_dim] over slots of a window; writes out (like q) and lse [heads].

    k, v: [kv_heads, slots, head_dim], float32, or bf16 bits as uint16. ranges: int64 [r, 2], visible slots as
    disjoint [start, stop); an empty one counts nothing. Query head h reads KV head h // (heads / kv_heads).
    logit = scale * q.k, then softcap * tanh(logit / softcap) unless softcap is 0. Where nothing is visible
    out = 0 and lse = -inf; slots outside the ranges are never read. All arrays are C-contiguous. Raises
    ValueError if shapes disagree or a range leaves the window.
    """
    heads, head_dim = q.shape
    if k.shape != v.shape or k.ndim != 3 or k.shape[2] != head_dim or heads % k.shape[0]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit each other")
    if out.shape != q.shape or lse.shape != (heads,) or ranges.ndim != 2 or ranges.shape[1] != 2:
        raise ValueError(f"out {out.shape}, lse {lse.shape} or ranges {ranges.shape} do not fit q {q.shape}")
    if not all(array.flags.c_contiguous for array in (q, k, v, ranges, out, lse)):
        raise ValueError("every array must be C-contiguous")
    if len(ranges) and not 0 <= ranges.min() <= ranges.max() <= k.shape[1]:
        raise ValueError(f"ranges {ranges.tolist()} leave the window of {k.shape[1]} slots")
    _kernel(head_dim, _tile(heads // k.shape[0]))(
        q, k, v, ranges, np.float32(scale), np.float32(softcap), out, lse
    )


@cache
def _tile(group: int) -> int:
    return max(rows for rows in range(1, MAX_TILE + 1) if group % rows == 0)


@njit(nogil=True, error_model="numpy", cache=True)
def store_row(planes: Any, slot: Any, k: Any, v: Any) -> None:
    """Write float32 k, v [kv_heads, head_dim] to a slot of planes [2, kv_heads, slots, head_dim]: float32, or
    bf16 bits as uint16, rounded to the nearest."""
    for head in range(planes.shape[1]):
        for d in range(planes.shape[3]):
            if planes.itemsize == 4:
                planes[KEY, head, slot, d] = k[head, d]
                planes[VALUE, head, slot, d] = v[head, d]
            else:
                planes[KEY, head, slot, d] = f32_to_bf16_nearest(k[head, d])
                planes[VALUE, head, slot, d] = f32_to_bf16_nearest(v[head, d])


@cache
def _kernel(head_dim: int, tile: int) -> Callable[..., None]:
    """The loop for one head_dim and one number of rows that share keys. Only numbers are captured, as in
    partial.py."""

    @njit(nogil=True, error_model="numpy", cache=True)
    def kernel(q: Any, k: Any, v: Any, ranges: Any, scale: Any, softcap: Any, out: Any, lse: Any) -> None:
        kv_heads, slots, _ = k.shape
        keys, values = k.reshape(-1), v.reshape(-1)
        weights = np.empty((tile, BLOCK), np.float32)
        factors = np.empty(BLOCK, np.float32)
        largest, top = np.empty(tile, np.float32), np.empty(tile, np.float32)
        total = np.empty(tile, np.float32)
        for first in range(0, len(q), tile):
            head = first * kv_heads // len(q)
            rows, acc = q[first : first + tile], out[first : first + tile]
            start(acc, top, total, factors, scale)
            for r in range(len(ranges)):
                for slot in range(ranges[r, 0], ranges[r, 1], BLOCK):
                    count = min(BLOCK, ranges[r, 1] - slot)
                    at = (head * slots + slot) * head_dim
                    dot_rows(keys, at, count, rows, weights, head_dim, tile)
                    finish(weights, factors, softcap)
                    weights[:, count:] = -np.inf
                    soften(weights, largest, top, total, acc)
                    weigh_tile(values, at, weights, 0, count, acc, head_dim, tile)
            for i in range(tile):
                if top[i] != -np.inf:
                    acc[i] /= total[i]
                lse[first + i] = top[i] + np.log(total[i]) if top[i] != -np.inf else top[i]

    compiled: Callable[..., None] = kernel
    return compiled
