"""Attention of one query over a window, where the device is the CPU.

A window is a few hundred tokens, so one thread does it: waking a second costs more than its half of the work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

# Reassociation and fusing only: NaN and infinities keep their meaning.
_FAST = {"contract", "reassoc", "nsz"}

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
    _attend(q, k, v, ranges, np.float32(scale), np.float32(softcap), out, lse)


@intrinsic
def _number(_context: Any, element: Any) -> Any:
    """The float32 that an element is: itself, or bf16 bits in uint16."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if element == types.float32:
            return args[0]
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(args[0], word), word(16)), ir.FloatType())

    return types.float32(element), build


@intrinsic
def _power_of_two(_context: Any, _n: Any) -> Any:
    """2**n as float32, for int32 n from -126 to 127."""

    def build(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.add(args[0], word(127)), word(23)), ir.FloatType())

    return types.float32(types.int32), build


@njit(nogil=True, error_model="numpy", cache=True)
def _attend(q: Any, k: Any, v: Any, ranges: Any, scale: Any, softcap: Any, out: Any, lse: Any) -> None:
    group = len(q) // len(k)
    tokens = 0
    for r in range(len(ranges)):
        tokens += max(0, ranges[r, 1] - ranges[r, 0])
    weights = np.empty((group, tokens), np.float32)
    for head in range(len(k)):
        mine = slice(head * group, (head + 1) * group)
        done = 0
        for r in range(len(ranges)):
            for slot in range(ranges[r, 0], ranges[r, 1]):
                for g in range(group):
                    weights[g, done] = scale * _dot(q[head * group + g], k[head, slot])
                done += 1
        _softmax(weights, softcap, lse[mine])
        _mean(weights, v[head], ranges, out[mine])


@njit(nogil=True, error_model="numpy", cache=True)
def _softmax(logits: Any, softcap: Any, lse: Any) -> None:
    """Logits of each row to weights that add up to 1, or to 0 where there is no logit above -inf."""
    for g in range(len(logits)):
        row = logits[g]
        if softcap != 0:
            for t in range(len(row)):
                row[t] = softcap * (
                    np.float32(1) - np.float32(2) / (_exp(row[t] * (2 / softcap)) + np.float32(1))
                )
        top = np.float32(-np.inf)
        for t in range(len(row)):
            if not row[t] <= top:
                top = row[t]
        lse[g] = top
        centre = top if top != -np.inf else np.float32(0)
        for t in range(len(row)):
            row[t] = _exp(row[t] - centre)
        if top != -np.inf:
            total = _sum(row)
            lse[g] += np.log(total)
            for t in range(len(row)):
                row[t] /= total


@njit(nogil=True, fastmath=_FAST, error_model="numpy", cache=True)
def _dot(a: Any, b: Any) -> Any:
    result = np.float32(0)
    for d in range(len(a)):
        result += a[d] * _number(b[d])
    return result


@njit(nogil=True, fastmath=_FAST, error_model="numpy", cache=True)
def _sum(numbers: Any) -> Any:
    result = np.float32(0)
    for t in range(len(numbers)):
        result += numbers[t]
    return result


@njit(nogil=True, fastmath=_FAST, error_model="numpy", cache=True)
def _mean(weights: Any, v: Any, ranges: Any, out: Any) -> None:
    """out[g] = sum over visible slots of weight * v, four slots a pass: out is loaded once for four."""
    for g in range(len(out)):
        mean, weight = out[g], weights[g]
        for d in range(len(mean)):
            mean[d] = 0
        done = 0
        for r in range(len(ranges)):
            start, stop = ranges[r, 0], max(ranges[r, 0], ranges[r, 1])
            fours = start + (stop - start) // 4 * 4
            for slot in range(start, fours, 4):
                w0, w1, w2, w3 = weight[done], weight[done + 1], weight[done + 2], weight[done + 3]
                v0, v1, v2, v3 = v[slot], v[slot + 1], v[slot + 2], v[slot + 3]
                for d in range(len(mean)):
                    low = w0 * _number(v0[d]) + w1 * _number(v1[d])
                    mean[d] += low + (w2 * _number(v2[d]) + w3 * _number(v3[d]))
                done += 4
            for slot in range(fours, stop):
                w0, v0 = weight[done], v[slot]
                for d in range(len(mean)):
                    mean[d] += w0 * _number(v0[d])
                done += 1


@njit(nogil=True, error_model="numpy", cache=True)
def _exp(x: Any) -> Any:
    """exp of a float32 to 2 ulp; 0 below -87, infinity above 88, NaN of NaN. It vectorises, libm's does not.

    x = n ln 2 + r, |r| <= ln 2 / 2, ln 2 in two parts so that the first product is exact; the polynomial is
    that of Cephes' expf. No fastmath: LLVM would join the parts.
    """
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = (x - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
    y = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = (y * (r * r) + r + np.float32(1)) * _power_of_two(np.int32(n))
    if x > 88:
        y = np.float32(np.inf)
    if x < -87:
        y = np.float32(0)
    return y if x == x else x
