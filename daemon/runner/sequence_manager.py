"""Sequence manager: a sequence's KV as a window on the device and records in host memory and on disk."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Iterable

from spilld.cuda_ext.errors import OutOfMemory
from spilld.cuda_ext.memory.windows import KVWindows
from spilld.kv.attention_span import (
    BLOCK,
    CELL,
    boundary,
    highest_block,
    sealed_by,
)
from spilld.kv.batch import BatchItem
from spilld.kv.checkpoint import (
    checkpoint_cells,
    find_resume_point,
    restore_checkpoint,
    save_checkpoint,
    stored_tokens,
)
from spilld.kv.recurrent_state import RecurrentState, StateShape
from spilld.kv.sequence import KVSequence
from spilld.offload.disk.files.extent import RunKey
from spilld.offload.errors import ReadFailed
from spilld.offload.prefix_cache.block_hash import CHAIN_BYTES
from spilld.offload.store.store import Store

from .runner import Runner

log = logging.getLogger(__name__)

WARM_CHUNK = 16
"""Prompt tokens of the warm-up: enough for the kernels of many rows."""

SEALS = 2 * CELL
"""The first position that seals a cell."""


class SequenceManager:
    """Opens sequences, restores what was computed before, saves them, discards them."""

    def __init__(
        self, windows: KVWindows, store: Store, runner: Runner, states: StateShape | None = None
    ) -> None:
        """Manage sequences of a model.

        Args:
            windows: Their KV windows.
            store: Their records.
            runner: What reads for them.
            states: What their layers with state keep; None if the model has none.
        """
        self._windows = windows
        self._store = store
        self._runner = runner
        self._states = states
        self._state_bytes = 0 if states is None else states.sequence_bytes
        self.checkpoint_tokens = CELL * checkpoint_cells(states, store.layouts)
        """After how many tokens of a prompt a checkpoint is saved."""
        self.lost = False
        """Whether the store may have less of open sequences than it knows: nothing of them is saved."""

    @property
    def windows(self) -> int:
        """Number of sequences that can still be opened."""
        return self._windows.free

    def open(self, root: bytes, tokens: Iterable[int]) -> KVSequence:
        """Open a sequence of which nothing is computed.

        Args:
            root: First value of its token chain.
            tokens: What it begins with.

        Raises:
            ArenaFull: There is no free window.
            OutOfMemory: The device has no memory for the window.
        """
        state = None if self._states is None else RecurrentState(self._states)
        window = self._windows.take()
        sequence = KVSequence(self._store.open(), window, root, state=state)
        sequence.tokens.extend(tokens)
        return sequence

    def find(self, sequence: KVSequence) -> bool:
        """Take over what an earlier request computed of the same beginning, if it is still stored.

        Afterwards `sequence.computed` says how much that was.

        Returns:
            False if nothing was stored.
        """
        exactly = sequence.state is not None
        resume = find_resume_point(self._store, sequence.root, sequence.tokens, exactly=exactly)
        if resume is None:
            return False
        self._runner.rest()
        try:
            with self._windows.written(sequence.window) as window:
                restore_checkpoint(self._store, window, resume, sequence.state)
        except (ReadFailed, OutOfMemory) as failure:
            log.warning(
                "a sequence of %d tokens is computed from its beginning: %s", len(sequence.tokens), failure
            )
            return True
        self._store.attach(sequence.table, resume.refs, resume.hashes)
        sequence.advance(resume.position)
        return True

    def parting(self, sequence: KVSequence) -> int:
        """Return where a checkpoint would have saved computing what is stored of a sequence's beginning.

        That is where it parts from an earlier one, if its model has layers with state, which go on only from
        checkpoints: a position where a chunk may end.

        Returns:
            0 if there is no such position behind what is computed.
        """
        if self._states is None:
            return 0
        stored = min(stored_tokens(self._store, sequence.root, sequence.tokens), len(sequence.tokens) - 1)
        place = stored - stored % math.lcm(BLOCK, self._states.grid)
        return place if place >= max(CELL, sequence.computed + 1) else 0

    def save(self, sequence: KVSequence, instead_of: RunKey | None) -> RunKey | None:
        """Save what was computed of a sequence, for later sequences that begin alike. Between steps.

        Args:
            sequence: The sequence.
            instead_of: An earlier window checkpoint, which the new one replaces.

        Returns:
            The window checkpoint, None if there is none.
        """
        if sequence.computed < CELL or self.lost:
            return None
        self._store.settle()
        self._store.save(sequence.table)
        try:
            window = self._windows.read(sequence.window)
        except OutOfMemory as failure:
            log.warning("the end of a sequence of %d tokens is not saved: %s", len(sequence.tokens), failure)
            return None
        return save_checkpoint(self._store, window, sequence, instead_of)

    def reaches(self, sequence: KVSequence, tokens: list[int]) -> bool:
        """Return whether the sequence's window still holds what a continuation with these tokens needs.

        The window must hold what follows the beginning that they share: numbers of a cell replace those of
        the cell before the last, which its first token seals. A state cannot step back at all.
        """
        position = _continuation(sequence, tokens)
        if sequence.state is not None:
            return position == sequence.computed
        newest = max(0, sequence.computed - 1)
        within = boundary(position) == boundary(newest) and not _seals(position)
        return position == sequence.computed or within

    def end(self, sequence: KVSequence, tokens: list[int]) -> None:
        """Set the tokens that a sequence holds between requests.

        The first token that differs will be computed next, or the last, whose logits are wanted. A sequence
        that does not reach so far is to be discarded.
        """
        sequence.computed = _continuation(sequence, tokens)
        sequence.tokens[:] = tokens

    def saved(self, sequence: KVSequence, checkpoint: RunKey | None) -> bool:
        """Return whether `save`, which returned this checkpoint, could save all that is worth saving."""
        return self._store.holds(sequence.table) and (checkpoint is not None or sequence.computed < CELL)

    def restart(self, sequence: KVSequence, *, damaged: bool) -> None:
        """Discard what is computed of a sequence; if `damaged`, what is stored of it, too."""
        self._runner.rest()
        self._runner.forget(sequence)
        self._store.reset(sequence.table, damaged=damaged)
        sequence.restart()

    def relieve(self) -> None:
        """Give back memory that no window uses."""
        self._windows.trim()

    def discard(self, sequence: KVSequence) -> None:
        """Close a sequence, and give back its window and records."""
        self._runner.forget(sequence)
        self._store.forget(sequence.table)
        self._windows.give_back(sequence.window)

    def warm_up(self, chunk_tokens: int) -> None:
        """Compute a chunk of a prompt and a token behind it, and give back all that they took.

        Afterwards weights are in memory and kernels are loaded. The tokens are deep in a sequence that does
        not exist, its window zeros, so that the chunk seals blocks and the token attends to records. Its
        chain begins with random bytes: no request can find any of it.
        """
        sequence = self.open(secrets.token_bytes(CHAIN_BYTES), [0] * (SEALS + 2))
        chunk = min(WARM_CHUNK, chunk_tokens)
        sequence.advance(SEALS + 1 - chunk)
        try:
            with self._windows.written(sequence.window) as window:
                for planes in window:
                    planes[...] = 0
            self._store.reserve(sequence.table, highest_block(len(sequence.tokens)))
            self._store.grow(sequence.table, sequence.hashes(0, sealed_by(SEALS)))
            for count in (chunk, 1):
                part = BatchItem(sequence, count, sequence.computed)
                self._runner.run([part], [[count - 1]])
                if part.failure is not None:
                    raise part.failure
                sequence.advance(count)
        finally:
            self._runner.rest()
            self.discard(sequence)

    def stats(self) -> dict[str, object]:
        """Return bytes and counters of all tiers by name."""
        return {
            "device_used_bytes": self._windows.used_bytes
            + self._state_bytes * (self._windows.capacity - self._windows.free)
            + self._runner.device_used_bytes,
            "device_budget_bytes": self._windows.budget_bytes
            + self._state_bytes * self._windows.capacity
            + self._runner.device_bytes,
            **self._store.stats(),
        }

    def check_integrity(self, sequences: Iterable[KVSequence]) -> None:
        """Check that windows, rows and runs belong to these sequences, which are all, and to nothing else.

        Raises:
            AssertionError: They do not.
        """
        mine = list(sequences)
        taken = sorted(sequence.window for sequence in mine)
        assert len(set(taken)) == len(taken), "two sequences share a window"
        assert len(taken) + self._windows.free == self._windows.capacity, "a window is lost"
        self._store.check_integrity([sequence.table for sequence in mine])
        self._runner.check_integrity(mine)


def _continuation(sequence: KVSequence, tokens: list[int]) -> int:
    """Return the position of the first token to compute when the sequence continues with these tokens."""
    pairs = enumerate(zip(sequence.tokens, tokens, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), min(len(sequence.tokens), len(tokens)))
    position, last = min(sequence.computed, common), max(0, len(tokens) - 1)
    return last if position > last and not _seals(last) else position


def _seals(position: int) -> bool:
    """Return whether computing this token seals a cell, which is done once."""
    return position % CELL == 0 and position >= SEALS
