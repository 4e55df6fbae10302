"""The families that are served: config.json's model_type, and the class of transformers that computes it.

A model of text and images is a wrapper around one of text, which is what is served. A family of text that is
not listed here is served if it passes the parity check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_LLAMA_LIKE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "glm4": "Glm4ForCausalLM",
}
_QWEN = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_GEMMA = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3n_text": "Gemma3nForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
}
_MIXTURES_OF_EXPERTS = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
_LLAMA4 = {"llama4_text": "Llama4ForCausalLM"}
_WITH_STATE = {
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
}

FAMILIES: dict[str, str] = _LLAMA_LIKE | _QWEN | _GEMMA | _MIXTURES_OF_EXPERTS | _LLAMA4 | _WITH_STATE
"""The class that computes each family of text, by model_type."""


@dataclass(frozen=True)
class Wrapper:
    """A model of text and images around one of text.

    Attributes:
        class_name: The class of transformers that computes the whole.
        texts: The families that its text part may be of.
    """

    class_name: str
    texts: frozenset[str]


WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper("Gemma3ForConditionalGeneration", frozenset({"gemma3_text"})),
    "gemma3n": Wrapper("Gemma3nForConditionalGeneration", frozenset({"gemma3n_text"})),
    "gemma4": Wrapper("Gemma4ForConditionalGeneration", frozenset({"gemma4_text"})),
    "llama4": Wrapper("Llama4ForConditionalGeneration", frozenset({"llama4_text"})),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", frozenset({"mistral", "ministral3"})),
    "qwen3_5": Wrapper("Qwen3_5ForConditionalGeneration", frozenset({"qwen3_5_text"})),
    "qwen3_5_moe": Wrapper("Qwen3_5MoeForConditionalGeneration", frozenset({"qwen3_5_moe_text"})),
}
"""Models of text and images, by model_type."""


def class_of(family: str) -> str | None:
    """Return the class of transformers that computes a family of text, None if it has none."""
    if family in FAMILIES:  # before torch is imported, where a start is to fail at once
        return FAMILIES[family]
    from transformers.models.auto import modeling_auto

    found: str | None = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)
    return found
