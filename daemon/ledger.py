"""How much of the engine each client has had, in seconds of it: who has had least is next.

The virtual counters of VTC (Sheng et al. 2024, "Fairness in Serving Large Language Models") with measured
time in the place of tokens, so that a long context and cold bytes count for what they cost. A client that
comes back is lifted to the least of those who are there: time that it left to others is not owed to it.
Pure: no clocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class Ledger:
    """Seconds by client. A client is there while it has requests that wait or run."""

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        self._requests: Counter[str] = Counter()
        self._left = 0.0
        """What the last client had that left nobody behind."""

    def enter(self, client: str) -> None:
        """A request of the client is there."""
        if client not in self._requests:
            self._had[client] = max(self._had.get(client, 0.0), self._least)
        self._requests[client] += 1

    def leave(self, client: str) -> None:
        """One of its requests has ended."""
        self._requests[client] -= 1
        if self._requests[client] == 0:
            del self._requests[client]
            if not self._requests:
                self._left = self._had[client]
            self._forget()

    def charge(self, client: str, seconds: float) -> None:
        self._had[client] += seconds

    def had(self, client: str) -> float:
        """Seconds of the engine. They compare with those of other clients, and mean nothing else."""
        return self._had[client]

    @property
    def _least(self) -> float:
        return min((self._had[client] for client in self._requests), default=self._left)

    def _forget(self) -> None:
        """Drop who would be lifted when it comes back: a connection has a name of its own each time."""
        least = self._least
        self._had = {
            client: had for client, had in self._had.items() if had > least or client in self._requests
        }


def shares(seconds: float, waited: float, costs: Sequence[float], reads: Sequence[int]) -> list[float]:
    """What each request of a step pays of its seconds: for computing by its cost, for the time in which the
    step waited for the disk by the bytes it read."""
    waited = min(waited, seconds) if any(reads) else 0.0
    computed, total, read = seconds - waited, sum(costs), sum(reads) or 1
    return [
        computed * cost / total + waited * nbytes / read for cost, nbytes in zip(costs, reads, strict=True)
    ]
