"""How many prompt tokens a step can take without keeping those who wait for their next. Pure: no clocks.

A chunk of n tokens from position p on costs the products of n tokens and n (p + n / 2) pairs of attention.
How much of that the machine does in a second is measured, step by step, over whole steps: what does not
depend on n counts as if it did, so a chunk that came too late makes the next one shorter until the gap is
kept. Sarathi-Serve (Agrawal et al. 2024) bounds such a chunk by tokens, which at 7,500 take seven times as
long as at 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

LEAST = 16
"""Tokens that a chunk may have in any case: a prompt goes on, however slow the machine."""

SLOWER, FASTER = 0.5, 0.1
"""The weight of the newest step's rate, if it is lower than was expected or higher: where rates vary, what is
expected settles below most of them, and most gaps are kept."""


UNSEEN = 300.0
"""Products of a token that a machine does in a second, as long as none was seen."""


class Pace:
    """Bounds prefill beside decodes so that steps take at most `gap_s` seconds."""

    def __init__(self, gap_s: float, balance: float) -> None:
        """balance: the depth in tokens at which a token's attention costs as much as its products; may be
        infinite."""
        self.gap_s = gap_s
        self._balance = balance
        self._rate: float | None = None

    def cost(self, position: int, tokens: int) -> float:
        """Of a chunk, in products of a token."""
        return tokens * (1 + (position + tokens / 2) / self._balance)

    def took(self, chunks: Iterable[tuple[int, int]], seconds: float) -> None:
        """A step with these chunks (position, tokens), at least one, took so long, decodes included."""
        rate = sum(self.cost(*chunk) for chunk in chunks) / max(seconds, 1e-6)
        before = rate if self._rate is None else self._rate
        self._rate = before + (SLOWER if rate < before else FASTER) * (rate - before)

    @property
    def seen(self) -> bool:
        """Whether anything is known of the machine."""
        return self._rate is not None

    def seconds(self, position: int, tokens: int) -> float:
        """That a chunk is expected to take."""
        return self.cost(position, tokens) / (UNSEEN if self._rate is None else self._rate)

    @property
    def budget(self) -> float:
        """The cost that a step may have; 0 as long as no step was seen."""
        return 0.0 if self._rate is None else self._rate * self.gap_s

    def tokens(self, position: int, budget: float) -> int:
        """The longest chunk from `position` on that costs no more."""
        linear = 1 + position / self._balance
        root = math.sqrt(linear**2 + 2 * max(budget, 0.0) / self._balance)
        return int(2 * max(budget, 0.0) / (root + linear))
