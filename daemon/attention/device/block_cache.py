"""Device block cache: stored blocks of open sequences of which the device has a copy.

Attention is dense and passes all blocks in the same order for every token: keeping a fixed share of them
pays, while a cache that evicts the oldest would never hit. A block keeps its slot until its sequence ends.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from spilld.cuda_ext.memory.record_pool import RecordPool
from spilld.kv.attention_metadata import Blocks
from spilld.kv.attention_span import BLOCKS_PER_CELL
from spilld.kv.sequence import KVSequence

PASSING = 16
"""Slots for records that are fetched for one call."""

SPARE = BLOCKS_PER_CELL + PASSING
"""Slots that stay free: PASSING, and those in which a cell is sealed."""

Slots = npt.NDArray[np.int64]


class DeviceBlockCache:
    """Slots of a pool, by sequence, layer and block."""

    def __init__(self, pool: RecordPool, layers: int) -> None:
        """Create an empty cache.

        Args:
            pool: Where the slots are.
            layers: Number of layers.

        Raises:
            ValueError: The pool has fewer than SPARE slots.
        """
        if pool.capacity < SPARE:
            raise ValueError(
                f"a budget of {pool.budget_bytes} bytes holds fewer than {SPARE} records of"
                f" {pool.record_bytes} bytes, beside windows and what a step takes"
            )
        self._pool, self._layers = pool, layers
        self._slots: dict[int, Slots] = {}

    @property
    def room(self) -> int:
        """Number of blocks that can still be kept."""
        return self._pool.free - SPARE

    def slots(self, sequence: KVSequence, layer: int, blocks: Blocks) -> Slots:
        """Return the slots of blocks; -1 for those of which the device has no copy."""
        table = self._slots.get(sequence.window)
        if table is None:
            return np.full(len(blocks), -1)
        known = blocks < table.shape[1]
        return np.where(known, table[layer, np.where(known, blocks, 0)], -1)

    def keep(self, sequence: KVSequence, layer: int, blocks: Blocks, slots: Slots) -> None:
        """Keep these slots, which have the records of these blocks, until the sequence is dropped."""
        table = self._slots.get(sequence.window, np.empty((self._layers, 0), np.int64))
        if len(blocks) and blocks[-1] >= table.shape[1]:
            wider = np.full((self._layers, 2 * int(blocks[-1]) + 2), -1)
            wider[:, : table.shape[1]] = table
            table = self._slots[sequence.window] = wider
        assert (table[layer, blocks] < 0).all(), "a block has two slots"
        table[layer, blocks] = slots

    def drop(self, sequence: KVSequence) -> None:
        """Give back all slots of a sequence."""
        table = self._slots.pop(sequence.window, None)
        if table is not None:
            self._pool.give_back(table[table >= 0].tolist())

    def check_integrity(self, sequences: Iterable[KVSequence]) -> None:
        """Check that every taken slot has a block of one of these sequences.

        Raises:
            AssertionError: One has not.
        """
        assert self._slots.keys() <= {sequence.window for sequence in sequences}, (
            "a slot outlives its sequence"
        )
        taken = sum(int((table >= 0).sum()) for table in self._slots.values())
        assert taken * self._pool.record_bytes == self._pool.used_bytes, "a taken slot has no block, or two"
