"""Which blocks leave host memory, decided from budgets alone.

Dense attention scans all blocks in the same order for every token, so recency says nothing about
the next use: an LRU smaller than the scan never hits. What counts is the share that stays, which is
the same whichever blocks stay. The oldest go first because sliding-window layers no longer read them.
A pure function: holdings in, spills out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Holding:
    """Sealed blocks of one sequence that lie in host memory only and are not on their way out."""

    blocks: tuple[range, ...]
    """Ascending, disjoint."""
    idle: bool = False
    """No request is running on the sequence."""


@dataclass(frozen=True)
class Spill:
    """Write blocks [first, first + count) of holdings[holding], all layers, as one run."""

    holding: int
    first: int
    count: int


def plan(holdings: Sequence[Holding], columns: int, run_blocks: int) -> list[Spill]:
    """Spills that free at least `columns` block columns (a block in every layer), or all that can be freed.

    Whole runs of `run_blocks` are taken first, always from the sequence that holds most; then short
    runs of idle sequences, then of running ones.
    """
    left = [list(holding.blocks) for holding in holdings]
    spills: list[Spill] = []
    idle = [i for i, holding in enumerate(holdings) if holding.idle]
    everyone = range(len(holdings))
    for candidates, shortest in ((everyone, run_blocks), (idle, 1), (everyone, 1)):
        while columns > 0 and (choice := _fullest(left, candidates, shortest)) is not None:
            spill = _take(left[choice], choice, shortest, run_blocks)
            spills.append(spill)
            columns -= spill.count
    return spills


def _fullest(left: list[list[range]], candidates: Iterable[int], shortest: int) -> int | None:
    able = [i for i in candidates if any(len(span) >= shortest for span in left[i])]
    return max(able, key=lambda i: (sum(map(len, left[i])), -i), default=None)


def _take(spans: list[range], holding: int, shortest: int, most: int) -> Spill:
    """Cut the oldest possible run off the spans, in place."""
    at = next(i for i, span in enumerate(spans) if len(span) >= shortest)
    span = spans[at]
    count = min(len(span), most)
    spans[at : at + 1] = [span[count:]] if len(span) > count else []
    return Spill(holding, span.start, count)
