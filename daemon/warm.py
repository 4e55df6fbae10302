"""Steps that nobody asked for, before the first request: weights are in memory then, and kernels loaded."""

from __future__ import annotations

import secrets

from spilld.cuda_ext.window import WindowArena
from spilld.offload.chain import CHAIN_BYTES
from spilld.offload.store import Store

from .runner import Runner
from .sequence import Sequence
from .slices import Slice
from .visibility import CELL, highest_block, sealed_by

CHUNK = 16
"""Prompt tokens: enough for the kernels of many rows."""

SEALS = 2 * CELL
"""The first position that seals a cell."""


def warm_up(arena: WindowArena, store: Store, runner: Runner, chunk_tokens: int) -> None:
    """Compute a chunk of a prompt and a token behind it, and give back all that they took.

    They are deep in a sequence that does not exist, its window zeros, so that the chunk seals blocks and the
    token attends to records. Its chain begins with random bytes: no request can find any of it.
    """
    table, window = store.open(), arena.take()
    chunk = min(CHUNK, chunk_tokens)
    tokens, begun = [0] * (SEALS + 2), SEALS + 1 - chunk
    sequence = Sequence(table, window, secrets.token_bytes(CHAIN_BYTES), tokens, begun)
    try:
        arena.tensor[window].zero_()
        store.promise(table, highest_block(len(tokens)))
        store.grow(table, sequence.hashes(0, sealed_by(SEALS)))
        for count in (chunk, 1):
            runner.run([Slice(sequence, count, sequence.computed)], [[count - 1]])
            sequence.computed += count
    finally:
        runner.rest()
        store.forget(table)
        arena.give_back(window)
