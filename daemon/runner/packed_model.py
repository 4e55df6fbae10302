"""A forward pass over packed weights: what a step runs instead of the module.

Each layer is what comes before attention, attention, and what follows it. Tokens of prompts are rows like
those of decode steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spilld.attention.base import Attention, AttentionPlan
from spilld.kv.geometry import Geometry
from spilld.models.model import Model
from spilld.models.packed.packable import check_packable
from spilld.models.packed.packing import ACTIVATIONS, activation, attention_inputs, parts_of
from spilld.offload.kernels.linear.layer import (
    Activations,
    Layer,
    after_attention,
    before_attention,
)
from spilld.offload.kernels.linear.packed import Packed
from spilld.offload.kernels.linear.products import Matrix, multiply_rows
from spilld.offload.kernels.linear.row_operations import NOTHING, padded, take_normed

Floats = NDArray[np.float32]


class PackedModel:
    """A model's forward pass over packed weights.

    It allocates every activation once, for as many rows as a step may have.
    """

    def __init__(self, model: Model, weights: Mapping[str, Packed], attention: Attention, rows: int) -> None:
        """Collect the model's weights and constants, and allocate the activations.

        Args:
            model: The model.
            weights: Packed weights, by the names of packing.py.
            attention: Attends over all tiers.
            rows: The most tokens of a step.

        Raises:
            ValueError: The weights do not fit the model. Kernels check nothing.
            UnsupportedModel: The model is another than what is computed here.
        """
        check_packable(model.module)
        base, config, geometry = model.module.model, model.module.config, model.geometry
        gemma = str(config.model_type).startswith("gemma")
        self._embed = base.embed_tokens
        self._rotary = base.rotary_emb
        self._vocab = geometry.vocab
        self._attention = attention
        self._eps = np.float32(config.rms_norm_eps)
        self._gelu = ACTIVATIONS[activation(config)]
        self._layers = [_layer(i, layer, weights, gemma) for i, layer in enumerate(base.layers)]
        _check(weights, len(self._layers), geometry, int(config.hidden_size))
        self._ropes = [_rope(layer, base.rotary_emb) for layer in base.layers]
        heads, kv_heads, _ = geometry.sizes
        self._split = [heads, kv_heads, kv_heads]
        self._norm, self._head = _factors(base.norm, gemma), Matrix.of(weights["head"])
        self._outputs = weights["head"].outputs
        self._final_softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        self._rows = Activations.of(
            padded(rows),
            int(config.hidden_size),
            *geometry.sizes,
            weights["layers.0.down"].inputs,
        )

    @property
    def workspace_bytes(self) -> int:
        """Bytes of its activations and of a row of logits; weights are mapped."""
        return self._rows.nbytes + padded(1) * self._outputs * 4

    def run(self, plan: AttentionPlan, keep: list[int]) -> torch.Tensor:
        """Compute the tokens of a batch.

        Args:
            plan: The batch's plan.
            keep: Rows whose logits are wanted.

        Returns:
            Logits [len(keep), vocab] float32.
        """
        rows, batch = self._rows, plan.batch
        rows.x[: batch.total] = self._embed(torch.tensor(batch.tokens)).float().numpy()
        angles = self._angles(batch.positions)
        q, k, v = torch.split(torch.from_numpy(rows.heads[: batch.total]), self._split, dim=1)
        for index, (layer, rope) in enumerate(zip(self._layers, self._ropes, strict=True)):
            before_attention(layer, rows, *angles[rope], self._eps)
            rows.attended[: batch.total] = self._attention.forward(index, q, k, v, plan).numpy()
            after_attention(layer, rows, batch.total, self._eps, self._gelu)
        return self._logits(keep)

    def _logits(self, keep: list[int]) -> torch.Tensor:
        rows, found = self._rows, np.zeros((padded(len(keep)), self._outputs), np.float32)
        if keep:
            take_normed(rows.x[keep], self._norm, self._eps, rows.inputs)
            multiply_rows(rows.inputs, self._head, found, len(keep))
        logits = torch.from_numpy(found[: len(keep), : self._vocab])
        if self._final_softcap:
            logits.div_(self._final_softcap).tanh_().mul_(self._final_softcap)
        return logits

    def _angles(self, positions: list[int]) -> dict[str, tuple[Floats, Floats]]:
        """Return cos and sin [rows, rotary] for each kind of layer, as _rope names it."""
        like, places = torch.empty(0), torch.tensor([positions])
        found = {}
        for rope in set(self._ropes):
            cos, sin = self._rotary(like, places, rope) if rope else self._rotary(like, places)
            found[rope] = cos[0].numpy(), sin[0].numpy()
        return found


def _layer(index: int, layer: Any, weights: Mapping[str, Packed], gemma: bool) -> Layer:
    attention, name = layer.self_attn, f"layers.{index}"
    biases = [part.bias for part in attention_inputs(attention) if part.bias is not None]
    before_mlp = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
    return Layer(
        qkv=_parts(weights, f"{name}.qkv", 3),
        bias=torch.cat(biases).float().numpy() if biases else NOTHING,
        out=Matrix.of(weights[f"{name}.out"]),
        gate_up=_parts(weights, f"{name}.gate_up", 2),
        down=Matrix.of(weights[f"{name}.down"]),
        before_attention=_factors(layer.input_layernorm, gemma),
        after_attention=_factors(layer.post_attention_layernorm, gemma) if gemma else NOTHING,
        before_mlp=_factors(before_mlp, gemma),
        after_mlp=_factors(layer.post_feedforward_layernorm, gemma) if gemma else NOTHING,
        q_norm=_factors(getattr(attention, "q_norm", None), gemma),
        k_norm=_factors(getattr(attention, "k_norm", None), gemma),
    )


def _parts(weights: Mapping[str, Packed], name: str, count: int) -> Any:
    """Return so many matrices: those of a name, and others that have no tiles."""
    found = [Matrix.of(part) for part in parts_of(weights, name)]
    nothing = found[0]._replace(tiles=0)
    return (*found, *[nothing] * (count - len(found)))


def _check(weights: Mapping[str, Packed], layers: int, geometry: Geometry, hidden: int) -> None:
    query_heads, kv_heads, head_dim = geometry.sizes
    attended = query_heads * head_dim
    heads = attended + 2 * kv_heads * head_dim
    intermediate = weights["layers.0.down"].inputs
    wanted = {
        "qkv": (heads, hidden),
        "out": (hidden, attended),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
    }
    names = {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in wanted.items()}
    head = weights["head"]
    for name, shape in (names | {"head": (max(head.outputs, geometry.vocab), hidden)}).items():
        parts = parts_of(weights, name)
        found = (sum(part.outputs for part in parts), *{part.inputs for part in parts})
        if found != shape:
            raise ValueError(f"{name} has weights of {found}, not {shape}")


def _rope(layer: Any, rotary: Any) -> str:
    """Return the layer's type where the model has several kinds of RoPE, else ""."""
    return str(layer.self_attn.layer_type) if isinstance(rotary.rope_type, dict) else ""


def _factors(norm: Any, gemma: bool) -> Floats:
    """Return what a norm multiplies by: Gemma stores it less 1."""
    if norm is None:
        return NOTHING
    weight = norm.weight.float()
    factors: Floats = (1 + weight if gemma else weight).numpy()
    return factors
