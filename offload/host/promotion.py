"""Copies of runs back into host memory, made while a scan passes over all their layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from spilld.offload.block_table import BlockTable, RunRef
from spilld.offload.system import Bytes, Rows

from .slab import HostSlab


class Promotion:
    """Takes rows for whole runs; runs that are not copied in every layer by the end give them back."""

    def __init__(self, slab: HostSlab, table: BlockTable, runs: Iterable[RunRef], columns: int) -> None:
        """Choose the runs and take rows for them.

        Args:
            slab: Where the copies go.
            table: The sequence's.
            runs: Candidates, runs of the table. Of those that lie on disk only, the first that fit are
                chosen.
            columns: How many block columns may be taken.
        """
        self._slab = slab
        self._table = table
        self._rows: dict[RunRef, Rows] = {}
        self._copied: Counter[RunRef] = Counter()
        for ref in runs:
            if ref.count > columns:
                return
            if (table.rows[0, ref.columns] < 0).all():
                self._rows[ref] = slab.allocate(ref.count)
                columns -= ref.count

    def copy(self, ref: RunRef, layer: int, memory: Bytes, offset: int) -> None:
        """Copy one layer of a run, if the run was chosen.

        Args:
            ref: The run.
            layer: The layer.
            memory: Where its extent lies.
            offset: Of the extent's first record in the memory.
        """
        if (rows := self._rows.get(ref)) is not None:
            width = self._slab.record_bytes[layer]
            start = offset + (ref.first - ref.base) * width
            records = memory[start : start + ref.count * width]
            self._slab.records[layer][rows[layer]] = records.reshape(ref.count, width)
            self._copied[ref] += 1

    def end(self) -> None:
        """Let runs that were copied in every layer be read from host memory; free the rows of the others."""
        for ref, rows in self._rows.items():
            if self._copied[ref] == len(rows):
                self._table.rows[:, ref.columns] = rows
                self._table.copied(ref)
            else:
                self._slab.free(rows)
        self._rows = {}
