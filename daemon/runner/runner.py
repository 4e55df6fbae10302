"""Runner: a forward pass over a packed batch, with the disk reads that it needs under way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spilld.attention.base import Attention, AttentionPlan
from spilld.attention.transformers_hook import PlannedAttention
from spilld.cuda_ext.device.tensors import gpu_errors
from spilld.cuda_ext.errors import OutOfMemory
from spilld.kv.batch import Batch, BatchItem
from spilld.kv.recurrent_state import StateShape
from spilld.kv.sequence import KVSequence
from spilld.kv.state_geometry import StateGeometry
from spilld.models.model import Model
from spilld.models.packed.replacing import packed_bytes
from spilld.models.wide_linear import wide_bytes
from spilld.offload.store.store import Store
from spilld.scheduler.scheduler import MAX_RUNNING

from .packed_model import PackedModel
from .read_ahead import ReadAhead


class Runner:
    """Runs the model: its module, or the decoder over packed weights."""

    def __init__(self, model: Model, attention: Attention, store: Store, chunk_tokens: int) -> None:
        self._model = model
        self._chunk_tokens = chunk_tokens
        self._attention = attention
        self._reads = ReadAhead(model.geometry, store)
        self._decoder = None
        if model.packed is not None:
            self._decoder = PackedModel(model, model.packed, attention, chunk_tokens + MAX_RUNNING)

    @property
    def states(self) -> StateShape | None:
        """What the model's layers with state keep of a sequence; None if it has none."""
        return StateShape.of(self._model.geometry, self._model.module.dtype)

    @property
    def attended(self) -> int:
        """Number of times that a layer has attended so far."""
        return self._attention.calls

    @property
    def workspace_bytes(self) -> int:
        """Bytes that a prefill chunk takes besides windows and records.

        They are queries and results of attention, in float32, and what the layers take.
        """
        if self._decoder is None:
            return self._module_bytes
        width = max(layer.heads * layer.head_dim for layer in self._model.geometry.layers)
        attention = 4 * self._chunk_tokens * width * 4
        return attention + self._decoder.workspace_bytes

    @property
    def _module_bytes(self) -> int:
        """Estimated bytes of the module's activations.

        By formula, the largest set that is alive at once (attention, or the MLP), what linear layers widen,
        and one row of logits.
        """
        config, geometry = self._model.module.config, self._model.geometry
        size = int(self._model.module.dtype.itemsize)
        widths = ((heads * dim, 2 * kv_heads * dim) for heads, kv_heads, dim in geometry.every_sizes)
        attention = max(4 * width * 4 + (width + kv) * size for width, kv in widths)
        mlp = _mlp_width(config) * size
        residual = 3 * int(config.hidden_size) * size
        chunk = self._chunk_tokens * (max(attention, mlp) + residual)
        chunk += sum(self._state_bytes(state) for state in geometry.states[:1])
        base = self._model.module.model
        wide = wide_bytes(base, self._chunk_tokens) + packed_bytes(base, self._chunk_tokens)
        return chunk + wide + geometry.vocab * (4 + size)

    def _state_bytes(self, state: StateGeometry) -> int:
        """Estimated bytes that a layer with state takes.

        They are what goes through its convolution and, in float32, its heads' queries, keys and values, and
        pairs of tokens of a group.
        """
        convolved = 3 * state.convolution[0] * int(self._model.module.dtype.itemsize)
        heads = state.recurrent[0] if state.recurrent else 0
        return self._chunk_tokens * (convolved + 4 * 4 * (state.convolution[0] + heads * state.grid))

    def run(self, items: Sequence[BatchItem], keep: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Compute the tokens of a batch.

        An item whose KV could not be read carries its `failure` afterwards; its logits mean nothing. So does
        every item where the GPU had no memory for the module.

        Args:
            items: The batch.
            keep: Tokens of each whose logits are wanted.

        Returns:
            For each item logits [len(keep[i]), vocab] float32.

        Raises:
            LaunchFailed: The device is lost.
        """
        batch = Batch(items)
        rows = [item.start + row for item, kept in zip(items, keep, strict=True) for row in kept]
        plan = self._attention.plan(batch)
        try:
            self._reads.begin(plan)
            with torch.inference_mode(), gpu_errors():
                logits = (self._forward if self._decoder is None else self._decoder.run)(plan, rows)
        except BaseException as error:
            self._reads.cancel(plan)
            if not isinstance(error, OutOfMemory):
                raise
            logits = self._failed(batch, len(rows), str(error))
        finally:
            self._reads.end(plan)
        return list(torch.split(logits, [len(kept) for kept in keep]))

    def _failed(self, batch: Batch, rows: int, why: str) -> torch.Tensor:
        """Return placeholder logits of a step that found no memory, and mark its items as failed.

        The step's error is not kept: its traceback refers to the activations.
        """
        for item in batch.items:
            item.failure = item.failure or OutOfMemory(why)
        return torch.zeros(rows, self._model.geometry.vocab)

    def _forward(self, plan: AttentionPlan, keep: list[int]) -> torch.Tensor:
        """Run the transformers module in place of PackedModel.run."""
        device = self._model.module.device
        logits: torch.Tensor = self._model.module(
            input_ids=torch.tensor([plan.batch.tokens], device=device),
            position_ids=torch.tensor([plan.batch.positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(keep, dtype=torch.long, device=device),
            spilld_attention=PlannedAttention(self._attention, plan),
        ).logits[0]
        return logits.cpu().float()

    def forget(self, sequence: KVSequence) -> None:
        """See Attention.forget."""
        self._attention.forget(sequence)

    def check_integrity(self, sequences: Sequence[KVSequence]) -> None:
        """See Attention.check_integrity."""
        self._attention.check_integrity(sequences)

    def close(self) -> None:
        """See Attention.close."""
        self._attention.close()

    @property
    def device_bytes(self) -> int:
        """See Attention.device_bytes."""
        return self._attention.device_bytes

    @property
    def device_used_bytes(self) -> int:
        """See Attention.device_used_bytes."""
        return self._attention.device_used_bytes

    def rest(self) -> None:
        """See ReadAhead.rest."""
        self._reads.rest()


def _mlp_width(config: Any) -> int:
    """Return how many numbers an MLP, or the experts of a layer, have of each token inside."""
    found = config.intermediate_size
    dense = max(found) if isinstance(found, list) else int(found)
    if config.model_type == "llama4_text":  # whose experts all compute all tokens
        experts = config.num_local_experts * (2 * config.hidden_size + 3 * dense)
        return max(3 * int(config.intermediate_size_mlp), int(experts))
    if getattr(config, "use_double_wide_mlp", False):
        dense *= 2
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 0
    experts = int(chosen) * int(getattr(config, "moe_intermediate_size", None) or dense)
    return 3 * max(dense, experts)
