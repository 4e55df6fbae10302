"""The rotation of keys before they become codes of four bits: a fast Walsh-Hadamard transform.

It spreads outliers of one channel over all channels. It is orthonormal, so that products of queries and keys
that are rotated alike are unchanged, and it is its own inverse up to rounding. FORMAT.md states the
arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spilld.offload.kernels.bits import device


@device
def rotate(x: Any, lanes: Any) -> None:
    """Rotate `lanes` vectors in place. x: float32 [channels, lanes], flat; a lane is one vector."""
    first = 0
    while first < len(x):
        size = lanes
        while 2 * size <= len(x) - first:
            size *= 2
        span = lanes
        while span < size:
            for start in range(first, first + size, 2 * span):
                _butterflies(x[start : start + span], x[start + span : start + 2 * span])
            span *= 2
        _scale(x[first : first + size], np.float32(1 / np.sqrt(size // lanes)))
        first += size


@device
def _butterflies(a: Any, b: Any) -> None:
    for i in range(len(a)):
        a[i], b[i] = a[i] + b[i], a[i] - b[i]


@device
def _scale(x: Any, factor: Any) -> None:
    for i in range(len(x)):
        y = x[i] * factor
        x[i] = y if y == y else np.float32(np.nan)
