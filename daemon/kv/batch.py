"""The batch of a step: tokens of several sequences, packed row by row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from .sequence import KVSequence


@dataclass(eq=False)
class BatchItem:
    """Tokens of one sequence in a step, and what became of them.

    A step notes here what it finds of the item.

    Attributes:
        sequence: The sequence.
        count: Number of tokens.
        position: Position of the first token.
        start: Row of the first token in the batch.
        read_bytes: Bytes of KV that attention read, by tier.
        hits: Extents that were in memory when attention came to them.
        stalls: Extents that attention had to wait for.
        failure: Why some of the item's KV could not be read; None if all could.
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
        """The item's rows of the batch."""
        return slice(self.start, self.start + self.count)

    @property
    def last(self) -> int:
        """Position of the newest token."""
        return self.position + self.count - 1

    @property
    def positions(self) -> range:
        """Positions of the item's tokens."""
        return range(self.position, self.last + 1)

    @property
    def tokens(self) -> list[int]:
        """Ids of the item's tokens."""
        return self.sequence.tokens[self.position : self.last + 1]


class Batch:
    """Items in the order of their rows.

    Those of one token come first, as attention computes them together.
    """

    def __init__(self, items: Iterable[BatchItem]) -> None:
        self.items = tuple(sorted(items, key=lambda item: item.count > 1))
        starts = accumulate((item.count for item in self.items), initial=0)
        for item, start in zip(self.items, starts, strict=False):
            item.start = start
        self.total = sum(item.count for item in self.items)
        """Number of rows."""
        self.single = sum(item.count == 1 for item in self.items)
        """Number of items of one token: rows [0, single)."""

    @property
    def tokens(self) -> list[int]:
        """Token ids of all rows."""
        return [token for item in self.items for token in item.tokens]

    @property
    def positions(self) -> list[int]:
        """Positions of all rows."""
        return [position for item in self.items for position in item.positions]
