"""The batch of a step: tokens of several sequences, packed row by row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from .sequence import KVSequence


@dataclass(eq=False)
class BatchItem:
    """Tokens of one sequence in a step, and what became of them.

    position is that of the first token; start is its row of the batch. What a step finds of an item, it notes
    here: the bytes of KV that attention read, by tier; how many extents were in memory when attention came to
    them (hits) and how many it had to wait for (stalls); and failure, why some of its KV could not be had.
    """

    sequence: KVSequence
    count: int
    position: int
    start: int = 0
    read_bytes: dict[str, int] = field(default_factory=lambda: {"device": 0, "host": 0, "disk": 0})
    hits: int = 0
    stalls: int = 0
    failure: Exception | None = None

    @property
    def rows(self) -> slice:
        """Of the batch."""
        return slice(self.start, self.start + self.count)

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


class Batch:
    """Items in the order of their rows. Those of one token come first: attention takes them together."""

    def __init__(self, items: Iterable[BatchItem]) -> None:
        self.items = tuple(sorted(items, key=lambda item: item.count > 1))
        starts = accumulate((item.count for item in self.items), initial=0)
        for item, start in zip(self.items, starts, strict=False):
            item.start = start
        self.total = sum(item.count for item in self.items)
        """Rows."""
        self.single = sum(item.count == 1 for item in self.items)
        """Items of one token: rows [0, single)."""

    @property
    def tokens(self) -> list[int]:
        return [token for item in self.items for token in item.tokens]

    @property
    def positions(self) -> list[int]:
        return [position for item in self.items for position in item.positions]
