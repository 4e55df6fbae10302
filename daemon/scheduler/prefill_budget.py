"""Prefill budget: how many prompt tokens a step may compute beside requests that decode.

A chunk of n tokens at position p costs n products with the weights and n (p + n / 2) pairs of attention. How
many such products the machine does in a second is measured, step by step, over whole steps: fixed costs count
as if they depended on n, so a chunk that took too long makes the next one shorter until the gap between two
tokens is kept. Sarathi-Serve (Agrawal et al. 2024) bounds chunks by tokens instead, which at position 7,500
take seven times as long as at 0.

Pure: no clocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

LEAST = 16
"""Tokens that a chunk may always have: a prompt makes progress on the slowest machine."""

SLOWER, FASTER = 0.5, 0.1
"""Weight of the newest step in the measured rate, where it was slower or faster than expected. They differ so
that under noise the estimate settles below most rates, and most gaps are kept."""


UNSEEN = 300.0
"""Products a second that are assumed before any step was measured."""


class PrefillBudget:
    """Bounds prefill beside decoding so that steps take at most `gap_s` seconds.

    Costs are in products of one token with the weights.
    """

    def __init__(self, gap_s: float, balance: float) -> None:
        """Create a budget that has measured nothing.

        Args:
            gap_s: Longest time that a step should take, in seconds.
            balance: Position at which a token's attention costs as much as its products; may be infinite.
        """
        self.gap_s = gap_s
        self._balance = balance
        self._rate: float | None = None

    def cost(self, position: int, tokens: int) -> float:
        """Return the cost of a chunk of `tokens` tokens from `position` on."""
        return tokens * (1 + (position + tokens / 2) / self._balance)

    def took(self, chunks: Iterable[tuple[int, int]], seconds: float) -> None:
        """Learn from a step with these chunks, (position, tokens), at least one, beside any decode rows."""
        rate = sum(self.cost(*chunk) for chunk in chunks) / max(seconds, 1e-6)
        before = rate if self._rate is None else self._rate
        self._rate = before + (SLOWER if rate < before else FASTER) * (rate - before)

    @property
    def measured(self) -> bool:
        """Whether any step was measured."""
        return self._rate is not None

    def seconds(self, position: int, tokens: int) -> float:
        """Return the expected time of a chunk."""
        return self.cost(position, tokens) / (UNSEEN if self._rate is None else self._rate)

    @property
    def of_a_step(self) -> float:
        """The cost that one step may have; 0 before any was measured."""
        return 0.0 if self._rate is None else self._rate * self.gap_s

    def tokens(self, position: int, cost: float) -> int:
        """Return the length of the longest chunk from `position` on that costs at most `cost`."""
        linear = 1 + position / self._balance
        root = math.sqrt(linear**2 + 2 * max(cost, 0.0) / self._balance)
        return int(2 * max(cost, 0.0) / (root + linear))
