"""The block table: where the blocks of one sequence lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spilld.offload.disk.files.extent import RunKey

ABSENT = -1
LEAVING = -2


@dataclass(frozen=True)
class RunRef:
    """Blocks [first, first + count) of a sequence, durable on disk in one run whose first block is `base`."""

    run: RunKey
    base: int
    first: int
    count: int

    @property
    def blocks(self) -> range:
        """The blocks' numbers."""
        return range(self.first, self.first + self.count)

    @property
    def columns(self) -> slice:
        """The blocks, as an index of the columns of a table."""
        return slice(self.first, self.first + self.count)


class BlockTable:
    """Stored blocks 1 .. stop-1 of one sequence; block 0, the sinks, stays in the window.

    Attributes:
        rows: int64 [layers, blocks], the host row of each record, or ABSENT. A block is in host memory in
            every layer or in none.
        chain: The token-chain hash of each block.
        runs: The blocks that are on disk; never two runs of one block.
        copies: Those of `runs` that may have blocks in host memory, too, the oldest copies first.
        leaving: The blocks that are being written.
        sealed: The rows of blocks from here on are there, but the step that fills them may not have ended.
        adopts: Whether runs that other sequences stored of the same chain may be used.
        offered: Blocks below were offered to the disk, which may have refused them.
        idle: No request is running on the sequence.
        reserved: Up to this block it may grow.
    """

    def __init__(self, layers: int) -> None:
        self.reserved = 0
        self.sealed = 1
        self.rows: npt.NDArray[np.int64] = np.full((layers, 1), ABSENT)
        self.chain: list[bytes] = []
        self.runs: list[RunRef] = []
        self.copies: dict[RunRef, None] = {}
        self.leaving: list[RunRef] = []
        self.idle = False
        self.adopts = True
        self.offered = 1
        self._run_of: npt.NDArray[np.int64] = np.full(1, ABSENT)
        """For each block, the index in `runs` of the run that holds it; or LEAVING, or ABSENT."""

    @property
    def stop(self) -> int:
        """The first block that has no place yet."""
        return max(1, len(self.chain))

    def reach(self, blocks: int) -> None:
        """Add columns, so that there is one for every block number up to `blocks`."""
        more = blocks + 1 - self.rows.shape[1]
        if more > 0:
            self.rows = np.pad(self.rows, ((0, 0), (0, more)), constant_values=ABSENT)
            self._run_of = np.pad(self._run_of, (0, more), constant_values=ABSENT)

    def add_runs(self, refs: Iterable[RunRef]) -> None:
        """Note that these blocks are on disk."""
        for ref in refs:
            self._run_of[ref.columns] = len(self.runs)
            self.runs.append(ref)
            if (self.rows[0, ref.columns] >= 0).any():
                self.copies[ref] = None

    def copied(self, ref: RunRef) -> None:
        """Note that blocks of one of `runs` are in host memory, too."""
        self.copies[ref] = None

    def begin_write(self, ref: RunRef) -> None:
        """Note that these blocks are being written to disk."""
        self._run_of[ref.columns] = LEAVING
        self.leaving.append(ref)

    def end_write(self, ref: RunRef) -> bool:
        """Note that a write has ended; return False if the table was emptied meanwhile."""
        if ref not in self.leaving:
            return False
        self.leaving.remove(ref)
        self._run_of[ref.columns] = ABSENT
        return True

    def clear(self) -> None:
        """Forget where every block lies; the chain stays."""
        self.rows[:] = ABSENT
        self._run_of[:] = ABSENT
        self.sealed = 1
        self.runs.clear()
        self.copies.clear()
        self.leaving.clear()

    def host_spans(self) -> tuple[range, ...]:
        """Return ascending ranges of sealed blocks that lie in host memory only and are not being written."""
        mine = (self.rows[0] >= 0) & (self._run_of == ABSENT)
        mine[self.sealed :] = False
        edges = np.flatnonzero(np.diff(np.concatenate(([0], mine.view(np.int8), [0]))))
        return tuple(range(a, b) for a, b in edges.reshape(-1, 2).tolist())

    def runs_to_read(self, visible: range) -> list[RunRef]:
        """Return the runs that a scan of the visible blocks must read from, in the order of `runs`."""
        seen = slice(visible.start, max(visible.start, visible.stop))
        absent = self._run_of[seen][self.rows[0, seen] < 0]
        return [self.runs[at] for at in np.unique(absent[absent >= 0])]

    def extent_blocks(self, ref: RunRef, visible: range) -> npt.NDArray[np.int64]:
        """Return the blocks of a run that a scan of `visible` must read from disk, ascending."""
        blocks = np.arange(max(ref.first, visible.start), min(ref.first + ref.count, visible.stop))
        absent: npt.NDArray[np.int64] = blocks[self.rows[0, blocks] < 0]
        return absent

    @property
    def host_blocks(self) -> int:
        """Number of blocks in host memory."""
        return int(np.count_nonzero(self.rows[0] >= 0))

    @property
    def disk_blocks(self) -> int:
        """Number of blocks that lie on disk only."""
        return int(np.count_nonzero((self._run_of >= 0) & (self.rows[0] < 0)))

    def check_integrity(self) -> None:
        """Check that all blocks below `stop`, and no others, lie in host memory in all layers or on disk."""
        assert 1 <= self.sealed <= self.stop, "a block is sealed that has no place"
        present = self.rows >= 0
        assert (present == present[0]).all(), "a block is in host memory in some layers only"
        run_of = np.full(self.rows.shape[1], ABSENT)
        for at, ref in enumerate(self.runs):
            assert (run_of[ref.columns] == ABSENT).all(), "two runs hold a block"
            run_of[ref.columns] = at
            assert ref in self.copies or not present[0, ref.columns].any(), "a copy is unknown"
        for ref in self.leaving:
            run_of[ref.columns] = LEAVING
        assert (run_of == self._run_of).all(), "a block is in another run than the table says"
        places = present[0].astype(int) + (run_of >= 0)
        assert (places[1 : self.stop] >= 1).all(), "a block is nowhere"
        places[1 : self.stop] = 0
        assert not places.any(), "a block that was never grown has a place"
