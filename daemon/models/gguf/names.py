"""Which tensors of a GGUF file make each parameter of transformers' module, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from spilld.errors import UnsupportedModel

from .header import GgufHeader
from .metadata import FREQUENCIES, LONG, SHORT


@dataclass(frozen=True)
class Recipe:
    """How a parameter is made.

    Attributes:
        parts: The tensors whose outputs are its outputs, one tensor after another; for experts within each.
        heads: Heads whose halves llama.cpp interleaves; 0 for none.
        plus_one: Whether the file has the parameter plus 1.
        row: Whether the file may have its one row without an axis for it.
    """

    parts: tuple[str, ...]
    heads: int = 0
    plus_one: bool = False
    row: bool = False


_LAYER = re.compile(r"blk\.(\d+)\.([a-z_0-9]+)\.(weight|bias)")
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_OWN: dict[str, dict[str, str]] = {
    "gemma": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
}
_INTERLEAVED = ("llama", "smollm3")
"""Architectures whose query and key rows llama.cpp stores in another order."""

_NO_PARAMETERS = frozenset({FREQUENCIES, LONG, SHORT})
"""Tensors that are read for the config."""


def recipes(header: GgufHeader, name: str) -> dict[str, Recipe]:
    """Return how each parameter is made, by its name in the module.

    Every tensor has its place in one of them, or is read for the config.

    Raises:
        UnsupportedModel: A tensor of the file has no place in the module.
    """
    architecture = header.architecture
    found: dict[str, Recipe] = {}
    for tensor in header.tensors:
        if tensor in _NO_PARAMETERS:
            continue
        if (whole := _WHOLE.get(tensor)) is not None:
            found[whole] = Recipe((tensor,), plus_one=_plus_one(architecture, tensor))
            continue
        match = _LAYER.fullmatch(tensor)
        parameter = _of_layer(header, *match.groups()) if match else None
        if parameter is None:
            raise UnsupportedModel(f"{name} has the tensor {tensor}, which is not understood")
        found[parameter[0]] = parameter[1]
    return found


def _of_layer(header: GgufHeader, layer: str, stem: str, suffix: str) -> tuple[str, Recipe] | None:
    architecture, tensor = header.architecture, f"blk.{layer}.{stem}.{suffix}"
    if stem.endswith("_exps"):
        return _of_experts(header, layer, stem) if suffix == "weight" else None
    own = _OWN.get("gemma" if architecture.startswith("gemma") else architecture, {})
    names: Mapping[str, str] = _OF_LAYER | _EXPERTS | own
    if stem not in names:
        return None
    recipe = Recipe(
        (tensor,),
        _heads(header, stem),
        plus_one=_plus_one(architecture, tensor),
        row=stem == "ffn_gate_inp_shexp",
    )
    return f"model.layers.{layer}.{names[stem]}.{suffix}", recipe


def _of_experts(header: GgufHeader, layer: str, stem: str) -> tuple[str, Recipe] | None:
    at = f"model.layers.{layer}.mlp.experts"
    if stem == "ffn_down_exps":
        return f"{at}.down_proj", Recipe((f"blk.{layer}.{stem}.weight",))
    parts = tuple(f"blk.{layer}.{part}.weight" for part in ("ffn_gate_exps", "ffn_up_exps"))
    if stem not in ("ffn_gate_exps", "ffn_up_exps") or not set(parts) <= header.tensors.keys():
        return None
    return f"{at}.gate_up_proj", Recipe(parts)


def _heads(header: GgufHeader, stem: str) -> int:
    if header.architecture not in _INTERLEAVED or stem not in ("attn_q", "attn_k"):
        return 0
    heads = header.of_model("attention.head_count")
    if stem == "attn_k":
        heads = header.of_model("attention.head_count_kv") or heads
    return heads if isinstance(heads, int) else 0


def _plus_one(architecture: str, tensor: str) -> bool:
    return architecture.startswith("gemma") and tensor.endswith("norm.weight")
