"""The token-chain hash: names a block by every token up to its end, under a tenant's key."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

CHAIN_BYTES = 32
ROOT = bytes(CHAIN_BYTES)
"""Parent of a sequence's block 0."""


def chain_hash(parent: bytes, tokens: Sequence[int], key: bytes = b"") -> bytes:
    """blake2b(key, parent || token ids as little-endian uint32): equal only for equal histories.

    The key (at most 64 bytes) separates tenants: without it a hash tells nothing about the tokens.
    """
    return blake2b(parent + np.asarray(tokens, "<u4").tobytes(), key=key, digest_size=CHAIN_BYTES).digest()
