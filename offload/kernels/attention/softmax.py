"""The online softmax of partial.py: running (maximum, sum of weights, weighted values), and how they merge.

A block's logits become weights relative to the maximum so far; when that rises, the sums so far are scaled
down (Milakov and Gimelshein 2018; Dao et al. 2022, section 3.1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from spilld.offload.kernels.bits import bf16_to_f32, inlined
from spilld.offload.record import BLOCK

from .tiles import cap64, exponentials64, maximum64

Floats = NDArray[np.float32]


def merge(out: Floats, lse: Floats, other_out: Floats, other_lse: Floats) -> None:
    """Merge another partial attention of the same queries into out and lse, in place.

    It is exact: lse is the logarithm of the sum of weights, so out becomes the mean of both weighted by
    exp(lse). A side with lse = -inf has seen nothing and changes nothing.

    Args:
        out: `[M, heads, head_dim] float32`, updated.
        lse: `[M, heads] float32`, updated.
        other_out: Like out.
        other_lse: Like lse.

    Raises:
        ValueError: Shapes disagree.
    """
    if out.shape != other_out.shape or lse.shape != other_lse.shape or out.shape[:2] != lse.shape:
        raise ValueError(f"cannot merge {other_out.shape}, {other_lse.shape} into {out.shape}, {lse.shape}")
    _merge(out, lse, other_out, other_lse)


@njit(nogil=True, error_model="numpy", cache=True)
def _merge(out: Any, lse: Any, other_out: Any, other_lse: Any) -> None:
    for m in range(lse.shape[0]):
        for h in range(lse.shape[1]):
            mine, theirs = lse[m, h], other_lse[m, h]
            if theirs == -np.inf:
                continue
            if mine == -np.inf:
                for d in range(out.shape[2]):
                    out[m, h, d] = other_out[m, h, d]
                lse[m, h] = theirs
                continue
            top = max(mine, theirs)
            a, b = np.exp(mine - top), np.exp(theirs - top)
            total = a + b
            a, b = a / total, b / total
            for d in range(out.shape[2]):
                out[m, h, d] = a * out[m, h, d] + b * other_out[m, h, d]
            lse[m, h] = top + np.log(total)


@njit(nogil=True, error_model="numpy", cache=True)
def join(sums: Any, tops: Any, totals: Any, out: Any, lse: Any) -> None:
    """Merge the parts of a call: sums [parts, kv_heads, rows, head_dim] into out [M, heads, head_dim]."""
    parts, kv_heads, _, head_dim = sums.shape
    group = lse.shape[1] // kv_heads
    mean = np.empty(head_dim, np.float32)
    for m in range(lse.shape[0]):
        for h in range(lse.shape[1]):
            head, row = h // group, m * group + h % group
            top = np.float32(-np.inf)
            for part in range(parts):
                if not tops[part, head, row] <= top:
                    top = tops[part, head, row]
            for d in range(head_dim):
                mean[d] = 0
            total = np.float32(0)
            if top != -np.inf:
                for part in range(parts):
                    weight = np.exp(tops[part, head, row] - top)
                    total += weight * totals[part, head, row]
                    for d in range(head_dim):
                        mean[d] += weight * sums[part, head, row, d]
                for d in range(head_dim):
                    mean[d] /= total
            for d in range(head_dim):
                out[m, h, d] = mean[d]
            lse[m, h] = top + np.log(total) if top != -np.inf else top


@inlined
def start(acc: Any, top: Any, total: Any, k_scale: Any, scale: Any) -> None:
    """Initialise the sums of all rows, and the factors of the keys' tokens with the scale."""
    for r in range(len(acc)):
        top[r], total[r] = -np.inf, 0
        for d in range(acc.shape[1]):
            acc[r, d] = 0
    for t in range(BLOCK):
        k_scale[t] = scale


@inlined
def seen(position: Any, low: Any, high: Any) -> Any:
    """Return the tokens [begin, end) of a block that a query sees; begin >= end for none."""
    return min(max(low - position, 0), BLOCK), min(max(high - position, 0), BLOCK)


@inlined
def visibility(position: Any, low: Any, high: Any) -> Any:
    """Return whether some query sees some of the block, and whether every query sees all of it."""
    some, whole = False, True
    for m in range(len(low)):
        begin, end = seen(position, low[m], high[m])
        some = some or begin < end
        whole = whole and begin == 0 and end == BLOCK
    return some, whole


@inlined
def read_scales(halves: Any, start: Any, factor: Any, out: Any) -> None:
    """Read the bfloat16 scales of a block's 64 tokens, times a factor."""
    for t in range(BLOCK):
        out[t] = factor * bf16_to_f32(halves[start + t])


@inlined
def multiply(numbers: Any, factors: Any) -> None:
    """Multiply rows of 64 numbers by the factors of their columns, in place."""
    for i in range(len(numbers)):
        for t in range(BLOCK):
            numbers[i, t] *= factors[t]


@inlined
def finish(logits: Any, k_scale: Any, softcap: Any) -> None:
    """Make logits of dot products: apply the scales of keys and the softcap."""
    multiply(logits, k_scale)
    if softcap != 0:
        for i in range(len(logits)):
            cap64(logits, i, softcap)


@inlined
def hide(logits: Any, first: Any, group: Any, position: Any, low: Any, high: Any) -> None:
    """Set logits to -inf where the queries of the rows from `first` on do not see the token."""
    for i in range(len(logits)):
        m = min((first + i) // group, len(low) - 1)
        begin, end = seen(position, low[m], high[m])
        for t in range(BLOCK):
            if t < begin or t >= end:
                logits[i, t] = -np.inf


@inlined
def soften(logits: Any, first: Any, top: Any, total: Any, acc: Any) -> None:
    """Take one step of the online softmax for the rows from `first` on.

    Logits become weights relative to top, which rises where it must.
    """
    for i in range(len(logits)):
        row, largest = first + i, maximum64(logits, i)
        if largest > top[row]:
            fade = np.exp(top[row] - largest)
            top[row] = largest
            total[row] *= fade
            for d in range(acc.shape[1]):
                acc[row, d] *= fade
        # A row that has seen nothing yet has no centre: -inf - -inf.
        centre = top[row] if top[row] != -np.inf else np.float32(0)
        total[row] += exponentials64(logits, i, centre)
        if total[row] != total[row]:
            top[row] = total[row]
