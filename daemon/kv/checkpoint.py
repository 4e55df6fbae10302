"""Window checkpoints: the exact K/V that a sequence needs beside its sealed blocks to be continued.

Exact numbers of a cell were computed from exact numbers of the cell before, so sealed blocks cannot replace
them; without a checkpoint a sequence is computed again from its first token. A checkpoint of n tokens holds
the sinks and positions [boundary(n - 1), n) of the KV window. It serves every sequence that begins with the
same cells before the one of its last token, and shares some tokens in that one.

Of a model that has layers with state it holds the state after n tokens, too, in blocks behind those of the
window. A state cannot step back, so it serves the sequences that begin with its n tokens, and goes on behind
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spilld.cuda_ext.memory.windows import Numbers
from spilld.offload.block_table import RunRef
from spilld.offload.disk.files.extent import RunKey
from spilld.offload.errors import ExtentMissing
from spilld.offload.prefix_cache.block_hash import chain
from spilld.offload.store.store import Store
from spilld.offload.store_layout import StoreLayout
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
from .recurrent_state import RecurrentState, StateShape
from .sequence import KVSequence

CHECKPOINT_BLOCKS = 1 + 2 * BLOCKS_PER_CELL
"""The most blocks of a checkpoint: the sinks and two cells."""

ANCHOR_CELLS = 12
"""A checkpoint is saved every so many cells of a long prompt, for prompts that begin alike."""

STATE_SHARE = 10
"""Those with a state are rarer if need be: they take at most this fraction, as its denominator, of the bytes
of the records between them."""


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


def state_blocks(states: StateShape | None, layouts: StoreLayout) -> int:
    """Return how many blocks of a checkpoint hold the state.

    Args:
        states: What layers with state keep; None if the model has none.
        layouts: Of the numbers of a checkpoint (Checkpoints.layouts).
    """
    return 0 if states is None else -(-states.nbytes // layouts.column_bytes)


def checkpoint_cells(states: StateShape | None, records: StoreLayout) -> int:
    """Return after how many cells of a prompt a checkpoint is saved.

    Args:
        states: What layers with state keep; None if the model has none.
        records: The layouts of sealed blocks.
    """
    if states is None:
        return ANCHOR_CELLS
    blocks = CHECKPOINT_BLOCKS + state_blocks(states, records.raw)
    cell_bytes = BLOCKS_PER_CELL * records.column_bytes
    return max(ANCHOR_CELLS, -(-STATE_SHARE * blocks * records.raw.column_bytes // cell_bytes))


def stored_tokens(store: Store, root: bytes, tokens: Sequence[int]) -> int:
    """Return how many tokens at the beginning of a sequence have stored blocks, whatever checkpoints are."""
    refs = store.find(chain(root, tokens, len(tokens) // BLOCK))
    return refs[-1].blocks.stop * BLOCK if refs else 0


def find_resume_point(
    store: Store, root: bytes, tokens: Sequence[int], *, exactly: bool
) -> ResumePoint | None:
    """Return the longest stored beginning of a sequence; its last token always has to be computed.

    Args:
        store: Where blocks and checkpoints are looked up.
        root: First value of the token chain.
        tokens: All tokens of the sequence.
        exactly: Whether the model has layers with state, so that only the positions of checkpoints will do.

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
        found = (
            (run, saved, _common(saved, tokens[start:-1])) for run, saved in store.checkpoints.find(anchor)
        )
        lengths = {run: length for run, saved, length in found if not exactly or length == len(saved)}
        run = max(lengths, key=lambda run: lengths[run], default=None)
        if run is not None and lengths[run]:
            return ResumePoint(start + lengths[run], run, _below(refs, sealed), hashes[:sealed])
    return None


def save_checkpoint(
    store: Store, window: Sequence[Numbers], sequence: KVSequence, instead_of: RunKey | None = None
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
    blocks = window_blocks(n)
    behind = 0 if sequence.state is None else state_blocks(sequence.state.shape, store.checkpoints.layouts)
    numbers = store.checkpoints.buffers(blocks + behind)
    for layer, planes in enumerate(window):
        tokens, at = _tokens(numbers[layer][:blocks], planes), 0
        for a, b in _slots(n):
            tokens[:, :, at : at + b - a] = planes[:, :, a:b]
            at += b - a
    if sequence.state is not None:
        for part, memory in _state_parts(sequence.state.bytes, [of[blocks:] for of in numbers]):
            memory[:] = part
    tokens_after = sequence.tokens[cell * CELL : n]
    return store.checkpoints.save(anchor, tokens_after, boundary(n - 1) // BLOCK, numbers, instead_of)


def restore_checkpoint(
    store: Store, window: Sequence[Numbers], resume: ResumePoint, state: RecurrentState | None = None
) -> None:
    """Fill a KV window with what a sequence of resume.position tokens sees exactly.

    The state that belongs to it is the next one afterwards (RecurrentState.next).

    Raises:
        ReadFailed: The checkpoint cannot be read.
    """
    blocks, rest = window_blocks(resume.position), None if state is None else state.next
    for planes, numbers in zip(window, store.checkpoints.read(resume.checkpoint), strict=True):
        tokens, at = _tokens(numbers[:blocks], planes), 0
        for a, b in _slots(resume.position):
            planes[:, :, a:b] = tokens[:, :, at : at + b - a]
            at += b - a
        if rest is not None:
            for part, memory in _state_parts(rest, [numbers[blocks:]]):
                part[:] = memory
                rest = rest[len(part) :]
    if rest is not None and len(rest):
        raise ExtentMissing("the checkpoint holds less than the state")


def window_blocks(position: int) -> int:
    """Return how many blocks of a checkpoint of so many tokens hold numbers of the window."""
    return -(-sum(b - a for a, b in _slots(position)) // BLOCK)


def _state_parts(state: Bytes, behind: Sequence[Bytes]) -> Iterator[tuple[Bytes, Bytes]]:
    """Yield each part of a state with where it lies in a checkpoint: layer by layer, one behind the other.

    Args:
        state: Bytes of the state.
        behind: Of each layer the blocks behind those of the window, uint8 [blocks, record_bytes].
    """
    for blocks in behind:
        memory = blocks.reshape(-1)
        part, state = state[: len(memory)], state[len(memory) :]
        yield part, memory[: len(part)]


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
