"""Window checkpoints: the exact K/V that a sequence needs beside its sealed blocks to be continued.

Exact numbers of a cell were computed from exact numbers of the cell before, so sealed blocks cannot replace
them; without a checkpoint a sequence is computed again from its first token. A checkpoint of n tokens holds
the sinks and positions [boundary(n - 1), n) of the KV window. It serves every sequence that begins with the
same cells before the one of its last token, and shares some tokens in that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spilld.cuda_ext.memory.windows import Numbers
from spilld.offload.block_table import RunRef
from spilld.offload.disk.files.extent import RunKey
from spilld.offload.prefix_cache.block_hash import chain
from spilld.offload.store.store import Store
from spilld.offload.system import Bytes

from .attention_span import (
    BLOCK,
    BLOCKS_PER_CELL,
    CELL,
    SINKS,
    boundary,
    sealed_by,
    segments,
    window_offset,
)
from .sequence import KVSequence

CHECKPOINT_BLOCKS = 1 + 2 * BLOCKS_PER_CELL
"""The most blocks of a checkpoint: the sinks and two cells."""

ANCHOR_CELLS = 12
"""A checkpoint is saved every so many cells of a long prompt, for prompts that begin alike."""


@dataclass(frozen=True)
class ResumePoint:
    """Where a sequence can be continued.

    Attributes:
        position: Tokens that are computed.
        checkpoint: Run of the window checkpoint.
        refs: Where the sealed blocks lie, all but block 0.
        hashes: Chain hashes of the sealed blocks.
    """

    position: int
    checkpoint: RunKey
    refs: list[RunRef]
    hashes: list[bytes]

    @property
    def runs(self) -> list[RunKey]:
        """Every run that it needs."""
        return [*(ref.run for ref in self.refs), self.checkpoint]


def find_resume_point(store: Store, root: bytes, tokens: Sequence[int]) -> ResumePoint | None:
    """Return the longest stored beginning of a sequence; its last token always has to be computed.

    Args:
        store: Where blocks and checkpoints are looked up.
        root: First value of the token chain.
        tokens: All tokens of the sequence.

    Returns:
        None if no beginning is stored.
    """
    hashes = chain(root, tokens, len(tokens) // BLOCK)
    refs = store.find(hashes)
    stored = refs[-1].blocks.stop if refs else 1
    for cell in range((len(tokens) - 2) // CELL, -1, -1):
        start, sealed = cell * CELL, sealed_by(cell * CELL)
        if sealed > stored:
            continue
        anchor = hashes[start // BLOCK - 1] if cell else root
        lengths = {run: _common(saved, tokens[start:-1]) for run, saved in store.checkpoints.find(anchor)}
        run = max(lengths, key=lambda run: lengths[run], default=None)
        if run is not None and lengths[run]:
            return ResumePoint(start + lengths[run], run, _below(refs, sealed), hashes[:sealed])
    return None


def save_checkpoint(
    store: Store, window: Numbers, sequence: KVSequence, instead_of: RunKey | None = None
) -> RunKey | None:
    """Begin to write a checkpoint of a sequence of which at least a cell is computed.

    Args:
        store: Where it goes.
        window: What the sequence's KV window holds.
        sequence: The sequence.
        instead_of: An earlier checkpoint that is deleted once this one is durable.

    Returns:
        Its run; None if the disk does not take it.
    """
    n, sealed = sequence.computed, sequence.table.chain
    cell = (n - 1) // CELL
    above = sequence.hashes(len(sealed), cell * BLOCKS_PER_CELL)
    anchor = [sequence.root, *sealed, *above][cell * BLOCKS_PER_CELL]
    blocks = -(-sum(b - a for a, b in _slots(n)) // BLOCK)
    numbers = store.checkpoints.buffers(blocks)
    for layer, planes in enumerate(window):
        tokens, at = _tokens(numbers[layer], planes), 0
        for a, b in _slots(n):
            tokens[:, :, at : at + b - a] = planes[:, :, a:b]
            at += b - a
    tokens_after = sequence.tokens[cell * CELL : n]
    return store.checkpoints.save(anchor, tokens_after, boundary(n - 1) // BLOCK, numbers, instead_of)


def restore_checkpoint(store: Store, window: Numbers, resume: ResumePoint) -> None:
    """Fill a KV window with what a sequence of resume.position tokens sees exactly.

    Raises:
        ReadFailed: The checkpoint cannot be read.
    """
    for planes, numbers in zip(window, store.checkpoints.read(resume.checkpoint), strict=True):
        tokens, at = _tokens(numbers, planes), 0
        for a, b in _slots(resume.position):
            planes[:, :, a:b] = tokens[:, :, at : at + b - a]
            at += b - a


def _tokens(numbers: Bytes, planes: Numbers) -> Numbers:
    """Return the numbers of a checkpoint as a view [2, kv_heads, tokens, head_dim]."""
    _, kv_heads, _, head_dim = planes.shape
    rows = numbers.reshape(-1).view(planes.dtype).reshape(-1, 2, kv_heads, head_dim)
    return rows.transpose(1, 2, 0, 3)


def _slots(n: int) -> list[tuple[int, int]]:
    """Return window slots [start, stop) of the sinks and of positions [boundary(n - 1), n), in order."""
    newest = [(window_offset(a), window_offset(a) + b - a) for a, b in segments(boundary(n - 1), n)]
    return [(0, SINKS), *newest]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _below(refs: Sequence[RunRef], stop: int) -> list[RunRef]:
    """Return the same blocks as far as they lie below `stop`."""
    return [
        RunRef(ref.run, ref.base, ref.first, min(ref.count, stop - ref.first))
        for ref in refs
        if ref.first < stop
    ]
