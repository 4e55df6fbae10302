"""Latency model: how long a token of the running requests will take, learnt from measured steps.

A decode step takes a fixed time, a time for each of its rows, and a time for each byte of records that it
reads from host memory and from disk. These four are fitted to the last steps by non-negative least squares of
the relative errors.

Pure: no clocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spilld.kv.attention_span import Sliding, stored_blocks

STEPS = 256
"""The newest steps, to which the model is fitted."""

GB = 1e9
"""Unit of bytes in the fit, so that all four coefficients are of one magnitude."""

GUESSES = (0.1, 1.0)
"""Prior of a tier that no step has read: seconds a GB of host memory, of disk."""

BELIEF = 0.1
"""Weight of a prior, where a measured step has 1."""

ROUNDS = 200
"""Number of sweeps of coordinate descent."""

Floats = NDArray[np.float64]


class LatencyModel:
    """Predicts the time of a decode step."""

    def __init__(self, windows: Sequence[Sliding], record_bytes: Sequence[int], host_bytes: int) -> None:
        """Create a model that has measured nothing.

        Args:
            windows: Of each layer, what hides older tokens.
            record_bytes: Of each layer, bytes of a block's record.
            host_bytes: Records that host memory holds, in bytes; more are read from disk.
        """
        self._layers = tuple(zip(windows, record_bytes, strict=True))
        self._host_bytes = host_bytes
        self._seen: deque[tuple[float, float, float, float]] = deque(maxlen=STEPS)

    def took(self, rows: int, host_bytes: int, disk_bytes: int, seconds: float) -> None:
        """Learn from a step of `rows` decode rows and no prefill, and the bytes that it read."""
        self._seen.append((float(rows), host_bytes / GB, disk_bytes / GB, max(seconds, 1e-6)))

    def token_s(self, lengths: Sequence[int]) -> float | None:
        """Return the expected seconds between tokens when sequences of these lengths decode together.

        Returns:
            None before any step was measured.
        """
        if not self._seen:
            return None
        nbytes = sum(self._read_bytes(length) for length in lengths)
        host = min(nbytes, self._host_bytes)
        step = np.array([1.0, len(lengths), host / GB, (nbytes - host) / GB])
        return float(self._fit() @ step)

    def _read_bytes(self, length: int) -> int:
        """Return the bytes of records that the last token of a sequence reads, in all layers."""
        last = length - 1
        return sum(nbytes * len(stored_blocks(last, last, window)) for window, nbytes in self._layers)

    def _fit(self) -> Floats:
        rows, host, disk, seconds = np.array(self._seen).T
        steps = np.stack([np.ones_like(rows), rows, host, disk], axis=1) / seconds[:, None]
        guesses = BELIEF * np.pad(np.diag(1 / np.array(GUESSES)), ((0, 0), (2, 0)))
        wanted = np.concatenate([np.ones(len(steps)), np.full(len(guesses), BELIEF)])
        return _least_squares(np.concatenate([steps, guesses]), wanted)


def _least_squares(matrix: Floats, wanted: Floats) -> Floats:
    """Minimise |matrix x - wanted| over x >= 0 by coordinate descent."""
    squares, products = matrix.T @ matrix, matrix.T @ wanted
    x = np.zeros(matrix.shape[1])
    for _ in range(ROUNDS):
        for i in range(len(x)):
            x[i] = max(0.0, x[i] + (products[i] - squares[i] @ x) / max(squares[i, i], 1e-30))
    return x
