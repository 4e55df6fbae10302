"""Attention over stored blocks by the CPU: records in host memory where they lie, extents as they land."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from spilld.cuda_ext.errors import OutOfMemory
from spilld.kv.batch import Blocks, Call, Slice
from spilld.offload.errors import ReadFailed
from spilld.offload.kernels.attention.partial import Partial, merge
from spilld.offload.record import BLOCK
from spilld.offload.store import Store

Floats = npt.NDArray[np.float32]
Records = Iterator[tuple[npt.NDArray[np.uint8], Blocks, Blocks]]
"""(memory, byte offsets, block numbers)"""


class StoredAttention:
    """Merges into attention over a window what a call's queries see in stored form."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.layout = store.layout
        self._partial = Partial(store.layout)

    @contextmanager
    def failing(self, part: Slice) -> Iterator[None]:
        """A read that fails, or a device without memory for what must be done, ends the slice."""
        try:
            yield
        except (ReadFailed, OutOfMemory) as failure:
            # A traceback, that of torch's error among them, would keep the call's tensors.
            failure.__cause__ = failure.__context__ = None
            part.failure = failure.with_traceback(None)
            self.store.cancel(ticket for layer in part.tickets.values() for _, ticket in layer)

    def merge(self, q: Floats, call: Call, here: Blocks, seen: Blocks, out: Floats, lse: Floats) -> None:
        """Merge the partials over the blocks `here` in host memory, and over all on disk that are not `seen`
        already, into out [M, heads, head_dim], like q, and lse [M, heads]. Raises ReadFailed."""
        low, high = call.part.bounds(call.window)
        other, other_lse = np.empty_like(q), np.empty(q.shape[:2], np.float32)
        scale, softcap = call.scale, call.softcap
        for memory, offsets, blocks in self._records(call, here, seen):
            at = blocks * BLOCK
            self._partial.attend(q, memory, offsets, at, low, high, scale, softcap, other, other_lse)
            merge(out, lse, other, other_lse)

    def _records(self, call: Call, here: Blocks, seen: Blocks) -> Records:
        """Host memory first, then extents as they land."""
        if len(here):
            record_bytes = self.layout.record_bytes
            call.part.read_bytes["host"] += len(here) * record_bytes
            yield self.store.memory, call.part.sequence.table.rows[call.layer, here] * record_bytes, here
        yield from self._on_disk(call, seen)

    def _on_disk(self, call: Call, seen: Blocks) -> Records:
        part, record_bytes = call.part, self.layout.record_bytes
        waiting = part.tickets.get(call.layer, [])
        while waiting:
            batch, waiting = waiting[: self.store.staging_batch], waiting[self.store.staging_batch :]
            with self.store.staged([ticket for _, ticket in batch]) as (memory, offsets):
                stalls = sum(ticket.stalled for _, ticket in batch)
                part.stalls, part.hits = part.stalls + stalls, part.hits + len(batch) - stalls
                blocks = [part.on_disk(ref, call.window) for ref, _ in batch]
                if len(seen):
                    blocks = [found[~np.isin(found, seen)] for found in blocks]
                if part.promotion is not None:
                    for (ref, _), offset in zip(batch, offsets, strict=True):
                        part.promotion.copy(ref, call.layer, memory, offset)
                begins = [
                    offset + (found - ref.base) * record_bytes
                    for (ref, _), offset, found in zip(batch, offsets, blocks, strict=True)
                ]
                part.read_bytes["disk"] += sum(map(len, blocks)) * record_bytes
                yield memory, np.concatenate(begins), np.concatenate(blocks)
