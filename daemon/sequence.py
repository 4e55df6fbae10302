"""The tokens and the KV of one context."""

from __future__ import annotations

from dataclasses import dataclass, field

from spilld.offload.chain import ROOT, chain_hash
from spilld.offload.table import BlockTable

from .visibility import BLOCK


@dataclass
class Sequence:
    """tokens[:computed] have K/V, in the window and in stored blocks; the rest are still to be fed."""

    table: BlockTable
    window: int
    tokens: list[int] = field(default_factory=list)
    computed: int = 0

    def hashes(self, start: int, stop: int) -> list[bytes]:
        """Token-chain hashes of blocks [start, stop), where block start-1 is the newest in the table."""
        parent = self.table.chain[-1] if self.table.chain else ROOT
        found = []
        for block in range(start, stop):
            parent = chain_hash(parent, self.tokens[block * BLOCK : (block + 1) * BLOCK])
            found.append(parent)
        return found
