"""Where sequences have their KV: a window on the device, records in host memory and on disk."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable

from spilld.cuda_ext.errors import OutOfMemory
from spilld.cuda_ext.memory.windows import KVWindows
from spilld.kv.batch import BatchItem
from spilld.kv.checkpoint import find_resume_point, restore_checkpoint, save_checkpoint
from spilld.kv.sequence import KVSequence
from spilld.kv.visibility import (
    CELL,
    boundary,
    highest_block,
    sealed_by,
)
from spilld.offload.disk.files.extent import RunKey
from spilld.offload.errors import ReadFailed
from spilld.offload.prefix_cache.block_hash import CHAIN_BYTES
from spilld.offload.store.store import Store

from .runner import Runner

log = logging.getLogger(__name__)

WARM_CHUNK = 16
"""Prompt tokens: enough for the kernels of many rows."""

SEALS = 2 * CELL
"""The first position that seals a cell."""


class SequenceManager:
    """Opens them, finds again what was computed before, saves it, gives it up."""

    def __init__(self, windows: KVWindows, store: Store, runner: Runner) -> None:
        self._windows = windows
        self._store = store
        self._runner = runner
        self.lost = False
        """Whether what the store has of open sequences may be less than it knows: nothing of it is saved."""

    @property
    def windows(self) -> int:
        """How many more can be opened."""
        return self._windows.free

    def open(self, root: bytes, tokens: Iterable[int]) -> KVSequence:
        """One of which nothing is computed. root: of its chain. Raises ArenaFull without a window, and
        OutOfMemory.
        """
        window = self._windows.take()
        sequence = KVSequence(self._store.open(), window, root)
        sequence.tokens.extend(tokens)
        return sequence

    def find(self, sequence: KVSequence) -> bool:
        """Take over what an earlier request computed of the same beginning, if it is still there: `computed`
        says how much. False if nothing was stored.
        """
        resume = find_resume_point(self._store, sequence.root, sequence.tokens)
        if resume is None:
            return False
        self._runner.rest()
        try:
            with self._windows.written(sequence.window) as window:
                restore_checkpoint(self._store, window, resume)
        except (ReadFailed, OutOfMemory) as failure:
            log.warning("a sequence of %d tokens begins anew: %s", len(sequence.tokens), failure)
            return True
        self._store.attach(sequence.table, resume.refs, resume.hashes)
        sequence.computed = resume.position
        return True

    def save(self, sequence: KVSequence, instead_of: RunKey | None) -> RunKey | None:
        """Between steps: what was computed outlives the sequence, for whoever begins alike. The tail of it,
        if there is one; instead_of goes then.
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
        """Whether its window still holds what follows what it has in common with these tokens: numbers of a
        cell replace those of the cell before the last, which its first token seals.
        """
        position = _goes_on_at(sequence, tokens)
        newest = max(0, sequence.computed - 1)
        within = boundary(position) == boundary(newest) and not _seals(position)
        return position == sequence.computed or within

    def end(self, sequence: KVSequence, tokens: list[int]) -> None:
        """Between requests it holds these tokens; the first that is another will be computed next, or the
        last: its logits are wanted. To be discarded if it does not reach so far.
        """
        sequence.computed = _goes_on_at(sequence, tokens)
        sequence.tokens[:] = tokens

    def saved(self, sequence: KVSequence, tail_run: RunKey | None) -> bool:
        """Whether `save`, which has returned this tail, could save all that is worth it."""
        return self._store.holds(sequence.table) and (tail_run is not None or sequence.computed < CELL)

    def restart(self, sequence: KVSequence, *, damaged: bool) -> None:
        """Give up what is computed of a sequence; damaged: what is stored of it, too."""
        self._runner.rest()
        self._runner.forget(sequence)
        self._store.reset(sequence.table, damaged=damaged)
        sequence.computed = 0

    def relieve(self) -> None:
        """Give back memory that no window is in."""
        self._windows.trim()

    def discard(self, sequence: KVSequence) -> None:
        self._runner.forget(sequence)
        self._store.forget(sequence.table)
        self._windows.give_back(sequence.window)

    def warm_up(self, chunk_tokens: int) -> None:
        """Compute a chunk of a prompt and a token behind it, and give back all that they took: weights are in
        memory then, and kernels loaded.

        They are deep in a sequence that does not exist, its window zeros, so that the chunk seals blocks and
        the token attends to records. Its chain begins with random bytes: no request can find any of it.
        """
        sequence = self.open(secrets.token_bytes(CHAIN_BYTES), [0] * (SEALS + 2))
        chunk = min(WARM_CHUNK, chunk_tokens)
        sequence.computed = SEALS + 1 - chunk
        try:
            with self._windows.written(sequence.window) as window:
                window[...] = 0
            self._store.reserve(sequence.table, highest_block(len(sequence.tokens)))
            self._store.grow(sequence.table, sequence.hashes(0, sealed_by(SEALS)))
            for count in (chunk, 1):
                part = BatchItem(sequence, count, sequence.computed)
                self._runner.run([part], [[count - 1]])
                if part.failure is not None:
                    raise part.failure
                sequence.computed += count
        finally:
            self._runner.rest()
            self.discard(sequence)

    def stats(self) -> dict[str, object]:
        return {
            "device_used_bytes": self._windows.used_bytes + self._runner.device_used_bytes,
            "device_budget_bytes": self._windows.budget_bytes + self._runner.device_bytes,
            **self._store.stats(),
        }

    def check_integrity(self, sequences: Iterable[KVSequence]) -> None:
        """These are all: windows, rows and runs belong to them, and to nothing else."""
        mine = list(sequences)
        taken = sorted(sequence.window for sequence in mine)
        assert len(set(taken)) == len(taken), "two sequences share a window"
        assert len(taken) + self._windows.free == self._windows.capacity, "a window is lost"
        self._store.check_integrity([sequence.table for sequence in mine])
        self._runner.check_integrity(mine)


def _goes_on_at(sequence: KVSequence, tokens: list[int]) -> int:
    pairs = enumerate(zip(sequence.tokens, tokens, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), min(len(sequence.tokens), len(tokens)))
    position, last = min(sequence.computed, common), max(0, len(tokens) - 1)
    return last if position > last and not _seals(last) else position


def _seals(position: int) -> bool:
    """To compute this token is to seal a cell, which is done once."""
    return position % CELL == 0 and position >= SEALS
