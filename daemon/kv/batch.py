"""A sequence's tokens in a step, and what they see: the same for every layer with one sliding window."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from spilld.cuda_ext.memory.cpu_windows import CpuBackend
from spilld.offload.disk.prefetch import Ticket
from spilld.offload.promotion import Promotion
from spilld.offload.table import RunRef

from .sequence import Sequence
from .visibility import (
    SINKS,
    boundary,
    exact_ranges,
    lowest_visible,
    slot,
    stored_blocks,
)

Blocks = npt.NDArray[np.int64]
Positions = npt.NDArray[np.int64]


@dataclass
class Slice:
    """One sequence's tokens in a step: rows [start, start + count) of the packed batch it runs in."""

    sequence: Sequence
    count: int
    position: int
    start: int = 0
    tickets: dict[int, list[tuple[RunRef, Ticket]]] = field(default_factory=dict)
    """Per layer, the extents that are being read for it, in the order in which they will be used."""
    promotion: Promotion | None = None
    read_bytes: dict[str, int] = field(default_factory=lambda: {"device": 0, "host": 0, "disk": 0})
    hits: int = 0
    stalls: int = 0
    """Extents that were in memory when attention came to them, and those it had to wait for."""
    failure: Exception | None = None
    """Why some of its KV could not be had."""
    _bounds: dict[int | None, tuple[Positions, Positions]] = field(default_factory=dict)
    _exact: dict[int | None, tuple[Positions, int]] = field(default_factory=dict)
    _ranges: dict[tuple[int, int | None], Positions] = field(default_factory=dict)
    _in_host: dict[int | None, Blocks] = field(default_factory=dict)
    _on_disk: dict[tuple[RunRef, int | None], Blocks] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def bounds(self, window: int | None) -> tuple[Positions, Positions]:
        """Per query, the stored positions [low, high) that it sees in layers with this window."""
        if window not in self._bounds:
            low = np.array([max(SINKS, lowest_visible(p, window)) for p in self.positions])
            self._bounds[window] = low, np.array([boundary(p) for p in self.positions])
        return self._bounds[window]

    def exact(self, window: int | None) -> tuple[Positions, int]:
        """What its first query sees exactly: window slots [start, stop), int64 [n, 2], and their number."""
        if window not in self._exact:
            seen = np.array(slots(self.position, window))
            self._exact[window] = seen, int(np.diff(seen).sum())
        return self._exact[window]

    def ranges(self, start: int, stop: int, window: int | None) -> Positions:
        """The window slots that each query at [start, stop) of one cell sees: int64 [queries, n, 2], where an
        empty range counts nothing."""
        if (start, window) not in self._ranges:
            seen = [slots(position, window) for position in range(start, stop)]
            most = max(map(len, seen))
            padded = [[*ranges, *[(0, 0)] * (most - len(ranges))] for ranges in seen]
            self._ranges[start, window] = np.array(padded)
        return self._ranges[start, window]

    def in_host(self, window: int | None) -> Blocks:
        """Blocks that some query sees in stored form and that lie in host memory: the same in every layer."""
        if window not in self._in_host:
            visible = stored_blocks(self.position, self.last, window)
            rows = self.sequence.table.rows[0, visible.start : visible.stop]
            self._in_host[window] = np.flatnonzero(rows >= 0) + visible.start
        return self._in_host[window]

    def on_disk(self, ref: RunRef, window: int | None) -> Blocks:
        """Blocks of a run that some query sees in stored form and that do not lie in host memory, ascending:
        the same in every layer."""
        if (ref, window) not in self._on_disk:
            visible = stored_blocks(self.position, self.last, window)
            self._on_disk[ref, window] = self.sequence.table.extent_blocks(ref, visible)
        return self._on_disk[ref, window]

    def mask(
        self, start: int, stop: int, window: int | None, group: int, backend: CpuBackend
    ) -> torch.Tensor:
        """For queries at [start, stop) of one cell, over the exact tokens any of them sees, oldest first."""
        if (start, window) not in self._masks:
            ranges = [*exact_ranges(start, window), (start + 1, stop)]
            positions = torch.cat([torch.arange(a, b) for a, b in ranges])
            own = torch.arange(start, stop)[:, None]
            hidden = positions > own
            if window is not None:
                hidden |= positions <= own - window
            self._masks[start, window] = backend.mask(hidden, group)
        return self._masks[start, window]

    @property
    def last(self) -> int:
        """Position of the newest token."""
        return self.position + self.count - 1

    @property
    def positions(self) -> range:
        return range(self.position, self.last + 1)

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens[self.position : self.last + 1]


@dataclass(frozen=True)
class Call:
    """One layer's attention for one slice. window: tokens a query sees back, itself included; None = all."""

    layer: int
    part: Slice
    scale: float
    softcap: float
    window: int | None


def places(position: int) -> tuple[int, ...]:
    """The slots of a token: the sinks have two while their cell is one of the newest."""
    return (slot(position), position) if position < SINKS else (slot(position),)


def slots(position: int, window: int | None) -> list[tuple[int, int]]:
    """Window slots [start, stop) of what the query at `position` sees exactly."""
    ranges = []
    for a, b in exact_ranges(position, window):
        start = a if boundary(position) and a < SINKS else slot(a)
        ranges.append((start, start + b - a))
    return ranges
