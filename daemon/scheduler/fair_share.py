"""How much of the engine each client has had, in seconds of it: who has had least is next.

The virtual counters of VTC (Sheng et al. 2024, "Fairness in Serving Large Language Models") with measured
time in the place of tokens, so that a long context and cold bytes count for what they cost. Weights are the
paper's, too (section 4.3): of a client's requests each priority is a flow of its own, whose time counts the
less the higher it is. So a high one goes first without ever starving a low one. A flow that
comes back is lifted to the least of those who are there: time that it left to others is not owed to it.
Pure: no clocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from spilld.protocol.messages import PRIORITIES

WEIGHTS = {priority: 8.0**rank for rank, priority in enumerate(PRIORITIES, -PRIORITIES.index("normal"))}
"""By priority: of two flows that always want more, each has so much of the engine."""


class Flow(NamedTuple):
    """A client's requests of one priority."""

    client: str
    priority: str = "normal"

    @property
    def weight(self) -> float:
        return WEIGHTS[self.priority]


class Ledger:
    """Weighted seconds by flow. A flow is there while it has requests that wait or run."""

    def __init__(self) -> None:
        self._had: dict[Flow, float] = {}
        self._requests: Counter[Flow] = Counter()
        self._left = 0.0
        """What the last flow had that left nobody behind."""

    def enter(self, flow: Flow) -> None:
        """A request of the flow is there."""
        if flow not in self._requests:
            self._had[flow] = max(self._had.get(flow, 0.0), self._least)
        self._requests[flow] += 1

    def leave(self, flow: Flow) -> None:
        """One of its requests has ended."""
        self._requests[flow] -= 1
        if self._requests[flow] == 0:
            del self._requests[flow]
            if not self._requests:
                self._left = self._had[flow]
            self._forget()

    def charge(self, flow: Flow, seconds: float) -> None:
        self._had[flow] += seconds / flow.weight

    def had(self, flow: Flow) -> float:
        """Seconds of the engine over the flow's weight. They compare with those of other flows, and mean
        nothing else."""
        return self._had[flow]

    def owed(self, flow: Flow, to: Flow) -> float:
        """Seconds of the engine that `to` would have had beside the flow, had both had their part."""
        return (self._had[flow] - self._had[to]) * to.weight

    @property
    def _least(self) -> float:
        return min((self._had[flow] for flow in self._requests), default=self._left)

    def _forget(self) -> None:
        """Drop who would be lifted when it comes back: a connection has a name of its own each time."""
        least = self._least
        self._had = {flow: had for flow, had in self._had.items() if had > least or flow in self._requests}


def shares(seconds: float, waited: float, costs: Sequence[float], reads: Sequence[int]) -> list[float]:
    """What each request of a step pays of its seconds: for computing by its cost, for the time in which the
    step waited for the disk by the bytes it read."""
    waited = min(waited, seconds) if any(reads) else 0.0
    computed, total, read = seconds - waited, sum(costs), sum(reads) or 1
    return [
        computed * cost / total + waited * nbytes / read for cost, nbytes in zip(costs, reads, strict=True)
    ]
