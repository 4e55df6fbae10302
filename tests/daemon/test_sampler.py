"""The sampler against a slow oracle in plain Python, and its noise against the distribution it promises."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from spilld.errors import InternalError
from spilld.protocol.messages import Sampling
from spilld.runner.sampler import Sampler, gumbel, logprobs

finite = st.floats(-30, 30, width=32)
rows = st.lists(finite, min_size=1, max_size=40).map(lambda row: np.array(row, dtype=np.float32))


def philox_words(key: tuple[int, int], count: int) -> list[int]:
    """Philox4x64-10 in plain integers, from the paper; the counter is 1, 2, ... (numpy steps, then draws)."""
    words: list[int] = []
    mask = 2**64 - 1
    for counter in range(1, -(-count // 4) + 1):
        c, (k0, k1) = [counter, 0, 0, 0], key
        for _ in range(10):
            low, high = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(high >> 64) ^ c[1] ^ k0, high & mask, (low >> 64) ^ c[3] ^ k1, low & mask]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        words += c
    return words[:count]


def oracle(logits: NDArray[np.float32], sampling: Sampling, position: int, history: Sequence[int]) -> int:
    scores = [float(x) for x in logits]
    for i in set(history):
        p = sampling.repetition_penalty
        scores[i] = scores[i] * p if scores[i] < 0 else scores[i] / p
    if sampling.temperature == 0:
        return scores.index(max(scores))
    scores = [(x - max(scores)) / sampling.temperature for x in scores]
    kept = list(range(len(scores)))
    if sampling.top_k:
        bar = sorted(scores, reverse=True)[min(sampling.top_k, len(scores)) - 1]
        kept = [i for i in kept if scores[i] >= bar]
    if sampling.top_p < 1:
        total, mass, chosen = sum(math.exp(scores[i]) for i in kept), 0.0, []
        for i in sorted(kept, key=lambda i: (-scores[i], i)):
            if mass < sampling.top_p * total:
                chosen.append(i)
            mass += math.exp(scores[i])
        kept = chosen
    if sampling.min_p:  # not of exp(score), which is 1 for the smallest differences
        kept = [i for i in kept if scores[i] >= math.log(sampling.min_p)]
    assert sampling.seed is not None
    words = philox_words((sampling.seed, position), len(scores))
    noise = [-math.log(-math.log(((w >> 11) + 0.5) / 2**53)) for w in words]
    return max(kept, key=lambda i: scores[i] + noise[i])


def test_min_p_of_1_leaves_the_largest_alone() -> None:
    logits = np.array([0.0, -1.1754944e-38], np.float32)
    sampling = Sampling(temperature=0.3, min_p=1.0, seed=0)
    assert {Sampler(sampling).choose(logits, position, []).token for position in range(20)} == {0}


@given(
    logits=rows,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 100]),
    top_p=st.sampled_from([0.13, 0.71, 1.0]),
    min_p=st.sampled_from([0.0, 0.061, 1.0]),
    penalty=st.sampled_from([1.0, 0.7, 1.3]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**20),
    data=st.data(),
)
def test_oracle(
    logits: NDArray[np.float32],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    seed: int,
    position: int,
    data: st.DataObject,
) -> None:
    history = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=9))
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        seed=seed,
    )
    before = logits.copy()
    choice = Sampler(sampling).choose(logits, position, history)
    assert choice.token == oracle(logits, sampling, position, history)
    assert (choice.logprob, choice.top) == (None, ())
    assert np.array_equal(logits, before)


def test_noise_is_philox_of_seed_and_position() -> None:
    for seed, position in ((0, 0), (7, 1), (2**64 - 1, 123456)):
        words = philox_words((seed, position), 11)
        expected = [-math.log(-math.log(((w >> 11) + 0.5) / 2**53)) for w in words]
        assert gumbel(seed, position, 11).tolist() == pytest.approx(expected, abs=1e-12)


def test_noise_of_a_token_does_not_depend_on_the_vocabulary_size() -> None:
    assert np.array_equal(gumbel(3, 4, 1000)[:10], gumbel(3, 4, 10))


def test_noise_is_finite_and_gumbel() -> None:
    noise = np.concatenate([gumbel(11, position, 10_000) for position in range(20)])
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.02)


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_frequencies_are_the_softmax(vary: str) -> None:
    """Chi-squared of 20,000 draws with fixed seeds, below the 99.9th percentile of 5 degrees of freedom."""
    logits = np.array([1.0, 0.0, -1.0, 2.0, 0.5, -2.0], dtype=np.float32)
    expected = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum()
    draws = 20_000
    counts: Counter[int] = Counter()
    for i in range(draws):
        seed, position = (5, i) if vary == "position" else (i, 5)
        counts[Sampler(Sampling(temperature=0.8, seed=seed)).choose(logits, position, ()).token] += 1
    observed = np.array([counts[i] for i in range(6)])
    assert ((observed - draws * expected) ** 2 / (draws * expected)).sum() < 20.5


def test_same_seed_and_position_choose_alike_in_any_order() -> None:
    rng = np.random.default_rng(0)
    logits = [rng.standard_normal(500).astype(np.float32) for _ in range(30)]
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=99)
    sampler = Sampler(sampling)
    first = [sampler.choose(row, position, ()).token for position, row in enumerate(logits)]
    order = list(range(30))
    random.Random(1).shuffle(order)
    again = {position: Sampler(sampling).choose(logits[position], position, ()).token for position in order}
    assert [again[position] for position in range(30)] == first
    assert len(set(first)) > 10


def test_seed_is_drawn_once_and_reported() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    drawn = Sampler(Sampling(temperature=1.0))
    replay = Sampler(Sampling(temperature=1.0, seed=drawn.seed))
    assert [drawn.choose(logits, p, ()) for p in range(20)] == [
        replay.choose(logits, p, ()) for p in range(20)
    ]
    assert Sampler(Sampling(temperature=1.0)).seed != drawn.seed


def test_greedy_tie_is_the_lowest_id() -> None:
    logits = np.array([0, 3, 3, 1], dtype=np.float32)
    assert Sampler(Sampling()).choose(logits, 0, ()).token == 1
    assert Sampler(Sampling(repetition_penalty=2.0)).choose(logits, 0, [1]).token == 2


def test_tiny_temperature_is_greedy() -> None:
    logits = np.array([1.0, 1.001, -np.inf, 0.5], dtype=np.float32)
    sampler = Sampler(Sampling(temperature=1e-300, seed=0))
    assert {sampler.choose(logits, position, ()).token for position in range(50)} == {1}


@given(logits=rows, count=st.integers(0, 50), data=st.data())
def test_logprobs(logits: NDArray[np.float32], count: int, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(logits) - 1))
    own, top = logprobs(logits, token, count)
    total = math.log(math.fsum(math.exp(float(x)) for x in logits))
    expected = [float(x) - total for x in logits]
    assert own == pytest.approx(expected[token], abs=1e-9)
    ranked = sorted(range(len(logits)), key=lambda i: (-expected[i], i))[:count]
    assert [i for i, _ in top] == ranked
    assert [value for _, value in top] == pytest.approx([expected[i] for i in ranked], abs=1e-9)


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = np.array([2.0, 1.0, 0.0], dtype=np.float32)
    sampling = Sampling(temperature=0.1, top_k=1, repetition_penalty=9.0, seed=1)
    choice = Sampler(sampling, logprobs=2).choose(logits, 0, [0])
    assert choice.token == 1
    own, top = logprobs(logits, 1, 2)
    assert (choice.logprob, choice.top) == (own, top)
    assert top[0][0] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error(bad: float, temperature: float) -> None:
    logits = np.array([0.0, bad, 1.0], dtype=np.float32)
    with pytest.raises(InternalError):
        Sampler(Sampling(temperature=temperature)).choose(logits, 0, ())
    with pytest.raises(InternalError):
        Sampler(Sampling()).choose(np.full(3, -np.inf, dtype=np.float32), 0, ())
