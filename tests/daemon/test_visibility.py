"""The visibility rule: what each query sees, and that what it sees is where it is looked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spilld.kv.attention_span import (
    BLOCK,
    CELL,
    SINKS,
    WINDOW_TOKENS,
    MaskChunks,
    Sliding,
    boundary,
    exact_ranges,
    highest_block,
    longest_with,
    lowest_visible,
    sealed_before,
    sealed_by,
    segments,
    stored_blocks,
    window_offset,
)

POSITIONS = st.integers(0, 5000)
WINDOWS = st.none() | st.integers(1, 1500) | st.integers(1, 1500).map(MaskChunks)


@given(POSITIONS, st.integers(0, 2000))
def test_segments_partition_and_stay_within_a_cell(start: int, count: int) -> None:
    parts = list(segments(start, start + count))
    assert [p for a, b in parts for p in range(a, b)] == list(range(start, start + count))
    assert all(a // CELL == (b - 1) // CELL for a, b in parts)


@given(POSITIONS, WINDOWS)
def test_a_query_sees_every_position_once(position: int, window: Sliding) -> None:
    """Stored below 256 * floor(p / 256) - 256 except the sinks, exact from there on: the rule of DESIGN 3."""
    if isinstance(window, MaskChunks):
        low = position - position % window.size
    else:
        low = 0 if window is None else max(0, position - window + 1)
    border = max(0, 256 * (position // 256) - 256)
    seen = range(low, position + 1)
    exact = [p for a, b in exact_ranges(position, window) for p in range(a, b)]
    assert exact == [p for p in seen if p < SINKS or p >= border]
    blocks = stored_blocks(position, position, window)
    stored = {p for p in seen if SINKS <= p < border}
    assert stored <= {p for block in blocks for p in range(block * BLOCK, (block + 1) * BLOCK)}
    assert {p // BLOCK for p in stored} == set(blocks), "a block is read of which nothing is seen"


@given(POSITIONS, st.integers(1, 1500), WINDOWS)
def test_a_chunk_reads_the_blocks_that_its_queries_see(first: int, count: int, window: Sliding) -> None:
    last = first + count - 1
    wanted = {b for p in range(first, last + 1) for b in stored_blocks(p, p, window)}
    blocks = stored_blocks(first, last, window)
    assert wanted <= set(blocks)
    assert not blocks or blocks.start * BLOCK + BLOCK > lowest_visible(first, window)


@given(POSITIONS)
def test_offsets_of_what_a_query_sees_never_collide(position: int) -> None:
    ranges = exact_ranges(position, None)
    sinks = [p for a, b in ranges for p in range(a, b) if boundary(position) and p < SINKS]
    offsets = sinks + [window_offset(p) for a, b in ranges for p in range(a, b) if p not in sinks]
    assert len(set(offsets)) == len(offsets)
    assert all(0 <= s < WINDOW_TOKENS for s in offsets)
    for a, b in ranges:
        assert window_offset(b - 1) - window_offset(a) == b - 1 - a, "a range is not contiguous in the window"


@given(POSITIONS)
def test_what_is_seen_as_stored_has_been_sealed(position: int) -> None:
    assert sealed_by(position) * BLOCK == boundary(position)
    assert stored_blocks(position, position, None).stop <= max(1, sealed_by(position))
    assert sealed_by(position) <= sealed_by(position + 1) <= sealed_by(position) + CELL // BLOCK
    assert position + 1 - boundary(position) <= 2 * CELL, "more is exact than the window holds"
    overwritten = range(position + 1 - 2 * CELL, position // CELL * CELL - CELL)
    assert all(p < boundary(position) for p in overwritten)


@given(POSITIONS)
def test_every_block_is_sealed_once_from_one_stretch_of_the_window(position: int) -> None:
    steps = [sealed_before(p) for p in range(position + 1)]
    assert [block for blocks in steps for block in blocks] == list(range(1, max(1, sealed_by(position))))
    for p, blocks in enumerate(steps):
        assert not blocks or window_offset(blocks.stop * BLOCK - 1) == window_offset(p) + CELL - 1
        offsets = [window_offset(block * BLOCK) for block in blocks]
        assert offsets == [offsets[0] + BLOCK * n for n in range(len(blocks))]


@given(st.integers(0, 100))
def test_the_longest_sequence_needs_no_block_too_many(blocks: int) -> None:
    longest = longest_with(blocks)
    assert highest_block(longest) <= blocks < highest_block(longest + 1)
    assert highest_block(longest) == max(0, sealed_by(longest - 1) - 1)


@pytest.mark.parametrize(
    ("position", "border"), [(0, 0), (255, 0), (511, 0), (512, 256), (767, 256), (768, 512)]
)
def test_the_boundary_by_hand(position: int, border: int) -> None:
    assert boundary(position) == border
