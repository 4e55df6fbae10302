"""Read-ahead: begins the reads from disk that steps need before they are needed."""

from __future__ import annotations

from collections import Counter

from spilld.attention.base import AttentionPlan
from spilld.kv.geometry import Geometry
from spilld.offload.disk.read_ticket import Ticket
from spilld.offload.store.store import Store


class ReadAhead:
    """Submits what a plan reads.

    The reads of the next step are queued behind a decode step's, for its next scan is almost always the same:
    the disk stays busy while the sampler works.
    """

    def __init__(self, geometry: Geometry, store: Store) -> None:
        self._geometry = geometry
        self._store = store
        self._next: list[Ticket] = []

    def begin(self, plan: AttentionPlan) -> None:
        """Give every read of a plan its ticket, and begin what is to be promoted on the way."""
        reads, tickets = [read.read for read in plan.reads], self._next
        if [ticket.read for ticket in tickets] != reads:
            self.rest()
            tickets = self._store.submit(reads)
        for planned, ticket in zip(plan.reads, tickets, strict=True):
            planned.ticket = ticket
        decoding = plan.batch.single == len(plan.batch.items)
        self._next = self._store.submit(reads) if decoding else []
        self._promote(plan)

    def _promote(self, plan: AttentionPlan) -> None:
        """Let each decode scan promote one run, if host memory has room.

        More would take long, as fresh memory is slow, and a first token shall not wait for it. No scan passes
        all layers of a run where layers have sliding windows, nor where the device has blocks of the run.
        """
        if any(self._geometry.sliding_windows):
            return
        passed = Counter((read.item, read.ref) for read in plan.reads)
        for item in plan.batch.items[: plan.batch.single]:
            runs = item.sequence.table.runs
            if whole := [ref for ref in runs if passed[item, ref] == len(self._geometry.layers)]:
                plan.promotions[item] = self._store.promotion(item.sequence.table, whole)

    def cancel(self, plan: AttentionPlan) -> None:
        """Cancel the reads of a failed step, which would otherwise keep their staging buffers for good."""
        self._store.cancel(plan.tickets())

    @staticmethod
    def end(plan: AttentionPlan) -> None:
        """End the promotions of a step, however it ended."""
        for promotion in plan.promotions.values():
            promotion.end()

    def rest(self) -> None:
        """Drop what was read ahead: the next step will be another, or there is none."""
        self._store.cancel(self._next)
        self._next = []
