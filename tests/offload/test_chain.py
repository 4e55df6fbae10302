"""The token-chain hash: equal for equal histories under equal keys, and for nothing else."""

from __future__ import annotations

from hashlib import blake2b
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spilld.offload.chain import CHAIN_BYTES, ROOT, chain_hash

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=6)
BLOCKS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), max_size=4)


def chain(blocks: list[list[int]], key: bytes = b"") -> list[bytes]:
    hashes = [ROOT]
    for tokens in blocks:
        hashes.append(chain_hash(hashes[-1], tokens, key))
    return hashes


def test_known_vector() -> None:
    """32 bytes of parent, then every token as 4 bytes, lowest first; the key is blake2b's own."""
    tokens = [0, 1, 258, 151_643, 2**32 - 1]
    message = bytes(range(32)) + bytes.fromhex("00000000 01000000 02010000 5b500200 ffffffff")
    for key in (b"", b"tenant", bytes(64)):
        expected = blake2b(message, key=key, digest_size=32).digest()
        assert chain_hash(bytes(range(32)), tokens, key) == expected
    assert bytes(32) == ROOT
    assert len(chain_hash(ROOT, tokens)) == CHAIN_BYTES == 32


@given(parent=st.binary(min_size=32, max_size=32), tokens=TOKENS, key=st.binary(max_size=64))
def test_it_is_blake2b_of_parent_and_tokens(parent: bytes, tokens: list[int], key: bytes) -> None:
    message = parent + b"".join(token.to_bytes(4, "little") for token in tokens)
    assert chain_hash(parent, tokens, key) == blake2b(message, key=key, digest_size=32).digest()


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


@given(TOKENS, st.binary(max_size=63), st.binary(max_size=63))
def test_tenants_share_nothing(tokens: list[int], key: bytes, other: bytes) -> None:
    assert (chain_hash(ROOT, tokens, key) == chain_hash(ROOT, tokens, other)) == (key == other)
    assert chain_hash(ROOT, tokens, key) != chain_hash(ROOT, tokens, key + b"\0")


def test_tokens_of_an_array_count_as_those_of_a_list() -> None:
    tokens = [7, 8, 151_643]
    for dtype in (np.int32, np.int64, np.uint32, ">i8"):
        assert chain_hash(ROOT, np.array(tokens, dtype).tolist()) == chain_hash(ROOT, tokens)
    assert chain_hash(ROOT, tuple(tokens)) == chain_hash(ROOT, tokens)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_what_is_no_token_is_no_hash(token: int) -> None:
    with pytest.raises(OverflowError):
        chain_hash(ROOT, [1, token])
    with pytest.raises(ValueError, match="key"):
        chain_hash(ROOT, [1], bytes(65))
