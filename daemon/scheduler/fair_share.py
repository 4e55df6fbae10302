"""Fair share: how many seconds of the engine each flow of requests has used.

The virtual counters of VTC (Sheng et al. 2024, "Fairness in Serving Large Language Models"), with measured
time instead of tokens, so that long contexts and reads from disk count for what they cost. Priorities are the
weights of section 4.3: a client's requests of one priority are a flow of their own, and its time counts less
the higher the priority, so a high priority goes first without starving a low one. A flow that comes back is
lifted to the least of those present: it gets no credit for the time that it left to others.

Pure: no clocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from spilld.protocol.messages import PRIORITIES

WEIGHTS = {priority: 8.0**rank for rank, priority in enumerate(PRIORITIES, -PRIORITIES.index("normal"))}
"""By priority: of flows that always want more, each gets the engine in proportion to its weight."""


class Flow(NamedTuple):
    """The requests of one client that have the same priority."""

    client: str
    priority: str = "normal"

    @property
    def weight(self) -> float:
        """The flow's entry in WEIGHTS."""
        return WEIGHTS[self.priority]


class FairShare:
    """Weighted seconds used, by flow. A flow is present while it has requests that wait or run."""

    def __init__(self) -> None:
        self._used: dict[Flow, float] = {}
        self._requests: Counter[Flow] = Counter()
        self._last = 0.0
        """What the last flow had used when it left and no flow was present."""

    def enter(self, flow: Flow) -> None:
        """Count a request of the flow that arrives."""
        if flow not in self._requests:
            self._used[flow] = max(self._used.get(flow, 0.0), self._least)
        self._requests[flow] += 1

    def leave(self, flow: Flow) -> None:
        """Count a request of the flow that has ended."""
        self._requests[flow] -= 1
        if self._requests[flow] == 0:
            del self._requests[flow]
            if not self._requests:
                self._last = self._used[flow]
            self._forget()

    def charge(self, flow: Flow, seconds: float) -> None:
        """Add seconds of the engine to what a flow has used."""
        self._used[flow] += seconds / flow.weight

    def used(self, flow: Flow) -> float:
        """Return seconds used divided by the flow's weight.

        Only the order among present flows has a meaning.
        """
        return self._used[flow]

    def owed(self, flow: Flow, to: Flow) -> float:
        """Return the seconds of the engine by which `flow` is ahead of `to`, in the seconds of `to`."""
        return (self._used[flow] - self._used[to]) * to.weight

    @property
    def _least(self) -> float:
        return min((self._used[flow] for flow in self._requests), default=self._last)

    def _forget(self) -> None:
        """Drop absent flows that would be lifted when they come back: each connection is a new client."""
        least = self._least
        self._used = {
            flow: used for flow, used in self._used.items() if used > least or flow in self._requests
        }


def shares(seconds: float, waited: float, costs: Sequence[float], reads: Sequence[int]) -> list[float]:
    """Divide the seconds of a step among its requests.

    Args:
        seconds: Wall time of the step.
        waited: Of these, seconds that it waited for the disk; divided by bytes read.
        costs: Of each request, the cost of what it computed; the rest is divided by it.
        reads: Of each request, bytes read from disk.

    Returns:
        Seconds of each request; their sum is `seconds`.
    """
    waited = min(waited, seconds) if any(reads) else 0.0
    computed, total, read = seconds - waited, sum(costs), sum(reads) or 1
    return [
        computed * cost / total + waited * nbytes / read for cost, nbytes in zip(costs, reads, strict=True)
    ]
