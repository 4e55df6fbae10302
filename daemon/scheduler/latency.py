"""How long the tokens of running requests will take, from the steps that were seen.

A decode step takes a time of its own, some for each of its rows, and some for each byte of records that it
reads from host memory and from disk. These four are fitted to the last steps, to the least sum of squares of
the relative errors, none below 0. Pure: no clocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spilld.kv.visibility import stored_blocks

STEPS = 256
"""So many steps are remembered."""

GB = 1e9
"""Bytes are counted in these, so that all four numbers are of a kind."""

GUESSES = (0.1, 1.0)
"""What is thought of a tier that no step has read: seconds a GB of host memory, of disk."""

BELIEF = 0.1
"""The weight of a guess beside that of a step that was seen."""

ROUNDS = 200

Floats = NDArray[np.float64]


class Forecast:
    def __init__(self, windows: Sequence[int | None], record_bytes: int, host_bytes: int) -> None:
        """windows: of each layer, tokens that a query sees, None for all. host_bytes: records that memory
        holds; more are read from disk."""
        self._windows = windows
        self._record_bytes = record_bytes
        self._host_bytes = host_bytes
        self._seen: deque[tuple[float, float, float, float]] = deque(maxlen=STEPS)

    def took(self, rows: int, host_bytes: int, disk_bytes: int, seconds: float) -> None:
        """A step of so many decode rows, and nothing else, has read so much."""
        self._seen.append((float(rows), host_bytes / GB, disk_bytes / GB, max(seconds, 1e-6)))

    def token_s(self, lengths: Sequence[int]) -> float | None:
        """Seconds from one token to the next when sequences of these lengths decode together. None as long as
        no step was seen."""
        if not self._seen:
            return None
        records = sum(self._records(length) for length in lengths) * self._record_bytes
        host = min(records, self._host_bytes)
        step = np.array([1.0, len(lengths), host / GB, (records - host) / GB])
        return float(self._fit() @ step)

    def _records(self, length: int) -> int:
        """That the last token of a sequence reads, in all layers."""
        return sum(len(stored_blocks(length - 1, length - 1, window)) for window in self._windows)

    def _fit(self) -> Floats:
        rows, host, disk, seconds = np.array(self._seen).T
        steps = np.stack([np.ones_like(rows), rows, host, disk], axis=1) / seconds[:, None]
        guesses = BELIEF * np.pad(np.diag(1 / np.array(GUESSES)), ((0, 0), (2, 0)))
        wanted = np.concatenate([np.ones(len(steps)), np.full(len(guesses), BELIEF)])
        return _least_squares(np.concatenate([steps, guesses]), wanted)


def _least_squares(matrix: Floats, wanted: Floats) -> Floats:
    """x >= 0 with the least |matrix x - wanted|, by coordinate descent."""
    squares, products = matrix.T @ matrix, matrix.T @ wanted
    x = np.zeros(matrix.shape[1])
    for _ in range(ROUNDS):
        for i in range(len(x)):
            x[i] = max(0.0, x[i] + (products[i] - squares[i] @ x) / max(squares[i, i], 1e-30))
    return x
