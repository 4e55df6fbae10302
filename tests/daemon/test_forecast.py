"""What tokens are expected to take: steps of a known machine, and what is made of them."""

from __future__ import annotations

import random

import pytest

from spilld.kv.attention_span import stored_blocks
from spilld.scheduler.latency import GUESSES, STEPS, LatencyModel

LAYERS, RECORD, HOST = 30, 20352, 40_000_000
BASE, ROW, HOST_S, DISK_S = 0.012, 0.003, 0.15e-9, 1.2e-9
"""The machine: seconds a step, a row, a byte from host memory, a byte from disk."""


def read_bytes(length: int) -> int:
    return LAYERS * len(stored_blocks(length - 1, length - 1, None)) * RECORD


def takes(lengths: list[int]) -> float:
    total = sum(map(read_bytes, lengths))
    host = min(total, HOST)
    return BASE + ROW * len(lengths) + HOST_S * host + DISK_S * (total - host)


def learnt(draw: random.Random, noise: float) -> LatencyModel:
    model = LatencyModel([None] * LAYERS, [RECORD] * LAYERS, HOST)
    for _ in range(STEPS):
        lengths = [draw.randint(300, 8000) for _ in range(draw.randint(1, 8))]
        total = sum(map(read_bytes, lengths))
        host = min(total, HOST)
        model.took(len(lengths), host, total - host, takes(lengths) * draw.uniform(1 - noise, 1 + noise))
    return model


@pytest.mark.parametrize("lengths", [[400], [8000], [8000] * 16, [1000, 2000, 60000]])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_machine_is_learnt(lengths: list[int], noise: float) -> None:
    model = learnt(random.Random(1), noise)
    expected = model.token_s(lengths)
    assert expected == pytest.approx(takes(lengths), rel=0.01 + noise / 2)


def test_nothing_is_said_of_an_unknown_machine() -> None:
    assert LatencyModel([None], [RECORD], HOST).token_s([100]) is None


def test_what_was_never_read_is_guessed() -> None:
    model = LatencyModel([None] * LAYERS, [RECORD] * LAYERS, HOST)
    model.took(1, 0, 0, 0.02)
    far = model.token_s([64 * 4000])
    nbytes = read_bytes(64 * 4000)
    assert far == pytest.approx(0.02 + (GUESSES[0] * HOST + GUESSES[1] * (nbytes - HOST)) / 1e9, rel=0.02)


def test_no_part_takes_less_than_nothing() -> None:
    """Longer sequences that happened to be faster do not make even longer ones faster still."""
    model = LatencyModel([None] * LAYERS, [RECORD] * LAYERS, 10**12)
    for length, seconds in ((1000, 0.05), (4000, 0.04), (2000, 0.045)):
        model.took(1, read_bytes(length), 0, seconds)
    assert model.token_s([8000]) == pytest.approx(0.05, rel=0.2)


def test_only_what_a_window_sees_counts() -> None:
    wide, narrow = (LatencyModel([window] * LAYERS, [RECORD] * LAYERS, 10**12) for window in (None, 512))
    for model in (wide, narrow):
        model.took(1, 10**8, 0, 0.1)
        model.took(1, 0, 0, 0.01)
    short, long = narrow.token_s([2000]), narrow.token_s([200_000])
    assert short is not None
    assert long is not None
    assert long == pytest.approx(short, rel=0.1)
    assert (wide.token_s([200_000]) or 0) > 10 * long


def test_old_steps_are_forgotten() -> None:
    model = LatencyModel([None] * LAYERS, [RECORD] * LAYERS, HOST)
    for seconds in (0.5, 0.02):
        for _ in range(STEPS):
            model.took(1, 10**6, 0, seconds)
    assert model.token_s([400]) == pytest.approx(0.02, rel=0.05)
