"""The tokens and the KV of one context."""

from __future__ import annotations

from dataclasses import dataclass, field

from spilld.offload.block_table import BlockTable
from spilld.offload.prefix_cache.block_hash import chain

from .attention_span import BLOCK
from .recurrent_state import RecurrentState


@dataclass
class KVSequence:
    """A sequence of tokens and where their KV lies.

    tokens[:computed] have K/V, in the window and in stored blocks; the rest are still to be computed.
    """

    table: BlockTable
    window: int
    root: bytes
    """Parent of block 0 in the token chain: names model, format and tenant."""
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    state: RecurrentState | None = None
    """Of a model that has layers with state: that after `computed` tokens."""

    def advance(self, count: int) -> None:
        """Note that a step has computed `count` more tokens."""
        self.computed += count
        if self.state is not None:
            self.state.advance(self.computed)

    def restart(self) -> None:
        """Note that nothing is computed any more."""
        self.computed = 0
        if self.state is not None:
            self.state.reset()

    def hashes(self, start: int, stop: int) -> list[bytes]:
        """Return token-chain hashes of blocks [start, stop).

        The table must have block start - 1, if there is one.
        """
        parent = self.table.chain[start - 1] if start else self.root
        return chain(parent, self.tokens[start * BLOCK : max(start, stop) * BLOCK], stop - start)
