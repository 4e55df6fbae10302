"""Tiny models with random weights, as complete Hugging Face folders: one of each supported family.

Head counts cover grouped-query ratios 1, 2, 3 and 4; head_dim 16 and 32; windows shorter than a few blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

VOCAB = 384
LONGROPE_ORIGINAL = 64
"""Positions that tiny `phi3-longrope` serves with its short factors."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
END = 2
"""The id of <|im_end|>."""

SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": END,
    "pad_token_id": 3,
    "initializer_range": 0.15,
}
_SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 100,
    },
    "qwen2": {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "qwen3": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "gemma2": {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 96,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 80,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "phi3-longrope": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "original_max_position_embeddings": LONGROPE_ORIGINAL,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 1.5 * i for i in range(8)],
            "original_max_position_embeddings": LONGROPE_ORIGINAL,
        },
    },
}
_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    "phi3-longrope": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
}

FAMILIES = tuple(_SIZES)
"""Those that are served. Llama ties its embeddings; Mistral slides in every layer, the Gemmas in some."""

_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_SOME_SLIDE = {
    "num_hidden_layers": 4,
    "sliding_window": 80,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_OTHERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "granite": (
        transformers.GraniteConfig,
        transformers.GraniteForCausalLM,
        {
            "attention_multiplier": 0.0625,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "glm4": (transformers.Glm4Config, transformers.Glm4ForCausalLM, {"head_dim": 16, "attention_bias": True}),
    "smollm3": (
        transformers.SmolLM3Config,
        transformers.SmolLM3ForCausalLM,
        {"no_rope_layer_interval": 2, "use_sliding_window": False},
    ),
    "ministral3": (
        transformers.Ministral3Config,
        transformers.Ministral3ForCausalLM,
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 16.0,
                "original_max_position_embeddings": 256,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM, {}),
    "olmo3": (transformers.Olmo3Config, transformers.Olmo3ForCausalLM, _SOME_SLIDE),
    "cohere2": (
        transformers.Cohere2Config,
        transformers.Cohere2ForCausalLM,
        {**_SOME_SLIDE, "head_dim": 16, "logit_scale": 0.25},
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        transformers.GptOssForCausalLM,
        {**_SOME_SLIDE, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4_text": (
        transformers.Llama4TextConfig,
        transformers.Llama4ForCausalLM,
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 150,
            "floor_scale": 64,
            "attn_scale": 0.3,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 112,
        },
    ),
    "gemma3n": (
        transformers.Gemma3nTextConfig,
        transformers.Gemma3nForCausalLM,
        {
            **_SOME_SLIDE,
            "head_dim": 32,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 3,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
        },
    ),
    "gemma4": (
        transformers.Gemma4TextConfig,
        transformers.Gemma4ForCausalLM,
        {
            **_SOME_SLIDE,
            "head_dim": 16,
            "global_head_dim": 32,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 3,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma4-experts": (
        transformers.Gemma4TextConfig,
        transformers.Gemma4ForCausalLM,
        {
            **_SOME_SLIDE,
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "final_logit_softcapping": 30.0,
        },
    ),
    "mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 100},
    ),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        transformers.Qwen2MoeForCausalLM,
        {**_EXPERTS, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {**_EXPERTS, "head_dim": 32, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "glm4_moe": (
        transformers.Glm4MoeConfig,
        transformers.Glm4MoeForCausalLM,
        {
            "head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
}
MODULES = tuple(_OTHERS)
"""Served, each by its own module: steps over packed weights would make another model of it."""

for _family, (_configure, _model, _changes) in _OTHERS.items():
    _CLASSES[_family] = _configure, _model
    _SIZES[_family] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **_changes,
    }


def config_of(family: str, **changes: Any) -> Any:
    """The config of a tiny model; arguments as in `build`."""
    return _CLASSES[family][0](**{**SHARED, **_SIZES[family], **changes})


def build(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a whole folder (float32 weights, config, tokenizer, chat template) and return it.

    family: of FAMILIES or MODULES. changes: config entries that differ from the usual tiny ones.
    """
    torch.manual_seed(seed)
    module = _CLASSES[family][1](config_of(family, **changes))
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("e_score_correction_bias"):  # zeros until a model is trained
                tensor.normal_(std=0.3)
            if family.startswith("gemma4") and name.endswith("q_norm.weight"):
                tensor.fill_(0.25)  # logits are not scaled: hard choices would double every rounding
            if name.endswith("layer_scalar"):
                tensor.fill_(0.7)
            if name.endswith("sinks"):
                tensor.normal_(mean=2.0)
    module.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


def byte_level() -> Any:
    """A transformers tokenizer: byte-level BPE as in GPT-2, no start token, a ChatML template."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([__doc__ or "", CHAT_TEMPLATE] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[3],
        chat_template=CHAT_TEMPLATE,
    )


def byte_fallback() -> tokenizers.Tokenizer:
    """A tokenizer like Llama 2's: a start token, U+2581 for spaces and one in front, the unknown as bytes."""
    words = ["\u2581", "\u2581the", "\u2581model", "he", "lo", *"abcdefghijklmnopqrstuvwxyzé.,!?\n"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, "th", "\u2581th"]))}
    merges = [("h", "e"), ("l", "o")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend
