"""Which modules steps over packed weights can replace.

packed_model.py computes what these classes of transformers do, and nothing else. Another family may have the
same names and shapes and be another function of them: factors on embeddings, residuals or logits (Granite),
layers without RoPE (SmolLM3), interleaved RoPE (GLM-4), scaled queries (Ministral 3).
"""

from __future__ import annotations

import re
from typing import Any

from spilld.errors import UnsupportedModel

_CLASS_PREFIXES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "phi3": "Phi3",
}
"""Folders of transformers.models, and how the names of the classes in them begin."""

_PARTS = (
    *("ForCausalLM", "Model", "TextModel", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding"),
    "TextScaledWordEmbedding",
)
_PLAIN = (
    *("torch.nn.modules.container.ModuleList", "torch.nn.modules.linear.Linear"),
    *("torch.nn.modules.sparse.Embedding", "torch.nn.modules.dropout.Dropout"),
    *("transformers.activations.SiLUActivation", "transformers.activations.GELUTanh"),
    *("torch.nn.modules.activation.SiLU", "spilld.models.wide_linear.WideLinear"),
)
_KNOWN = frozenset(_PLAIN) | {
    f"transformers.models.{folder}.modeling_{folder}.{name}{part}"
    for folder, name in _CLASS_PREFIXES.items()
    for part in _PARTS
}
_READ = re.compile(
    r"lm_head\.weight|model\.(embed_tokens|norm)\.weight|model\.layers\.\d+\.("
    r"self_attn\.((q|k|v|qkv)_proj\.(weight|bias)|(o_proj|q_norm|k_norm)\.weight)"
    r"|mlp\.(gate|up|gate_up|down)_proj\.weight"
    r"|(input|post_attention|pre_feedforward|post_feedforward)_layernorm\.weight)"
)
"""Names of the tensors that steps over packed weights make use of."""


def check_packable(module: Any) -> None:
    """Check that steps over packed weights compute what this module does.

    Raises:
        UnsupportedModel: They do not.
    """
    if why := not_packable(module):
        raise UnsupportedModel(f"{why}; its own layers can have packed weights")


def not_packable(module: Any) -> str:
    """Return what of a module steps over packed weights do not compute; empty if they do all."""
    for name, part in module.named_modules():
        if (kind := f"{type(part).__module__}.{type(part).__qualname__}") not in _KNOWN:
            return f"steps over packed weights know no {kind}, which is {name or 'this model'}"
    for name, _ in module.named_parameters():
        if not _READ.fullmatch(name):
            return f"steps over packed weights would leave out {name}"
    config = module.config
    for name, part in module.named_modules():
        eps = getattr(part, "variance_epsilon", getattr(part, "eps", None))
        if eps is not None and eps != config.rms_norm_eps:
            return f"{name} has an epsilon of {eps}, the model {config.rms_norm_eps}"
    return ""
