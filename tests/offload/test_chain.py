"""The token-chain hash: equal for equal histories under equal roots, and for nothing else."""

from __future__ import annotations

from hashlib import blake2b
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spilld.offload.prefix_cache.block_hash import CHAIN_BYTES, chain_hash, root
from spilld.offload.record import SEALED

MODEL = bytes(range(32))
ROOT = root(MODEL, "k8v4")
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=6)
BLOCKS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), max_size=4)


def chain(blocks: list[list[int]], parent: bytes = ROOT) -> list[bytes]:
    hashes = [parent]
    for tokens in blocks:
        hashes.append(chain_hash(hashes[-1], tokens))
    return hashes


def test_known_vector() -> None:
    """32 bytes of parent, then every token as 4 bytes, lowest first."""
    tokens = [0, 1, 258, 151_643, 2**32 - 1]
    message = bytes(range(32)) + bytes.fromhex("00000000 01000000 02010000 5b500200 ffffffff")
    assert chain_hash(bytes(range(32)), tokens) == blake2b(message, digest_size=32).digest()
    assert len(ROOT) == len(chain_hash(ROOT, tokens)) == CHAIN_BYTES == 32


def test_known_root() -> None:
    """The fingerprint, then the name of the format; the tenant's key is blake2b's own."""
    for tenant in (b"", b"tenant", bytes(64)):
        assert root(MODEL, "int8", tenant) == blake2b(MODEL + b"int8", key=tenant, digest_size=32).digest()


def test_a_tenant_may_be_longer_than_a_key() -> None:
    """It is hashed to one; two that begin alike are different."""
    for tenant in ("é" * 33, "\N{WHALE}" * 64, "x" * 1000):
        secret = tenant.encode()
        key = blake2b(secret).digest()
        assert root(MODEL, "int8", secret) == blake2b(MODEL + b"int8", key=key, digest_size=32).digest()
        assert root(MODEL, "int8", secret) != root(MODEL, "int8", secret + b"x")


@given(parent=st.binary(min_size=32, max_size=32), tokens=TOKENS)
def test_it_is_blake2b_of_parent_and_tokens(parent: bytes, tokens: list[int]) -> None:
    message = parent + b"".join(token.to_bytes(4, "little") for token in tokens)
    assert chain_hash(parent, tokens) == blake2b(message, digest_size=32).digest()


@given(BLOCKS, BLOCKS)
def test_equal_only_for_equal_histories(one: list[list[int]], other: list[list[int]]) -> None:
    """Block by block: the hashes agree exactly as far as the tokens do."""
    for i, (a, b) in enumerate(zip(chain(one), chain(other), strict=False)):
        assert (a == b) == (one[:i] == other[:i])
    assert len(set(chain(one))) == len(one) + 1


def test_a_token_of_the_first_block_changes_every_later_hash() -> None:
    history = [[n] * 64 for n in range(5)]
    changed = [[0] * 63 + [1], *history[1:]]
    assert not set(chain(history)[1:]) & set(chain(changed)[1:])


def test_histories_that_only_look_alike_differ() -> None:
    alike = [
        [1, 2, 3],
        [3, 2, 1],
        [1, 2],
        [1, 2, 3, 0],
        [0, 1, 2, 3],
        [],
        [0],
        [1 << 8],
        [1 << 16],
        [1 << 24],
    ]
    hashes = [chain_hash(ROOT, tokens) for tokens in alike]
    assert all(a != b for a, b in combinations(hashes, 2))


@given(BLOCKS, st.binary(max_size=63), st.binary(max_size=64))
def test_tenants_share_nothing(history: list[list[int]], tenant: bytes, other: bytes) -> None:
    """Not even where both send the same tokens; keys that only differ in length are two keys."""
    mine = set(chain(history, root(MODEL, "k8v4", tenant)))
    for stranger in {other, tenant + b"\0"} - {tenant}:
        assert not mine & set(chain(history, root(MODEL, "k8v4", stranger)))


@given(BLOCKS)
def test_models_and_formats_share_nothing(history: list[list[int]]) -> None:
    roots = [root(model, form) for model in (MODEL, bytes(32)) for form in SEALED]
    hashes = [name for parent in roots for name in chain(history, parent)]
    assert len(set(hashes)) == len(hashes)


def test_tokens_of_an_array_count_as_those_of_a_list() -> None:
    tokens = [7, 8, 151_643]
    for dtype in (np.int32, np.int64, np.uint32, ">i8"):
        assert chain_hash(ROOT, np.array(tokens, dtype).tolist()) == chain_hash(ROOT, tokens)
    assert chain_hash(ROOT, tuple(tokens)) == chain_hash(ROOT, tokens)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_what_is_no_token_is_no_hash(token: int) -> None:
    with pytest.raises(OverflowError):
        chain_hash(ROOT, [1, token])
