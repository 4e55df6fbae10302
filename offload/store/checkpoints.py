"""Checkpoints on disk: the exact numbers of a sequence's window, which its sealed blocks do not contain."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from spilld.offload.disk.files.extent import RunKey
from spilld.offload.disk.index.index_row import Contents
from spilld.offload.disk.read_ticket import ExtentRead
from spilld.offload.disk.spiller import Spilled
from spilld.offload.errors import ExtentMissing, TierFull, WriteFailed
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import Bytes, page_aligned

from .disk_backend import DiskBackend

log = logging.getLogger(__name__)


class Checkpoints:
    """Writes and reads runs of raw records, found by the block that their tokens follow, the anchor.

    Attributes:
        layouts: Of the numbers, [64, 2, kv_heads, head_dim]: each token's K and V in the compute dtype.
        pending: For each run that is being written, its numbers, and the run that goes once it is durable.
    """

    def __init__(self, disk: DiskBackend | None, layouts: StoreLayout) -> None:
        """Work on a disk; without one, no checkpoint is saved and none is found."""
        self.layouts = layouts
        self.pending: dict[RunKey, tuple[Sequence[Bytes], RunKey | None]] = {}
        self._disk = disk

    def find(self, anchor: bytes) -> list[tuple[RunKey, list[int]]]:
        """Return the checkpoints after a block, the newest first: (run, the tokens that follow the block)."""
        return [] if self._disk is None else self._disk.cache.checkpoints(anchor)

    def buffers(self, blocks: int) -> list[Bytes]:
        """Allocate memory for the numbers of so many blocks: of each layer uint8 [blocks, record_bytes]."""
        memory, found, at = page_aligned(blocks * self.layouts.column_bytes), [], 0
        for nbytes in self.layouts.record_bytes:
            found.append(memory[at : at + blocks * nbytes].reshape(blocks, nbytes))
            at += blocks * nbytes
        return found

    def save(
        self,
        anchor: bytes,
        tokens: Sequence[int],
        first: int,
        numbers: Sequence[Bytes],
        instead_of: RunKey | None = None,
    ) -> RunKey | None:
        """Begin to write a checkpoint.

        Args:
            anchor: The chain hash of the block that the tokens follow.
            tokens: Those after it.
            first: The block that the first of the numbers belongs to.
            numbers: As from `buffers`, this object's from now on.
            instead_of: A checkpoint that goes once this one is durable.

        Returns:
            The run; None if the disk has no room, or the write budget refuses it.
        """
        disk = self._disk
        if disk is None or disk.failure is not None:
            return None
        count = len(numbers[0])
        if not disk.admits(b"checkpoint" + anchor, disk.tier.run_bytes(count, self.layouts)):
            return None
        contents = Contents(anchor, tokens=tuple(tokens))
        rows = np.tile(np.arange(count), (len(numbers), 1))
        try:
            run = disk.write(contents, first, anchor, self.layouts, numbers, rows)
        except TierFull as full:
            log.info("a checkpoint is not saved: %s", full)
            return None
        except WriteFailed as failure:
            disk.note(failure)
            return None
        self.pending[run] = numbers, instead_of
        return run

    def saving(self, run: RunKey) -> bool:
        """Return whether a checkpoint is being written, and so perhaps also what was begun before it."""
        return run in self.pending

    def settle(self, ended: Spilled) -> RunKey | None:
        """Finish a pending write and return the run that it supersedes, if it is durable."""
        _, instead_of = self.pending.pop(ended.run)
        return instead_of if ended.ok else None

    def read(self, run: RunKey) -> Iterator[Bytes]:
        """Yield a checkpoint's numbers for each layer, uint8 [blocks, record_bytes], valid until the next.

        No other reads may be under way.

        Raises:
            ReadFailed: An extent did not come back.
        """
        if self._disk is None:
            raise ExtentMissing("there is no disk tier")
        prefetch = self._disk.prefetch
        tickets = prefetch.submit([ExtentRead(run, layer) for layer in range(len(self.layouts))])
        for ticket in tickets:
            try:
                yield self._disk.loaded(ticket)
            except BaseException:
                prefetch.cancel(tickets)
                raise
            prefetch.release(ticket)
        self._disk.cache.acquire([run])
        self._disk.cache.release(run)
