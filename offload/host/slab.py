"""The host slab: memory for records, allocated by the block column."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from spilld.offload.errors import BudgetTooSmall, MemoryRefused, TierFull
from spilld.offload.size import size
from spilld.offload.system import Bytes, Rows, give_back, page_aligned


class HostSlab:
    """Memory for a fixed number of block columns in one mapping, and the only place that counts their bytes.

    A column is a record in every layer. Records of one size share a pool; a row is a record's place in units
    of its size, so that it begins at byte row * record_bytes of `memory` whatever lies before it. Memory is
    touched lowest row first and freed rows are reused first, so that the resident size follows use. Owned by
    one thread; others may read and write rows they were given.

    Attributes:
        memory: uint8 [bytes], page-aligned, no more than budget_bytes.
        record_bytes: Of each layer.
        n_columns: Columns that fit.
        pinned: A device uses the memory: none of it goes back to the kernel.
    """

    def __init__(self, budget_bytes: int, record_bytes: Sequence[int]) -> None:
        """Map the memory.

        Args:
            budget_bytes: The most that records may take.
            record_bytes: Bytes of a record in each layer, multiples of 64.

        Raises:
            BudgetTooSmall: Not even one column fits.
            MemoryRefused: The kernel does not give the memory.
        """
        if not record_bytes or any(nbytes < 64 or nbytes % 64 for nbytes in record_bytes):
            raise ValueError(f"record_bytes must be positive multiples of 64, got {list(record_bytes)}")
        self.budget_bytes = budget_bytes
        self.record_bytes = tuple(record_bytes)
        self.column_bytes = sum(record_bytes)
        self.n_columns = columns_within(budget_bytes, record_bytes)
        if self.n_columns < 1:
            raise BudgetTooSmall(
                f"{size(budget_bytes)} cannot hold one block of {size(self.column_bytes, least=True)}"
            )
        self._pools = _pools(self.record_bytes, self.n_columns)
        try:
            self.memory = page_aligned(self._pools[-1].end, huge=True)
        except OSError as error:
            raise MemoryRefused(
                f"the kernel gives no {size(budget_bytes)} of memory: {error.strerror}"
            ) from error
        self.pinned = False
        views = {pool.record_bytes: self._view(pool.record_bytes) for pool in self._pools}
        self.records: tuple[Bytes, ...] = tuple(views[nbytes] for nbytes in self.record_bytes)
        """Of each layer uint8 [rows, record_bytes], a view of the memory indexed by row."""

    def _view(self, record_bytes: int) -> Bytes:
        rows = len(self.memory) // record_bytes
        return self.memory[: rows * record_bytes].reshape(rows, record_bytes)

    @property
    def free_columns(self) -> int:
        """Number of columns that can be taken."""
        pool = self._pools[0]
        return pool.n_free // len(pool.layers)

    @property
    def used_bytes(self) -> int:
        """Bytes of the columns that are taken."""
        return (self.n_columns - self.free_columns) * self.column_bytes

    def allocate(self, columns: int) -> Rows:
        """Take columns, uninitialised.

        Returns:
            int64 [layers, columns], their rows.

        Raises:
            TierFull: Fewer are free; nothing is taken then.
        """
        if columns < 0:
            raise ValueError(f"cannot allocate {columns} columns")
        if columns > self.free_columns:
            raise TierFull(f"host memory has no room for {columns} blocks, {self.free_columns} are free")
        rows = np.empty((len(self.record_bytes), columns), np.int64)
        for pool in self._pools:
            rows[pool.layers] = pool.take(columns)
        return rows

    def free(self, rows: npt.ArrayLike) -> None:
        """Give columns back, int64 [layers, columns].

        Raises:
            ValueError: A row is not taken, or is named twice; nothing has changed.
        """
        given = np.asarray(rows)
        if given.ndim != 2 or len(given) != len(self.record_bytes) or given.dtype.kind not in "iu":
            raise ValueError(f"rows must be integers of each layer, got {given.dtype}{list(given.shape)}")
        if given.size == 0:
            return
        parts = [(pool, given[pool.layers].ravel()) for pool in self._pools]
        for pool, part in parts:
            pool.check(part)
        for pool, part in parts:
            pool.put(part)

    def give_back(self) -> None:
        """Return the memory of free rows to the kernel, as far as it is whole pages.

        Nothing of a pinned slab is returned, for a device would go on using the pages that were there.
        """
        if self.pinned:
            return
        for pool in self._pools:
            for begin, end in pool.free_bytes():
                give_back(self.memory, begin, end)

    def check_integrity(self) -> None:
        """Raise AssertionError unless free and taken rows partition the slab."""
        assert len(self.memory) <= self.budget_bytes, "the slab is larger than its budget"
        for pool in self._pools:
            pool.check_integrity()
            assert pool.n_free == self.free_columns * len(pool.layers), "a column is free in some layers only"
        for pool, following in zip(self._pools, self._pools[1:], strict=False):
            assert pool.end <= following.first * following.record_bytes, "pools overlap"


class _SlabPool:
    """Rows first .. first + n - 1, for the records of one size in these layers."""

    def __init__(self, record_bytes: int, layers: list[int], first: int, n: int) -> None:
        self.record_bytes = record_bytes
        self.layers = layers
        self.first = first
        self.n = n
        self.n_free = n
        self._free: Rows = np.arange(first, first + n, dtype=np.int64)[::-1].copy()
        self._taken = np.zeros(n, dtype=np.bool_)

    @property
    def end(self) -> int:
        """Where the pool ends in the memory, in bytes."""
        return (self.first + self.n) * self.record_bytes

    def take(self, columns: int) -> Rows:
        """Take the lowest free rows, int64 [layers of the pool, columns]; there must be so many."""
        n = len(self.layers) * columns
        rows = self._free[self.n_free - n : self.n_free][::-1].copy()
        self.n_free -= n
        self._taken[rows - self.first] = True
        return rows.reshape(len(self.layers), columns)

    def check(self, rows: Rows) -> None:
        """Raise ValueError unless all rows are taken, and none is named twice."""
        if rows.min() < self.first or rows.max() >= self.first + self.n:
            raise ValueError(f"rows outside {self.first}..{self.first + self.n - 1}")
        if len(np.unique(rows)) != len(rows) or not self._taken[rows - self.first].all():
            raise ValueError("a row is freed twice or was never allocated")

    def put(self, rows: Rows) -> None:
        self._taken[rows - self.first] = False
        self._free[self.n_free : self.n_free + len(rows)] = rows[::-1]
        self.n_free += len(rows)

    def free_bytes(self) -> list[tuple[int, int]]:
        """Return the byte ranges [begin, end) of the memory in which free rows are adjacent."""
        free = np.sort(self._free[: self.n_free])
        spans = np.split(free, np.flatnonzero(np.diff(free) > 1) + 1)
        width = self.record_bytes
        return [(int(span[0]) * width, (int(span[-1]) + 1) * width) for span in spans if len(span)]

    def check_integrity(self) -> None:
        free = self._free[: self.n_free] - self.first
        listed = np.zeros_like(self._taken)
        listed[free] = True
        assert int(listed.sum()) == len(free), "a row is free twice"
        assert not (listed & self._taken).any(), "a free row is marked taken"
        assert int(self._taken.sum()) + len(free) == self.n, "rows were lost"


def columns_within(budget_bytes: int, record_bytes: Sequence[int]) -> int:
    """Return how many block columns fit so many bytes, with records of these sizes in the layers."""
    columns = budget_bytes // sum(record_bytes)
    while columns and _places(record_bytes, columns)[1] > budget_bytes:
        columns -= 1
    return columns


def _pools(record_bytes: Sequence[int], columns: int) -> list[_SlabPool]:
    """Make a pool for each size of records."""
    layers: dict[int, list[int]] = defaultdict(list)
    for layer, nbytes in enumerate(record_bytes):
        layers[nbytes].append(layer)
    firsts, _ = _places(record_bytes, columns)
    return [
        _SlabPool(nbytes, layers[nbytes], first, len(layers[nbytes]) * columns) for nbytes, first in firsts
    ]


def _places(record_bytes: Sequence[int], columns: int) -> tuple[list[tuple[int, int]], int]:
    """Return (record size, first row) of each pool, and where the last pool ends, in bytes.

    A pool begins at a multiple of its record size.
    """
    firsts, end = [], 0
    for nbytes, layers in Counter(record_bytes).items():
        firsts.append((nbytes, -(-end // nbytes)))
        end = (firsts[-1][1] + layers * columns) * nbytes
    return firsts, end
