"""Attention spans: what a token sees depends on its position alone.

A query at position p sees the stored form of positions [SINKS, boundary(p)) and exact numbers
elsewhere up to itself; a sliding window W hides positions up to p - W, and a mask of chunks of C those
below C * floor(p / C). Chunks of prompts, load, restarts and prefix hits change none of this, so neither do
they change the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

CELL = 256
"""The grid: cell j holds positions [256 j, 256 j + 256)."""

SINKS = 64
BLOCK = 64
BLOCKS_PER_CELL = CELL // BLOCK

WINDOW_TOKENS = SINKS + 2 * CELL
"""A KV window holds the sinks, then two halves that take turns holding the cell that is being filled."""


class MaskChunks(NamedTuple):
    """A chunked mask (Llama 4): a query sees what lies in its own chunk of so many tokens."""

    size: int


Sliding = int | MaskChunks | None
"""What hides older tokens in a layer: a sliding window of so many, a chunked mask, or nothing."""


def boundary(position: int) -> int:
    """Return the position below which all positions, sinks excepted, are seen in stored form."""
    return max(0, (position // CELL - 1) * CELL)


def lowest_visible(position: int, sliding_window: Sliding) -> int:
    """Return the oldest position that a query sees in a layer with this sliding window."""
    if sliding_window is None:
        return 0
    if isinstance(sliding_window, MaskChunks):
        return position // sliding_window.size * sliding_window.size
    return max(0, position - sliding_window + 1)


def stored_blocks(first: int, last: int, sliding_window: Sliding) -> range:
    """Return the blocks of which queries at positions first..last (inclusive) see a token in stored form."""
    stop = boundary(last) // BLOCK
    start = max(1, lowest_visible(first, sliding_window) // BLOCK)
    return range(min(start, stop), stop)


def segments(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Split positions [start, stop) where the grid is crossed."""
    while start < stop:
        end = min(stop, (start // CELL + 1) * CELL)
        yield start, end
        start = end


def sealed_by(position: int) -> int:
    """Return how many blocks, block 0 included, are sealed once the token at `position` was computed."""
    return boundary(position) // BLOCK


def sealed_before(position: int) -> range:
    """Return the blocks that are sealed before the token at `position` is appended, mostly none.

    From there on a new cell takes their half of the KV window.
    """
    return range(max(1, sealed_by(position - 1)), sealed_by(position))


def highest_block(tokens: int) -> int:
    """Return the highest stored block of a sequence of so many tokens; 0 if it has none."""
    return max(0, boundary(tokens - 1) // BLOCK - 1)


def longest_with(blocks: int) -> int:
    """Return the most tokens a sequence can have whose highest stored block is at most `blocks`."""
    return ((blocks + 1) * BLOCK // CELL + 2) * CELL


def window_offset(position: int) -> int:
    """Return where in the KV window a position's K/V lies while its cell is one of the newest two."""
    return SINKS + position % (2 * CELL)


def window_offsets(position: int) -> tuple[int, ...]:
    """Return where in the KV window a new token goes.

    The sinks have two places while their cell is one of the newest two.
    """
    offset = window_offset(position)
    return (offset, position) if position < SINKS else (offset,)


def exact_ranges(position: int, sliding_window: Sliding) -> list[tuple[int, int]]:
    """Return position ranges [start, stop) that the query at `position` sees exactly, oldest first."""
    low, border = lowest_visible(position, sliding_window), boundary(position)
    cell = position // CELL * CELL
    ranges = [(0, min(SINKS, border)), (border, cell), (cell, position + 1)]
    return [(max(a, low), b) for a, b in ranges if max(a, low) < b]


def window_ranges(position: int, sliding_window: Sliding) -> list[tuple[int, int]]:
    """Return KV window offsets [start, stop) of what the query at `position` sees exactly, oldest first."""
    ranges = []
    for a, b in exact_ranges(position, sliding_window):
        start = a if boundary(position) and a < SINKS else window_offset(a)
        ranges.append((start, start + b - a))
    return ranges
