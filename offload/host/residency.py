"""Which blocks leave host memory, decided from budgets alone.

Dense attention scans all blocks in the same order for every token, so recency says nothing about
the next use: an LRU smaller than the scan never hits. What counts is the share that stays, which is
the same whichever blocks stay. The oldest go first because sliding-window layers no longer read them.
A pure function: holdings in, spills out.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Holding:
    """Sealed blocks of one sequence that lie in host memory only and are not being written to disk."""

    blocks: tuple[range, ...]
    """Ascending and disjoint."""
    idle: bool = False
    """No request is running on the sequence."""


@dataclass(frozen=True)
class Spill:
    """Write blocks [first, first + count) of holdings[holding], all layers, as one run."""

    holding: int
    first: int
    count: int


def plan(holdings: Sequence[Holding], columns: int, run_blocks: int) -> list[Spill]:
    """Choose spills that free at least `columns` block columns (a block in every layer), or all there are.

    Whole runs of `run_blocks` are taken first, always from the sequence that holds most; then short
    runs of idle sequences, then of running ones. The work for a spill does not grow with the number of spans.
    """
    left = [_Left(index, holding, run_blocks) for index, holding in enumerate(holdings)]
    spills: list[Spill] = []
    idle = [one for one in left if holdings[one.index].idle]
    for candidates, runs in (
        (left, [one.whole for one in left]),
        (idle, [one.short for one in left]),
        (left, [one.short for one in left]),
    ):
        fullest = [one.key for one in candidates if runs[one.index]]
        heapq.heapify(fullest)
        while columns > 0 and fullest:
            _, index = heapq.heappop(fullest)
            spill = left[index].take(runs[index])
            spills.append(spill)
            columns -= spill.count
            if runs[index]:
                heapq.heappush(fullest, left[index].key)
    return spills


class _Left:
    """The remaining runs of one holding: whole ones and shorter ones, each the oldest first."""

    def __init__(self, index: int, holding: Holding, run_blocks: int) -> None:
        self.index = index
        self.blocks = sum(map(len, holding.blocks))
        self.whole: deque[range] = deque()
        self.short: deque[range] = deque()
        for span in holding.blocks:
            cut = span.stop - len(span) % run_blocks
            self.whole.extend(span[at : at + run_blocks] for at in range(0, cut - span.start, run_blocks))
            if cut < span.stop:
                self.short.append(range(cut, span.stop))

    @property
    def key(self) -> tuple[int, int]:
        """Sorts the fullest first, and equally full ones in their order."""
        return -self.blocks, self.index

    def take(self, runs: deque[range]) -> Spill:
        run = runs.popleft()
        self.blocks -= len(run)
        return Spill(self.index, run.start, len(run))
