"""A step: forward passes over packed batches of slices, with the disk reads they need under way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Many
from itertools import accumulate

import torch

from spilld.attention.base import Attention
from spilld.attention.transformers_hook import Step
from spilld.cuda_ext.device.tensors import gpu_errors
from spilld.cuda_ext.errors import OutOfMemory
from spilld.kv.batch import Slice
from spilld.kv.sequence import Sequence
from spilld.kv.visibility import stored_blocks
from spilld.models.model import Model
from spilld.models.wide_linear import wide_bytes
from spilld.offload.disk.prefetch import Read, Ticket
from spilld.offload.store import Store
from spilld.offload.table import RunRef
from spilld.scheduler.scheduler import MAX_RUNNING

from .decoder import Decoder

Needed = list[tuple[Slice, int, RunRef]]


class Runner:
    """Runs the model. The reads of the next step are queued behind this one's, for a decode step's next
    scan is almost always the same: the disk goes on while the sampler works."""

    def __init__(self, model: Model, attention: Attention, store: Store, chunk_tokens: int) -> None:
        self._model = model
        self._chunk_tokens = chunk_tokens
        self._attention = attention
        self._store = store
        self._decoder = None
        if model.packed is not None:
            self._decoder = Decoder(model, model.packed, attention, chunk_tokens + MAX_RUNNING)
        self._ahead: list[Ticket] = []

    @property
    def attended(self) -> int:
        """How many times a layer has attended so far."""
        return self._attention.calls

    @property
    def workspace_bytes(self) -> int:
        """What a prefill chunk takes besides windows and records: queries and results of attention, in
        float32, and what the layers take."""
        if self._decoder is None:
            return self._module_bytes
        heads, _, head_dim = self._model.geometry.sizes
        attention = 4 * self._chunk_tokens * heads * head_dim * 4
        return attention + self._decoder.workspace_bytes

    @property
    def _module_bytes(self) -> int:
        """By formula, the largest set of the module's activations alive at once (attention, or the MLP), what
        linear layers widen, and one row of logits."""
        config, geometry = self._model.module.config, self._model.geometry
        heads, kv_heads, head_dim = geometry.sizes
        width, size = heads * head_dim, int(self._model.module.dtype.itemsize)
        attention = 4 * width * 4 + (width + 2 * kv_heads * head_dim) * size
        mlp = 3 * int(config.intermediate_size) * size
        residual = 3 * int(config.hidden_size) * size
        chunk = self._chunk_tokens * (max(attention, mlp) + residual)
        wide = wide_bytes(self._model.module.base_model, self._chunk_tokens)
        return chunk + wide + geometry.vocab * (4 + size)

    def run(self, slices: list[Slice], keep: Many[Many[int]]) -> list[torch.Tensor]:
        """Compute the slices' tokens; returns float32 logits [len(keep[i]), vocab] for those of their rows.

        A slice whose KV did not come back carries its `failure` afterwards; its logits mean nothing. So does
        every slice where the GPU had no memory for the module. Raises LaunchFailed if the device is lost.
        """
        parts = _in_rows(slices)
        forward = self._forward if self._decoder is None else self._decoder.run
        rows = [part.start + row for part, kept in zip(slices, keep, strict=True) for row in kept]
        try:
            self._read_for(parts)
            self._begin_promotions(parts)
            with torch.inference_mode(), gpu_errors():
                logits = forward(parts, rows)
        except BaseException as error:  # reads that nobody takes would keep their staging buffers for good
            self._store.cancel(ticket for s in slices for reads in s.tickets.values() for _, ticket in reads)
            if not isinstance(error, OutOfMemory):
                raise
            logits = self._failed(slices, len(rows), str(error))
        finally:
            for part in slices:
                if part.promotion is not None:
                    part.promotion.end()
        return list(torch.split(logits, [len(kept) for kept in keep]))

    def _failed(self, slices: list[Slice], rows: int, why: str) -> torch.Tensor:
        """Of a step that found no memory. Its error is not kept: the traceback holds the activations."""
        for part in slices:
            part.failure = part.failure or OutOfMemory(why)
        return torch.zeros(rows, self._model.geometry.vocab)

    def _forward(self, parts: list[Slice], keep: list[int]) -> torch.Tensor:
        tokens = [token for part in parts for token in part.tokens]
        positions = [position for part in parts for position in part.positions]
        device = self._model.module.device
        logits: torch.Tensor = self._model.module(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(keep, dtype=torch.long, device=device),
            spilld_step=Step(self._attention, parts),
        ).logits[0]
        return logits.cpu().float()

    def _begin_promotions(self, slices: list[Slice]) -> None:
        """Let decode scans bring back what host memory has room for, a run each: fresh memory is slow, and a
        first token shall not wait for it. Where layers slide no scan passes all layers of a run, nor where
        the device has blocks of it."""
        layers = len(self._model.geometry.layers)
        if any(self._model.geometry.sliding_windows):
            return
        for part in (part for part in slices if part.count == 1):
            passed = Counter(ref for reads in part.tickets.values() for ref, _ in reads)
            whole = [ref for ref in part.sequence.table.runs if passed[ref] == layers]
            part.promotion = self._store.promotion(part.sequence.table, whole)

    def forget(self, sequence: Sequence) -> None:
        """As Attention.forget."""
        self._attention.forget(sequence)

    def check_integrity(self, sequences: Many[Sequence]) -> None:
        """As Attention.check_integrity."""
        self._attention.check_integrity(sequences)

    def close(self) -> None:
        """As Attention.close."""
        self._attention.close()

    @property
    def device_bytes(self) -> int:
        """As Attention.device_bytes."""
        return self._attention.device_bytes

    @property
    def device_used_bytes(self) -> int:
        """As Attention.device_used_bytes."""
        return self._attention.device_used_bytes

    def rest(self) -> None:
        """Drop what was read ahead: the next step will be another, or there is none."""
        self._store.cancel(self._ahead)
        self._ahead = []

    def _read_for(self, parts: list[Slice]) -> None:
        needed = self._needed(parts)
        reads = [Read(ref.run, layer) for _, layer, ref in needed]
        tickets = self._ahead
        if [ticket.read for ticket in tickets] != reads:
            self.rest()
            tickets = self._store.submit(reads)
        for (part, layer, ref), ticket in zip(needed, tickets, strict=True):
            part.tickets.setdefault(layer, []).append((ref, ticket))
        decoding = all(part.count == 1 for part in parts)
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
            if self._attention.reads(part, layer, part.on_disk(ref, window))
        ]


def _in_rows(slices: list[Slice]) -> list[Slice]:
    """The slices in the order of their rows: decode steps first, whose kernel takes them together."""
    parts = sorted(slices, key=lambda part: part.count > 1)
    starts = accumulate((part.count for part in parts), initial=0)
    for part, start in zip(parts, starts, strict=False):
        part.start = start
    return parts
