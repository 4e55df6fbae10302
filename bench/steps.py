"""What an engine drives: one sequence over a store that holds all of it in host memory."""

from __future__ import annotations

import torch

from spilld.cuda_ext.cpu import CpuBackend
from spilld.cuda_ext.window import WindowShape
from spilld.daemon.attention import TieredAttention
from spilld.daemon.model import Model
from spilld.daemon.runner import Runner
from spilld.daemon.sequence import Sequence
from spilld.daemon.slices import Slice
from spilld.daemon.visibility import BLOCK, WINDOW_SLOTS, boundary, sealed_by
from spilld.offload.host import HostSlab
from spilld.offload.record import Element, Format, Layout
from spilld.offload.store import Store


class Steps:
    """Forward passes over one sequence."""

    def __init__(self, model: Model, form: Format, element: Element, tokens: int, chunk: int) -> None:
        """tokens: room for so many; chunk: the most of one step."""
        g = model.geometry
        shape = WindowShape(
            slots=WINDOW_SLOTS,
            layers=g.layers,
            kv_heads=g.kv_heads,
            head_dim=g.head_dim,
            dtype=getattr(torch, element),
        )
        arena = CpuBackend().windows(shape, shape.nbytes)
        arena.tensor.zero_()
        layout = Layout(form, element, g.kv_heads, g.head_dim)
        blocks = max(1, boundary(tokens) // BLOCK)
        slab = HostSlab(blocks * g.layers * layout.record_bytes, layout.record_bytes)
        self._store = Store(layout, g.layers, slab, run_blocks=blocks)
        self._sequence = Sequence(self._store.open(), arena.take(), bytes(32))
        self._store.promise(self._sequence.table, blocks)
        self._runner = Runner(model, TieredAttention(CpuBackend(), arena, self._store), self._store, chunk)

    @property
    def computed(self) -> int:
        """Tokens that were computed, or taken for it."""
        return self._sequence.computed

    def feed(self, tokens: list[int]) -> None:
        """Let these tokens come next."""
        self._sequence.tokens.extend(tokens)

    def step(self, count: int, keep: range) -> torch.Tensor:
        """Compute the next tokens; float32 logits [len(keep), vocab]."""
        self._grow(count)
        [found] = self._runner.run([Slice(self._sequence, count, self._sequence.computed)], [keep])
        self._sequence.computed += count
        return found

    def skip(self, count: int) -> None:
        """Take the next tokens for computed: their K and V are what lies in memory. For timing only."""
        self._grow(count)
        self._sequence.computed += count

    def _grow(self, count: int) -> None:
        known, last = len(self._sequence.table.chain), self._sequence.computed + count - 1
        self._store.grow(self._sequence.table, self._sequence.hashes(known, sealed_by(last)))
