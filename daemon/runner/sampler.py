"""Sampler: chooses one token from one row of logits.

The order: repetition penalty, temperature, top-k, top-p, min-p, then Gumbel-max. The noise of a position is a
pure function of (seed, position), so a restart, a preemption or a drafted token cannot change what is chosen.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spilld.errors import InternalError

if TYPE_CHECKING:
    from spilld.protocol.messages import Sampling

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class SampledToken:
    """A chosen token.

    Its logprob and top are of the raw logits: before penalty, temperature and truncation.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one request.

    Attributes:
        seed: The request's, or drawn once from the system.
    """

    def __init__(self, sampling: Sampling, logprobs: int | None = None) -> None:
        """Create a sampler.

        Args:
            sampling: Temperature, truncation, penalty, seed.
            logprobs: How many of the likeliest tokens to report beside the chosen one; None for no log
                probabilities at all.
        """
        self._sampling = sampling
        self._logprobs = logprobs
        self.seed = int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed

    def choose(self, logits: Logits, position: int, history: Sequence[int]) -> SampledToken:
        """Choose the token that will stand at `position`.

        Args:
            logits: [vocab] float32, not changed.
            position: Of the token in its sequence.
            history: Prompt and answer so far, for the repetition penalty.

        Raises:
            InternalError: The logits have no largest finite value.
        """
        if not math.isfinite(logits.max()):  # NaN wins a max
            raise InternalError("the model's logits are not finite")
        scores = self._penalised(logits, history)
        token = int(scores.argmax()) if self._sampling.temperature == 0 else self._sampled(scores, position)
        if self._logprobs is None:
            return SampledToken(token, None, ())
        return SampledToken(token, *logprobs(logits, token, self._logprobs))

    def _penalised(self, logits: Logits, history: Sequence[int]) -> NDArray[np.float64]:
        """Apply the repetition penalty.

        Keskar et al. 2019 (CTRL) section 4.1, with transformers' treatment of negative logits.
        """
        scores = logits.astype(np.float64)
        penalty = self._sampling.repetition_penalty
        if penalty != 1.0 and len(history):
            seen = np.unique(np.asarray(history, dtype=np.int64))
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        return scores

    def _sampled(self, scores: NDArray[np.float64], position: int) -> int:
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to -inf, as it should
            scores = (scores - scores.max()) / self._sampling.temperature
        kept = self._truncated(scores)
        return int(kept[np.argmax(scores[kept] + gumbel(self.seed, position, len(scores))[kept])])

    def _truncated(self, scores: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the ids that top-k, then top-p, then min-p leave over, ascending; the largest score is 0."""
        s = self._sampling
        kept = np.arange(len(scores))
        if 0 < s.top_k < len(scores):
            kept = kept[scores >= np.partition(scores, -s.top_k)[-s.top_k]]
        if s.top_p < 1.0:
            weights = np.exp(scores[kept])
            total = weights.sum()
            # those too light to matter weigh less than 1 - top_p together, so only the others are sorted
            likely = kept[weights >= (1.0 - s.top_p) * total / (2 * len(kept))]
            ranked = likely[np.argsort(-scores[likely], kind="stable")]
            before = np.concatenate(([0.0], np.exp(scores[ranked]).cumsum()[:-1]))
            kept = np.sort(ranked[before < s.top_p * total])
        if s.min_p > 0.0:
            kept = kept[scores[kept] >= min(math.log(s.min_p), 0.0)]
        return kept


def gumbel(seed: int, position: int, size: int) -> NDArray[np.float64]:
    """Return standard Gumbel noise for every id of the vocabulary, a pure function of (seed, position).

    -log(-log(u)) with u = (n + 1/2) / 2**53, n the upper 53 bits of word i of Philox4x64-10 (Salmon et al.
    2011) with key (seed, position) and counter from 0: numpy's raw stream, which no numpy version changes.
    """
    words = np.random.Philox(key=np.array([seed, position], dtype=np.uint64)).random_raw(size)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def logprobs(logits: Logits, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return a token's log probability, and the `count` likeliest ids with theirs, ties by the lower id."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= math.log(np.exp(scores).sum())
    count = min(count, len(scores))
    if not count:
        return float(scores[token]), ()
    bar = np.partition(scores, -count)[-count]
    likely = np.flatnonzero(scores >= bar)
    ranked = likely[np.argsort(-scores[likely], kind="stable")][:count]
    return float(scores[token]), tuple((int(i), float(scores[i])) for i in ranked)
