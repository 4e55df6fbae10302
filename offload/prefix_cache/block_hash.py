"""The token-chain hash: names a block by every token up to its end, under a tenant's key."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from spilld.offload.record import BLOCK

CHAIN_BYTES = 32


def root(fingerprint: bytes, form: str, tenant: bytes = b"") -> bytes:
    """Return the parent hash of a sequence's block 0: KV is shared within one model, format and tenant only.

    The tenant's secret separates tenants: without it the hashes of what is stored under it cannot be
    computed. One longer than a key of blake2b is hashed first, as in HMAC (RFC 2104, section 2).
    """
    key = tenant if len(tenant) <= blake2b.MAX_KEY_SIZE else blake2b(tenant).digest()
    return blake2b(fingerprint + form.encode(), key=key, digest_size=CHAIN_BYTES).digest()


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return blake2b(parent || token ids as little-endian uint32): equal only for equal histories."""
    return blake2b(parent + np.asarray(tokens, "<u4").tobytes(), digest_size=CHAIN_BYTES).digest()


def chain(parent: bytes, tokens: Sequence[int], blocks: int) -> list[bytes]:
    """Return the hashes of so many whole blocks of tokens, which follow `parent`: a block or the root."""
    found = []
    for block in range(blocks):
        parent = chain_hash(parent, tokens[block * BLOCK : (block + 1) * BLOCK])
        found.append(parent)
    return found
