"""Where the blocks of one sequence lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spilld.offload.disk.files.extent import RunKey

ABSENT = -1


@dataclass(frozen=True)
class RunRef:
    """Blocks [first, first + count) of a sequence, durable on disk in one run whose first block is `base`."""

    run: RunKey
    base: int
    first: int
    count: int

    @property
    def blocks(self) -> range:
        return range(self.first, self.first + self.count)


class BlockTable:
    """Stored blocks 1 .. stop-1 of one sequence; block 0, the sinks, stays in the window.

    `rows[layer, block]` is the host row of a record, or ABSENT. A block is in host memory in every
    layer or in none. `chain[block]` is its token-chain hash. The rows of blocks from `sealed` on
    are there, but the step that fills them may not have ended. adopts: what others stored of the same chain
    may become its own. Blocks below `offered` were offered to the disk, which may have refused them.
    """

    def __init__(self, layers: int) -> None:
        self.promised = 0
        self.sealed = 1
        self.rows: npt.NDArray[np.int64] = np.full((layers, 1), ABSENT)
        self.chain: list[bytes] = []
        self.runs: list[RunRef] = []
        self.leaving: list[RunRef] = []
        self.idle = False
        self.adopts = True
        self.offered = 1

    @property
    def stop(self) -> int:
        """The first block that has no place yet."""
        return max(1, len(self.chain))

    def reach(self, blocks: int) -> None:
        """Let `rows` have a column for every block number up to `blocks`."""
        more = blocks + 1 - self.rows.shape[1]
        if more > 0:
            self.rows = np.pad(self.rows, ((0, 0), (0, more)), constant_values=ABSENT)

    def host_spans(self) -> tuple[range, ...]:
        """Sealed blocks that lie in host memory only and are not being written, as ascending ranges."""
        mine = self.rows[0] >= 0
        mine[self.sealed :] = False
        for ref in (*self.leaving, *self.runs):
            mine[ref.first : ref.first + ref.count] = False
        edges = np.flatnonzero(np.diff(np.concatenate(([0], mine.view(np.int8), [0]))))
        return tuple(range(a, b) for a, b in edges.reshape(-1, 2).tolist())

    def extent_blocks(self, ref: RunRef, visible: range) -> npt.NDArray[np.int64]:
        """Blocks of a run that a scan of `visible` must read from disk, ascending."""
        blocks = np.arange(max(ref.first, visible.start), min(ref.first + ref.count, visible.stop))
        absent: npt.NDArray[np.int64] = blocks[self.rows[0, blocks] < 0]
        return absent

    @property
    def host_blocks(self) -> int:
        return int(np.count_nonzero(self.rows[0] >= 0))

    def check_integrity(self) -> None:
        """Every block below `stop` lies in host memory in all layers, or on disk; others nowhere."""
        assert 1 <= self.sealed <= self.stop, "a block is sealed that has no place"
        present = self.rows >= 0
        assert (present == present[0]).all(), "a block is in host memory in some layers only"
        places = present[0].astype(int)
        for ref in self.runs:
            places[ref.first : ref.first + ref.count] += 1
        assert (places[1 : self.stop] >= 1).all(), "a block is nowhere"
        places[1 : self.stop] = 0
        assert not places.any(), "a block that was never grown has a place"

    @property
    def disk_blocks(self) -> int:
        """Blocks that lie on disk only."""
        return sum(ref.count for ref in self.runs) - sum(
            int(np.count_nonzero(self.rows[0, ref.first : ref.first + ref.count] >= 0)) for ref in self.runs
        )
