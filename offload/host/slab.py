"""The host slab: records in ordinary memory, handed out by row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spilld.offload.errors import BudgetTooSmall, MemoryRefused, TierFull
from spilld.offload.size import size
from spilld.offload.system import Bytes, give_back, page_aligned

Rows = npt.NDArray[np.int64]


class HostSlab:
    """A fixed number of record slots in one mapping, and the only ledger of their bytes.

    records is uint8[n_slots, record_bytes], page-aligned at its base, and holds no more than
    budget_bytes. Memory is touched lowest row first and freed rows are reused first, so that the
    resident size follows use. Owned by one thread; others may read and write rows they were given.
    """

    def __init__(self, budget_bytes: int, record_bytes: int) -> None:
        """Raises BudgetTooSmall when not even one record fits, MemoryRefused by the kernel."""
        if record_bytes < 64 or record_bytes % 64:
            raise ValueError(f"record_bytes must be a positive multiple of 64, got {record_bytes}")
        n_slots = budget_bytes // record_bytes
        if n_slots < 1:
            raise BudgetTooSmall(
                f"{size(budget_bytes)} cannot hold one record of {size(record_bytes, least=True)}"
            )
        self.budget_bytes = budget_bytes
        self.record_bytes = record_bytes
        self.n_slots = n_slots
        try:
            memory = page_aligned(n_slots * record_bytes, huge=True)
        except OSError as error:
            raise MemoryRefused(
                f"the kernel gives no {size(budget_bytes)} of memory: {error.strerror}"
            ) from error
        self.records: Bytes = memory.reshape(n_slots, record_bytes)
        self._free: Rows = np.arange(n_slots, dtype=np.int64)[::-1].copy()
        self._n_free = n_slots
        self._taken = np.zeros(n_slots, dtype=np.bool_)
        self.pinned = False

    @property
    def free_slots(self) -> int:
        return self._n_free

    @property
    def used_bytes(self) -> int:
        return (self.n_slots - self._n_free) * self.record_bytes

    def allocate(self, n: int) -> Rows:
        """Take n rows, int64[n]. Raises TierFull and takes nothing when fewer are free.

        The rows hold whatever was in them before.
        """
        if n < 0:
            raise ValueError(f"cannot allocate {n} rows")
        if n > self._n_free:
            raise TierFull(f"{n} records asked of the host tier, {self._n_free} are free")
        rows = self._free[self._n_free - n : self._n_free][::-1].copy()
        self._n_free -= n
        self._taken[rows] = True
        return rows

    def free(self, rows: npt.ArrayLike) -> None:
        """Give rows back. Raises ValueError, changing nothing, if one is not taken or is named twice."""
        given = np.asarray(rows)
        if given.size == 0:
            return
        if given.ndim != 1 or given.dtype.kind not in "iu":
            raise ValueError(f"rows must be one-dimensional integers, got {given.dtype}{list(given.shape)}")
        if given.min() < 0 or given.max() >= self.n_slots:
            raise ValueError(f"rows outside 0..{self.n_slots - 1}")
        if len(np.unique(given)) != len(given) or not self._taken[given].all():
            raise ValueError("a row is freed twice or was never allocated")
        self._taken[given] = False
        self._free[self._n_free : self._n_free + len(given)] = given[::-1]
        self._n_free += len(given)

    def give_back(self) -> None:
        """Let the kernel have the memory of free rows, as far as it is whole pages; of a pinned slab it gets
        nothing, for a device would go on using the pages that were there."""
        if self.pinned:
            return
        free = np.sort(self._free[: self._n_free])
        for span in np.split(free, np.flatnonzero(np.diff(free) > 1) + 1):
            if len(span):
                begin, end = int(span[0]), int(span[-1]) + 1
                give_back(self.records, begin * self.record_bytes, end * self.record_bytes)

    def check_integrity(self) -> None:
        """Free and taken rows partition the slab. AssertionError says otherwise."""
        free = self._free[: self._n_free]
        listed = np.zeros_like(self._taken)
        listed[free] = True
        assert int(listed.sum()) == len(free), "a row is free twice"
        assert not (listed & self._taken).any(), "a free row is marked taken"
        assert int(self._taken.sum()) + len(free) == self.n_slots, "rows were lost"
        assert self.records.nbytes <= self.budget_bytes, "the slab is larger than its budget"
