"""Recurrent state: how a prompt is cut changes nothing of what is computed; a failed step does not count."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spilld.kv.recurrent_state import LayerState, RecurrentState, StateShape, pieces
from spilld.kv.state_geometry import StateGeometry

LAYERS = (StateGeometry(0, (5, 4), (2, 3, 4), 64), StateGeometry(2, (3, 3), (), 64))


def computed(start: int, stop: int, grid: int) -> list[tuple[int, int, bool]]:
    """What a layer computes together, and whether by its rule for single tokens."""
    return [
        (at, min(b, at + grid), b - a == 1) for a, b in pieces(start, stop, grid) for at in range(a, b, grid)
    ]


@given(st.sampled_from([64, 128, 7]), st.integers(0, 700), st.integers(1, 700), st.data())
def test_chunks_compute_what_one_pass_does(grid: int, start: int, count: int, data: st.DataObject) -> None:
    stop = start + count
    places = range(-(-(start + 1) // grid) * grid, stop, grid)
    cuts = data.draw(st.sets(st.sampled_from(places))) if places else set()
    ends = [start, *sorted(cuts), stop]
    chunks = [part for a, b in pairwise(ends) for part in computed(a, b, grid)]
    assert chunks == computed(start, stop, grid)
    assert [a for a, _, _ in chunks] + [stop] == [start, *(b for _, b, _ in chunks)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_counts_once_it_has_succeeded(dtype: torch.dtype) -> None:
    state = RecurrentState(StateShape(LAYERS, dtype))
    for seen in (1.0, 2.0):
        for layer, geometry in enumerate(LAYERS):
            matrix = torch.full(geometry.recurrent, seen) if geometry.recurrent else None
            state.put(layer, LayerState(torch.full(geometry.convolution, seen, dtype=dtype), matrix))
        assert not any(state[layer].convolution.any() for layer in range(2)), "nothing counts yet"
    state.advance(7)
    assert state.position == 7
    for layer, geometry in enumerate(LAYERS):
        window, matrix = state[layer]
        assert window.shape == geometry.convolution
        assert set(window.flatten().tolist()) == {2}
        assert (matrix is None) == (not geometry.recurrent)
        assert matrix is None or set(matrix.flatten().tolist()) == {2}
    assert state.bytes.nbytes * 2 == StateShape(LAYERS, dtype).sequence_bytes
    state.reset()
    assert state.position == 0
    assert not state.bytes.any()
