"""Runs on their way back: a scan that passes all layers of a run copies it into host memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from spilld.offload.system import Bytes, Rows
from spilld.offload.table import BlockTable, RunRef

from .slab import HostSlab


class Promotion:
    """Takes rows for whole runs at once; what was not copied in every layer by the end gives them back."""

    def __init__(self, slab: HostSlab, table: BlockTable, runs: Iterable[RunRef], columns: int) -> None:
        """Of those of these runs of `table` that lie on disk only, the first that fit `columns` columns."""
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
        """One layer of a run, if it is one of those. offset: of its extent's first record in memory."""
        if (rows := self._rows.get(ref)) is not None:
            width = self._slab.record_bytes[layer]
            start = offset + (ref.first - ref.base) * width
            records = memory[start : start + ref.count * width]
            self._slab.records[layer][rows[layer]] = records.reshape(ref.count, width)
            self._copied[ref] += 1

    def end(self) -> None:
        """What was copied whole is read from host memory from now on."""
        for ref, rows in self._rows.items():
            if self._copied[ref] == len(rows):
                self._table.rows[:, ref.columns] = rows
                self._table.copied(ref)
            else:
                self._slab.free(rows)
        self._rows = {}
