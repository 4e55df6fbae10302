"""What an engine drives: one sequence over a store."""

from __future__ import annotations

import torch

from spilld.attention.cpu import CpuAttention
from spilld.cuda_ext.memory.cpu_windows import CpuKVWindows
from spilld.cuda_ext.memory.windows import KVWindowShape
from spilld.kv.attention_span import (
    BLOCK,
    CELL,
    WINDOW_TOKENS,
    boundary,
    sealed_by,
)
from spilld.kv.batch import BatchItem
from spilld.kv.sequence import KVSequence
from spilld.models.model import Model
from spilld.offload.host.slab import HostSlab
from spilld.offload.record import Element, Format
from spilld.offload.store.store import Store
from spilld.runner.runner import Runner


class Steps:
    """Forward passes over one sequence."""

    def __init__(self, model: Model, store: Store, tokens: int, chunk: int) -> None:
        """tokens: room for so many; chunk: the most of one step."""
        g = model.geometry
        shape = KVWindowShape(WINDOW_TOKENS, g.kv_heads, getattr(torch, store.layouts.element))
        windows = CpuKVWindows(shape, shape.nbytes)
        self._store = store
        self._sequence = KVSequence(store.open(), windows.take(), bytes(32))
        windows.numbers.zero_()
        store.reserve(self._sequence.table, blocks_of(tokens))
        self._runner = Runner(model, CpuAttention(g, store, windows), store, chunk)

    @property
    def computed(self) -> int:
        """Tokens that were computed, or taken for it."""
        return self._sequence.computed

    @property
    def usage(self) -> dict[str, int]:
        """Bytes of records by tier."""
        return self._store.usage(self._sequence.table)

    def feed(self, tokens: list[int]) -> None:
        """Let these tokens come next."""
        self._sequence.tokens.extend(tokens)

    def step(self, count: int, keep: range) -> torch.Tensor:
        """Compute the next tokens; float32 logits [len(keep), vocab]."""
        self._grow(count)
        [found] = self._runner.run([BatchItem(self._sequence, count, self._sequence.computed)], [keep])
        self._sequence.computed += count
        self._store.settle()
        return found

    def skip(self, count: int) -> None:
        """Take the next tokens for computed: their K and V are what lies in memory. For timing only."""
        for done in range(0, count, CELL):
            part = min(CELL, count - done)
            self._grow(part)
            self._sequence.computed += part
            self._store.settle()

    def _grow(self, count: int) -> None:
        known, last = len(self._sequence.table.chain), self._sequence.computed + count - 1
        self._store.grow(self._sequence.table, self._sequence.hashes(known, sealed_by(last)))


def blocks_of(tokens: int) -> int:
    """How many of a sequence of this length are sealed, at least one."""
    return max(1, boundary(tokens) // BLOCK)


def in_host(model: Model, form: Format, element: Element, tokens: int) -> Store:
    """A store with room for a sequence of this length in host memory, and no disk."""
    blocks = blocks_of(tokens)
    layouts = model.geometry.layouts(form, element)
    slab = HostSlab(blocks * layouts.column_bytes, layouts.record_bytes)
    return Store(layouts, slab, run_blocks=blocks)
