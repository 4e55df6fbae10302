"""A reduced model: random weights, and no more layers, words and experts than have every kind of layer."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from spilld.errors import UnsupportedModel
from spilld.kv.geometry import UNSCALED
from spilld.kv.state_geometry import state_geometries

VOCAB = 256
WIDTH = 256
"""Numbers between the products of an MLP or an expert."""

HIDDEN = 512

WINDOW = 100
"""Tokens of a sliding window or of what else begins after so many: fewer than are compared."""

_WIDTHS = re.compile(r"(\w+_)?intermediate_size")
_DISTANCES = ("sliding_window", "attention_chunk_size", "floor_scale")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "top_k")
_FIRST_DENSE = ("first_k_dense_replace", "num_dense_layers")
_EVERY = ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq", "full_attention_interval")
_NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")


def reduced_config(config: Any) -> Any:
    """Return the config of a reduced model.

    Args:
        config: A transformers config of a model of text.

    Raises:
        UnsupportedModel: It does not say what every model of text says.
    """
    if missing := [name for name in _NEEDED if not isinstance(getattr(config, name, None), int)]:
        raise UnsupportedModel(f"the config of a {config.model_type} has no {', '.join(missing)}")
    said = config.to_dict()
    layers = config.num_hidden_layers
    kept = min(layers, max(_kinds(said, layers), _of_experts(said)))
    if said.get("num_kv_shared_layers"):  # which the last layers are
        kept = layers
    for name, value in said.items():
        if isinstance(value, list) and len(value) == layers:
            said[name] = value[:kept]
        elif name == "per_layer_config" and isinstance(value, dict):
            said[name] = {layer: own for layer, own in value.items() if int(layer) < kept}
        elif name in _DISTANCES and value:
            said[name] = min(value, WINDOW)
        elif _WIDTHS.fullmatch(name) and isinstance(value, int):
            said[name] = min(value, WIDTH)
        elif name.startswith("vocab_size") and isinstance(value, int):
            said[name] = min(value, VOCAB)
        elif name in _EXPERTS and value:
            said[name] = min(value, _experts(said))
    if not state_geometries(config):
        said.update(_narrower(said))
    said.pop("quantization_config", None)
    return type(config).from_dict({**said, "num_hidden_layers": kept, "pad_token_id": 0})


def _narrower(said: dict[str, Any]) -> dict[str, int]:
    """Return numbers of heads and of hidden units that leave heads as large as they are."""
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads")
    hidden, heads, kv_heads = (said.get(name) or 0 for name in names)
    if not (hidden and heads and kv_heads):
        return {}
    part = max(1, kv_heads // 2)
    if any(number % part for number in (hidden, heads, kv_heads)):
        part = 1
    hidden //= part
    if isinstance(said.get("head_dim"), int):
        hidden = min(hidden, max(1, HIDDEN // heads) * heads)  # of which some want a whole number a head
    return dict(zip(names, (hidden, heads // part, kv_heads // part), strict=True))


def _kinds(said: dict[str, Any], layers: int) -> int:
    """Return how many layers there are up to the first of the last kind, and at least two."""
    lists = [value for value in said.values() if isinstance(value, list) and len(value) == layers]
    kinds = [repr(kind) for kind in zip(*lists, strict=True)]
    return max([2, *(kinds.index(kind) + 1 for kind in kinds)])


def _of_experts(said: dict[str, Any]) -> int:
    """Return how many layers it takes to have one with experts and one without."""
    dense = [said.get(name) or 0 for name in _FIRST_DENSE]
    every = [value for name in _EVERY if isinstance(value := said.get(name), int)]
    return max([0, *(count + 1 for count in dense), *every])


def _experts(said: dict[str, Any]) -> int:
    """Return a number of experts that lets each token choose."""
    chosen = next((said[name] for name in _CHOSEN if said.get(name)), 1)
    groups = said.get("n_group") or 1
    return groups * max(2, math.ceil(2 * chosen / min(groups, said.get("topk_group") or 1)))


def make(module_class: Any, config: Any) -> Any:
    """Return a module with random weights, the same in every process, that attends by transformers' code."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = module_class._from_config(config, dtype=torch.float32, attn_implementation="eager")
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if tensor.dim() > 1:
                tensor.normal_(std=tensor.shape[-1] ** -0.5)
            else:  # norms, biases, sinks, decays: near what training begins with
                tensor.add_(torch.randn_like(tensor), alpha=0.2)
            if config.model_type in UNSCALED and name.endswith("q_norm.weight"):
                tensor.mul_(len(tensor) ** -0.5)
    return module.eval().requires_grad_(False)
