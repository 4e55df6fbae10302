"""A forward pass of a few rows over packed weights: what a decode step runs instead of the module.

One description fits the families: norms before each half of a layer, in Gemma also after it; heads normed in
Qwen3 and Gemma3; a gated MLP. Activations are float32 throughout. Everything but attention is a few calls
into kernels over memory that is there from the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .attention import Call, Slice, TieredAttention
from .model import Model
from .packed import Packed
from .packing import ACTIVATIONS, activation, attention_inputs
from .products import multiply
from .rows import MAX_ROWS, NOTHING, Inputs, add_normed, rotate

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class _Layer:
    """Weights of a layer; a norm that its family lacks is NOTHING."""

    qkv: Packed
    bias: Floats
    out: Packed
    gate_up: Packed
    down: Packed
    before_attention: Floats
    after_attention: Floats
    before_mlp: Floats
    after_mlp: Floats
    q_norm: Floats
    k_norm: Floats
    rope: str
    """Key of its angles: the layer type where the model has several, else ""."""
    scale: float
    softcap: float
    window: int | None


class Decoder:
    """Runs up to MAX_ROWS rows. Its memory is a few rows of every activation."""

    def __init__(self, model: Model, weights: Mapping[str, Packed], attention: TieredAttention) -> None:
        """weights: as packing.py names them."""
        base, config, geometry = model.module.model, model.module.config, model.geometry
        gemma = str(config.model_type).startswith("gemma")
        self._embed = base.embed_tokens
        self._rotary = base.rotary_emb
        self._geometry = geometry
        self._attention = attention
        self._eps = float(config.rms_norm_eps)
        self._gelu = ACTIVATIONS[activation(config)]
        self._layers = [
            _layer(index, layer, weights, geometry.softcap, window, gemma, base.rotary_emb)
            for index, (layer, window) in enumerate(zip(base.layers, geometry.sliding_windows, strict=True))
        ]
        self._norm = _factors(base.norm, gemma)
        self._head = weights["head"]
        self._final_softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        first, width = self._layers[0], int(config.hidden_size)
        self._inputs = Inputs(max(width, first.out.inputs, first.down.inputs))
        self._x, self._delta = (np.zeros((MAX_ROWS, width), np.float32) for _ in range(2))
        heads = geometry.heads + 2 * geometry.kv_heads
        self._qkv = np.zeros((MAX_ROWS, heads, geometry.head_dim), np.float32)
        self._by_head = torch.from_numpy(self._qkv).transpose(0, 1)
        self._attended = np.zeros((MAX_ROWS, geometry.heads * geometry.head_dim), np.float32)
        self._gate_up = np.zeros((MAX_ROWS, first.gate_up.outputs), np.float32)
        self._logits = np.zeros((MAX_ROWS, self._head.outputs), np.float32)

    @property
    def workspace_bytes(self) -> int:
        """Its activations; weights are mapped."""
        arrays = (self._x, self._delta, self._qkv, self._attended, self._gate_up, self._logits)
        return sum(array.nbytes for array in arrays)

    def run(self, slices: list[Slice]) -> torch.Tensor:
        """Compute the slices' tokens, MAX_ROWS at most, each at its rows.

        Returns their float32 logits [rows, vocab].
        """
        tokens = [token for part in slices for token in part.tokens]
        positions = [position for part in slices for position in part.positions]
        rows = len(tokens)
        self._x[:] = 0
        self._x[:rows] = self._embed(torch.tensor(tokens)).float().numpy()
        angles = self._angles(positions)
        for index, layer in enumerate(self._layers):
            self._attend(index, layer, slices, angles[layer.rope], rows)
            self._feed_forward(layer, rows)
        self._inputs.take_normed(self._x[:rows], self._norm, self._eps)
        self._logits[:] = 0
        multiply(self._inputs, self._head, self._logits, rows)
        logits = torch.from_numpy(self._logits[:rows, : self._geometry.vocab]).clone()
        if self._final_softcap:
            logits.div_(self._final_softcap).tanh_().mul_(self._final_softcap)
        return logits

    def _angles(self, positions: list[int]) -> dict[str, tuple[Floats, Floats]]:
        """cos and sin [rows, rotary] for each kind of layer."""
        like, places = torch.empty(0), torch.tensor([positions])
        found = {}
        for kind in {layer.rope for layer in self._layers}:
            cos, sin = self._rotary(like, places, kind) if kind else self._rotary(like, places)
            found[kind] = cos[0].numpy(), sin[0].numpy()
        return found

    def _attend(
        self, index: int, layer: _Layer, slices: list[Slice], angles: tuple[Floats, Floats], rows: int
    ) -> None:
        heads, kv_heads = self._geometry.heads, self._geometry.kv_heads
        self._inputs.take_normed(self._x[:rows], layer.before_attention, self._eps)
        flat = self._qkv.reshape(MAX_ROWS, -1)
        flat[:] = layer.bias if len(layer.bias) else 0
        multiply(self._inputs, layer.qkv, flat, rows)
        rotate(self._qkv, 0, heads, *angles, layer.q_norm, self._eps)
        rotate(self._qkv, heads, heads + kv_heads, *angles, layer.k_norm, self._eps)
        for part in slices:
            these = slice(part.start, part.start + part.count)
            q, k, v = self._by_head[:, these].split_with_sizes([heads, kv_heads, kv_heads])
            call = Call(index, part, layer.scale, layer.softcap, layer.window)
            self._attended[these] = self._attention.attend(q, k, v, call).numpy().reshape(part.count, -1)
        self._inputs.take(self._attended[:rows])
        self._add(layer.out, layer.after_attention, rows)

    def _feed_forward(self, layer: _Layer, rows: int) -> None:
        self._inputs.take_normed(self._x[:rows], layer.before_mlp, self._eps)
        self._gate_up[:] = 0
        multiply(self._inputs, layer.gate_up, self._gate_up, rows)
        self._inputs.take_gated(self._gate_up[:rows], gelu=self._gelu)
        self._add(layer.down, layer.after_mlp, rows)

    def _add(self, weights: Packed, norm: Floats, rows: int) -> None:
        """Add a product, normed where the family does that, to the residual stream."""
        if not len(norm):
            multiply(self._inputs, weights, self._x, rows)
            return
        self._delta[:] = 0
        multiply(self._inputs, weights, self._delta, rows)
        add_normed(self._x[:rows], self._delta[:rows], norm, self._eps)


def _layer(
    index: int,
    layer: Any,
    weights: Mapping[str, Packed],
    softcap: float,
    window: int | None,
    gemma: bool,
    rotary: Any,
) -> _Layer:
    attention, name = layer.self_attn, f"layers.{index}"
    biases = [part.bias for part in attention_inputs(attention) if part.bias is not None]
    before_mlp = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
    return _Layer(
        qkv=weights[f"{name}.qkv"],
        bias=torch.cat(biases).float().numpy() if biases else NOTHING,
        out=weights[f"{name}.out"],
        gate_up=weights[f"{name}.gate_up"],
        down=weights[f"{name}.down"],
        before_attention=_factors(layer.input_layernorm, gemma),
        after_attention=_factors(layer.post_attention_layernorm, gemma) if gemma else NOTHING,
        before_mlp=_factors(before_mlp, gemma),
        after_mlp=_factors(layer.post_feedforward_layernorm, gemma) if gemma else NOTHING,
        q_norm=_factors(getattr(attention, "q_norm", None), gemma),
        k_norm=_factors(getattr(attention, "k_norm", None), gemma),
        rope=str(attention.layer_type) if isinstance(rotary.rope_type, dict) else "",
        scale=float(attention.scaling),
        softcap=softcap,
        window=window,
    )


def _factors(norm: Any, gemma: bool) -> Floats:
    """What a norm multiplies by: Gemma stores it less 1."""
    if norm is None:
        return NOTHING
    weight = norm.weight.float()
    factors: Floats = (1 + weight if gemma else weight).numpy()
    return factors
