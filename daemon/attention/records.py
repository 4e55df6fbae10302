"""Attention over records by the CPU: in host memory where they lie, in extents as they come from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from spilld.cuda_ext.errors import OutOfMemory
from spilld.kv.attention_metadata import Blocks, VisibleKV
from spilld.kv.batch import BatchItem
from spilld.kv.geometry import Geometry
from spilld.offload.errors import ReadFailed
from spilld.offload.kernels.attention.partial import Partial, merge
from spilld.offload.record import BLOCK
from spilld.offload.store.store import Store

from .base import AttentionPlan, PlannedRead

T = TypeVar("T")
Floats = npt.NDArray[np.float32]
Places = tuple[npt.NDArray[np.uint8], Blocks, Blocks]
"""(memory, byte offsets of records in it, block numbers)"""

NO_BLOCKS: Blocks = np.empty(0, np.int64)


def alike(make: Callable[..., T], *of: Iterable[Any]) -> list[T]:
    """Return what `make` makes of each, made once of those that are equal."""
    made = cache(make)
    return [made(*each) for each in zip(*of, strict=True)]


class RecordAttention:
    """Merges what queries see in stored form into attention over a KV window."""

    def __init__(self, geometry: Geometry, store: Store) -> None:
        self._geometry = geometry
        self._store = store
        self._partials = alike(Partial, store.layouts)

    @contextmanager
    def failing(self, plan: AttentionPlan, item: BatchItem) -> Iterator[None]:
        """End the item if a read fails, or if the device has no memory, within the context."""
        try:
            yield
        except (ReadFailed, OutOfMemory) as failure:
            # A traceback, that of torch's error among them, would keep the call's tensors.
            failure.__cause__ = failure.__context__ = None
            item.failure = failure.with_traceback(None)
            self._store.cancel(plan.tickets(item))

    def merge(
        self,
        layer: int,
        q: Floats,
        seen: VisibleKV,
        plan: AttentionPlan,
        out: Floats,
        lse: Floats,
        *,
        in_host: Blocks = NO_BLOCKS,
        but: Blocks = NO_BLOCKS,
    ) -> None:
        """Merge the partials over blocks in host memory, and over those that come from disk.

        Args:
            layer: Number of the layer.
            q: [count, heads, head_dim] float32, the queries of an item.
            seen: What they see in this layer.
            plan: The plan of this step.
            out: [count, heads, head_dim] float32, their attention so far, which is updated.
            lse: [count, heads] float32, its log-sum-exp, which is updated.
            in_host: Blocks in host memory.
            but: Blocks on disk that are in `out` already.

        Raises:
            ReadFailed: The disk failed; what was merged before is in `out`.
        """
        shape = self._geometry.layers[layer]
        other, other_lse = np.empty(q.shape, np.float32), np.empty(lse.shape, np.float32)
        for memory, offsets, blocks in self._records(layer, seen, plan, in_host, but):
            at, bounds = blocks * BLOCK, (seen.low, seen.high)
            kind = (shape.scaling, shape.softcap)
            self._partials[layer].attend(q, memory, offsets, at, *bounds, *kind, other, other_lse)
            merge(out, lse, other, other_lse)

    def _records(
        self, layer: int, seen: VisibleKV, plan: AttentionPlan, in_host: Blocks, but: Blocks
    ) -> Iterator[Places]:
        """Yield host memory first, then extents as they come."""
        item, record_bytes = seen.item, self._store.layouts[layer].record_bytes
        if len(in_host):
            item.read_bytes["host"] += len(in_host) * record_bytes
            yield self._store.memory, item.sequence.table.rows[layer, in_host] * record_bytes, in_host
        waiting = plan.reads_of(layer, item)
        while waiting:
            size = self._store.staging_batch
            yield from self._staged(waiting[:size], plan, but)
            waiting = waiting[size:]

    def _staged(self, reads: Sequence[PlannedRead], plan: AttentionPlan, but: Blocks) -> Iterator[Places]:
        """Yield what some reads of one item and layer bring."""
        item, record_bytes = reads[0].item, self._store.layouts[reads[0].layer].record_bytes
        tickets = [read.ticket for read in reads if read.ticket is not None]
        assert len(tickets) == len(reads), "a planned read was not submitted"
        with self._store.staged(tickets) as (memory, offsets):
            stalls = sum(ticket.stalled for ticket in tickets)
            item.stalls, item.hits = item.stalls + stalls, item.hits + len(tickets) - stalls
            if (promotion := plan.promotions.get(item)) is not None:
                for read, offset in zip(reads, offsets, strict=True):
                    promotion.copy(read.ref, read.layer, memory, offset)
            blocks = [read.blocks[~np.isin(read.blocks, but)] if len(but) else read.blocks for read in reads]
            begins = [
                offset + (found - read.ref.base) * record_bytes
                for read, offset, found in zip(reads, offsets, blocks, strict=True)
            ]
            item.read_bytes["disk"] += sum(map(len, blocks)) * record_bytes
            yield memory, np.concatenate(begins), np.concatenate(blocks)
