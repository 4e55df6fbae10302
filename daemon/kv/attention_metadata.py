"""Visible KV: what the tokens of a batch item see, the same in every layer with one sliding window."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spilld.offload.block_table import RunRef
from spilld.offload.store.store import Store

from .attention_span import (
    SINKS,
    Sliding,
    boundary,
    lowest_visible,
    stored_blocks,
    window_ranges,
)
from .batch import BatchItem

Blocks = npt.NDArray[np.int64]
Positions = npt.NDArray[np.int64]


class VisibleKV:
    """Positions and blocks, each with the tier that has it when the step begins.

    Attributes:
        low: int64 [count]. Of what is stored, a query sees the positions low <= t < high.
        high: int64 [count].
        stored: Blocks that some query sees in stored form.
        in_host: Those of them that lie in host memory, ascending.
        on_disk: Runs of blocks on disk, oldest first, with those of their blocks that are not in host memory.
    """

    def __init__(self, item: BatchItem, sliding_window: Sliding, store: Store) -> None:
        self.item, self.sliding_window = item, sliding_window
        self.low: Positions = np.array(
            [max(SINKS, lowest_visible(position, sliding_window)) for position in item.positions]
        )
        self.high: Positions = np.array([boundary(position) for position in item.positions])
        self.stored = stored_blocks(item.position, item.last, sliding_window)
        table = item.sequence.table
        rows = table.rows[0, self.stored.start : self.stored.stop]
        self.in_host: Blocks = np.flatnonzero(rows >= 0) + self.stored.start
        self.on_disk: list[tuple[RunRef, Blocks]] = [
            (ref, table.extent_blocks(ref, self.stored)) for ref in store.runs_to_read(table, self.stored)
        ]
        self._ranges: dict[int, Positions] = {}

    def window_ranges(self, start: int, stop: int) -> Positions:
        """Return what queries at [start, stop) of one cell see of the KV window.

        Returns:
            Ranges of window offsets, int64 [queries, n, 2]; an empty range counts nothing.
        """
        if start not in self._ranges:
            seen = [window_ranges(position, self.sliding_window) for position in range(start, stop)]
            most = max(map(len, seen))
            padded = [[*ranges, *[(0, 0)] * (most - len(ranges))] for ranges in seen]
            self._ranges[start] = np.array(padded)
        return self._ranges[start]
