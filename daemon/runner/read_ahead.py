"""The reads from disk that steps need, begun ahead of need."""

from __future__ import annotations

from collections import Counter

from spilld.attention.base import AttentionPlan
from spilld.kv.geometry import Geometry
from spilld.offload.disk.extent_read import Ticket
from spilld.offload.store.store import Store


class ReadAhead:
    """Submits what a plan reads. The reads of the next step are queued behind a decode step's, for its next
    scan is almost always the same: the disk goes on while the sampler works.
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
        """Let decode scans bring back what host memory has room for, a run each: fresh memory is slow, and a
        first token shall not wait for it. Where layers slide no scan passes all layers of a run, nor where
        the device has blocks of it.
        """
        if any(self._geometry.sliding_windows):
            return
        passed = Counter((read.item, read.ref) for read in plan.reads)
        for item in plan.batch.items[: plan.batch.single]:
            runs = item.sequence.table.runs
            if whole := [ref for ref in runs if passed[item, ref] == len(self._geometry.layers)]:
                plan.promotions[item] = self._store.promotion(item.sequence.table, whole)

    def cancel(self, plan: AttentionPlan) -> None:
        """A step broke: reads that nobody takes would keep their staging buffers for good."""
        self._store.cancel(plan.tickets())

    @staticmethod
    def end(plan: AttentionPlan) -> None:
        """A step is over, however it ended."""
        for promotion in plan.promotions.values():
            promotion.end()

    def rest(self) -> None:
        """Drop what was read ahead: the next step will be another, or there is none."""
        self._store.cancel(self._next)
        self._next = []
