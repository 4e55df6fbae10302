"""Tiny models with random weights that mix attention with a state: delta rule, Mamba 2, convolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from .tiny_models import SHARED, byte_level

_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
_ATTENTION, _STATE = "full_attention", "linear_attention"
_DELTA_RULE = {
    **_HEADS,
    "head_dim": 32,
    "num_hidden_layers": 4,
    "layer_types": [_STATE, _STATE, _ATTENTION, _STATE],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3_5_text": (transformers.Qwen3_5TextConfig, transformers.Qwen3_5ForCausalLM, _DELTA_RULE),
    "qwen3_5_moe_text": (
        transformers.Qwen3_5MoeTextConfig,
        transformers.Qwen3_5MoeForCausalLM,
        {**_DELTA_RULE, **_EXPERTS},
    ),
    "qwen3_next": (
        transformers.Qwen3NextConfig,
        transformers.Qwen3NextForCausalLM,
        {**_DELTA_RULE, **_EXPERTS, "norm_topk_prob": True},
    ),
    "granitemoehybrid": (
        transformers.GraniteMoeHybridConfig,
        transformers.GraniteMoeHybridForCausalLM,
        {
            **_HEADS,
            "num_hidden_layers": 4,
            "layer_types": [_STATE, _ATTENTION, _STATE, _STATE],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 128,
            "attention_multiplier": 0.0625,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 6.0,
        },
    ),
    "nemotron_h": (
        transformers.NemotronHConfig,
        transformers.NemotronHForCausalLM,
        {
            **_HEADS,
            "head_dim": 16,
            "layers_block_type": [_STATE, "mlp", _ATTENTION, "moe", _STATE],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    "lfm2_moe": (
        transformers.Lfm2MoeConfig,
        transformers.Lfm2MoeForCausalLM,
        {
            **_HEADS,
            "num_hidden_layers": 3,
            "layer_types": ["conv", _ATTENTION, "conv"],
            "conv_L_cache": 3,
            "num_dense_layers": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "lfm2": (
        transformers.Lfm2Config,
        transformers.Lfm2ForCausalLM,
        {**_HEADS, "num_hidden_layers": 3, "layer_types": ["conv", _ATTENTION, "conv"], "conv_L_cache": 3},
    ),
}
HYBRIDS = tuple(_MODELS)


def hybrid_config(family: str) -> Any:
    """The config of a tiny hybrid."""
    configure, _, sizes = _MODELS[family]
    return configure(**{**SHARED, **sizes})


def build_hybrid(family: str, folder: Path) -> Path:
    """Write a whole folder, as tiny_models.build does, and return it."""
    torch.manual_seed(0)
    module = _MODELS[family][1](hybrid_config(family))
    with torch.no_grad():
        for name, parameter in module.named_parameters():  # or the states forget everything at once
            if name.endswith("A_log"):
                parameter.uniform_(-4, 0.5)
            if name.endswith("dt_bias"):
                parameter.uniform_(-4, -1)
    module.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder
