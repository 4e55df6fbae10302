"""One forward pass over a packed batch of slices, with the disk reads it needs under way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spilld.offload.prefetch import Read, Ticket
from spilld.offload.store import Store
from spilld.offload.table import RunRef

from .attention import Slice, TieredAttention
from .interface import Step
from .linear import wide_bytes
from .model import Model
from .visibility import stored_blocks

Needed = list[tuple[Slice, int, RunRef]]


class Runner:
    """Runs the model. The reads of the next step are queued behind this one's, for a decode step's next
    scan is almost always the same: the disk goes on while the sampler works."""

    def __init__(self, model: Model, attention: TieredAttention, store: Store, chunk_tokens: int) -> None:
        self._model = model
        self._chunk_tokens = chunk_tokens
        self._attention = attention
        self._store = store
        self._ahead: list[Ticket] = []

    @property
    def workspace_bytes(self) -> int:
        """What a prefill chunk takes besides windows and records: the dequantised tile and, by formula, the
        largest set of activations alive at once (attention in float32, or the MLP), what linear layers
        widen, and one row of logits."""
        config, geometry = self._model.module.config, self._model.geometry
        width, size = geometry.heads * geometry.head_dim, int(self._model.module.dtype.itemsize)
        attention = 4 * width * 4 + (width + 2 * geometry.kv_heads * geometry.head_dim) * size
        mlp = 3 * int(config.intermediate_size) * size
        residual = 3 * int(config.hidden_size) * size
        chunk = self._chunk_tokens * (max(attention, mlp) + residual)
        wide = wide_bytes(self._model.module.base_model, self._chunk_tokens)
        return self._attention.workspace_bytes + chunk + wide + geometry.vocab * (4 + size)

    def run(self, slices: list[Slice], keep: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Compute the slices' tokens; returns float32 logits [len(keep[i]), vocab] for those of their rows.

        A slice whose KV did not come back carries its `failure` afterwards; its logits mean nothing.
        """
        self._read_for(slices)
        self._begin_promotions(slices)
        tokens = [token for s in slices for token in s.sequence.tokens[s.position : s.position + s.count]]
        positions = [position for s in slices for position in range(s.position, s.position + s.count)]
        rows = [s.start + row for s, kept in zip(slices, keep, strict=True) for row in kept]
        try:
            with torch.inference_mode():
                logits = self._model.module(
                    input_ids=torch.tensor([tokens]),
                    position_ids=torch.tensor([positions]),
                    use_cache=False,
                    logits_to_keep=torch.tensor(rows, dtype=torch.long),
                    spilld_step=Step(self._attention, slices),
                ).logits[0]
        except BaseException:  # reads that nobody takes would keep their staging buffers for good
            self._store.cancel(ticket for s in slices for reads in s.tickets.values() for _, ticket in reads)
            raise
        finally:
            for part in slices:
                if part.promotion is not None:
                    part.promotion.end()
        return list(logits.float().split([len(kept) for kept in keep]))

    def _begin_promotions(self, slices: list[Slice]) -> None:
        """Let decode scans bring back what host memory has room for, a run each: fresh memory is slow, and a
        first token shall not wait for it. Where layers slide, no scan passes all layers of a run."""
        if not any(self._model.geometry.sliding_windows):
            for part in (part for part in slices if part.count == 1):
                part.promotion = self._store.promotion(part.sequence.table)

    def rest(self) -> None:
        """Drop what was read ahead: the next step will be another, or there is none."""
        self._store.cancel(self._ahead)
        self._ahead = []

    def _read_for(self, slices: list[Slice]) -> None:
        needed = self._needed(slices)
        reads = [Read(ref.run, layer) for _, layer, ref in needed]
        tickets = self._ahead
        if [ticket.read for ticket in tickets] != reads:
            self.rest()
            tickets = self._store.submit(reads)
        for (part, layer, ref), ticket in zip(needed, tickets, strict=True):
            part.tickets.setdefault(layer, []).append((ref, ticket))
        decoding = all(s.count == 1 for s in slices)
        self._ahead = self._store.submit(reads) if decoding else []

    def _needed(self, slices: list[Slice]) -> Needed:
        """Extents in the order in which attention will ask for them: by layer, slice, age."""
        windows = self._model.geometry.sliding_windows
        runs = {
            (index, window): self._store.runs_to_read(
                part.sequence.table, stored_blocks(part.position, part.last, window)
            )
            for window in set(windows)
            for index, part in enumerate(slices)
        }
        return [
            (part, layer, ref)
            for layer, window in enumerate(windows)
            for index, part in enumerate(slices)
            for ref in runs[index, window]
        ]
