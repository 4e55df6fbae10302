"""What a GGUF file's metadata says of its model, compared with what transformers' reader makes of it.

That reader takes the keys that it knows and silently leaves out the others. Here every key under the name of
the architecture has a meaning: what it says is in the module's config, or does not matter, or the file is
refused. Where the reader leaves out something that its config can express, it is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from spilld.errors import CorruptModel, UnsupportedModel

from .header import GgufHeader, Value

GGUF_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
"""GGUF's general.architecture of the supported families."""

_INSTEAD = "use the model's Hugging Face folder"

_NEEDED = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"),
    "attention.layer_norm_rms_epsilon",
)

_IN_CONFIG: dict[str, Callable[[Any], object]] = {
    "block_count": lambda config: config.num_hidden_layers,
    "context_length": lambda config: config.max_position_embeddings,
    "embedding_length": lambda config: config.hidden_size,
    "feed_forward_length": lambda config: config.intermediate_size,
    "vocab_size": lambda config: config.vocab_size,
    "attention.head_count": lambda config: config.num_attention_heads,
    "attention.head_count_kv": lambda config: config.num_key_value_heads,
    "attention.key_length": lambda config: _head_dim(config),
    "attention.key_length_swa": lambda config: _head_dim(config),
    "attention.value_length": lambda config: _head_dim(config),
    "attention.value_length_swa": lambda config: _head_dim(config),
    "attention.layer_norm_rms_epsilon": lambda config: config.rms_norm_eps,
    "attention.sliding_window": lambda config: getattr(config, "sliding_window", None) or 0,
    "attention.sliding_window_pattern": lambda config: tuple(
        kind == "sliding_attention" for kind in config.layer_types
    ),
    "attn_logit_softcapping": lambda config: getattr(config, "attn_logit_softcapping", None) or 0.0,
    "final_logit_softcapping": lambda config: getattr(config, "final_logit_softcapping", None) or 0.0,
    "rope.dimension_count": lambda config: _rotary(config),
    "rope.dimension_count_swa": lambda config: _rotary(config),
    "rope.freq_base": lambda config: _rope(config, "full_attention")["rope_theta"],
    "rope.freq_base_swa": lambda config: _rope(config, "sliding_attention")["rope_theta"],
}
"""What the module computes with, by the key that says what the model was made with."""

_ONE_WAY: dict[str, tuple[Value, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "use_parallel_residual": (False,),
}
"""Values with which a key asks for nothing: llama.cpp takes a factor of 0 for none."""

_HARMLESS = frozenset(
    {
        *("pooling_type", "tensor_data_layout", "rope.scaling.finetuned"),
        *("rope.scaling.original_context_length", "rope.scaling.yarn_log_multiplier"),
        *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    }
)
"""Of no effect on a text model without YaRN, which is refused."""

_ROPE = frozenset({"rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"})


def check_header(header: GgufHeader, name: str) -> None:
    """Check that a file's model can be served, and stays the same model when it is loaded.

    Args:
        header: The file's header.
        name: What errors call the file.

    Raises:
        UnsupportedModel: It cannot, or would be another model once it is loaded.
        CorruptModel: The header lacks a key.
    """
    if header.architecture not in GGUF_ARCHITECTURES:
        raise UnsupportedModel(
            f"{name}: GGUF architecture {header.architecture!r} is not supported; "
            f"{', '.join(GGUF_ARCHITECTURES)} are"
        )
    if header.values.get("general.type") not in (None, "model"):
        raise UnsupportedModel(f"{name} is no model, but of type {header.values['general.type']!r}")
    if header.of_model("expert_count"):
        raise UnsupportedModel(f"{name}: mixture-of-experts models are not supported")
    linear_factor(header, name)
    if any(tensor.startswith("rope_") for tensor in header.tensors):
        raise UnsupportedModel(f"{name}: its RoPE scaling cannot be read from GGUF; {_INSTEAD}")
    if header.architecture in ("gemma2", "gemma3") and header.of_model("attention.key_length") != 256:
        raise UnsupportedModel(f"{name}: GGUF does not state this size's attention scale; {_INSTEAD}")
    for key in header.model_keys():
        _check_key(header, key, name)
    needed = (*_NEEDED, "attention.sliding_window") if header.architecture.startswith("gemma") else _NEEDED
    if missing := [key for key in needed if header.of_model(key) is None]:
        raise CorruptModel(f"{name}: the GGUF header does not say {header.architecture}.{missing[0]}")


def _check_key(header: GgufHeader, key: str, name: str) -> None:
    value = header.of_model(key)
    if key in _HARMLESS or key in _ROPE:
        return
    by_layer = isinstance(value, tuple) and key != "attention.sliding_window_pattern"
    if value is None or by_layer or (key not in _IN_CONFIG and key not in _ONE_WAY):
        raise UnsupportedModel(
            f"{name}: what {header.architecture}.{key} says cannot be read from GGUF; {_INSTEAD}"
        )
    if key in _ONE_WAY and value not in _ONE_WAY[key]:
        raise UnsupportedModel(
            f"{name}: {header.architecture}.{key} = {value} is not supported; {_INSTEAD} if that is"
        )


def linear_factor(header: GgufHeader, name: str) -> float:
    """Return by what factor positions are divided before RoPE; 1.0 for not at all.

    llama.cpp takes a factor without a type for a linear one, and the older rope.scale_linear where there is
    none.

    Raises:
        UnsupportedModel: The scaling is of another type.
    """
    kind = header.of_model("rope.scaling.type")
    if kind == "none":
        return 1.0
    if kind not in (None, "linear"):
        raise UnsupportedModel(f"{name}: RoPE scaling {kind!r} cannot be read from GGUF; {_INSTEAD}")
    found = header.of_model("rope.scaling.factor")
    if found is None:
        found = header.of_model("rope.scale_linear")
    factor = float(found) if isinstance(found, (int, float)) and found else 1.0
    if factor != 1.0 and header.architecture.startswith("gemma"):
        raise UnsupportedModel(f"{name}: GGUF does not state which layers have RoPE scaling; {_INSTEAD}")
    return factor


def complete(config: Any, header: GgufHeader, name: str) -> None:
    """Add to transformers' config what its reader leaves out."""
    if (length := header.of_model("attention.key_length")) is not None:
        config.head_dim = length
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := header.of_model(key)) is not None and hasattr(config, key):
            setattr(config, key, cap or None)
    if (factor := linear_factor(header, name)) != 1.0:
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": factor}


def check_config(config: Any, header: GgufHeader, name: str) -> None:
    """Check that the config that a module was made with is what the file says.

    Raises:
        UnsupportedModel: It is not.
    """
    for key, ours in _IN_CONFIG.items():
        theirs = _effective(header, key)
        if theirs is not None and not _same(theirs, found := ours(config)):
            raise UnsupportedModel(
                f"{name}: {header.architecture}.{key} is {theirs} and would be {found}; {_INSTEAD}"
            )


def _effective(header: GgufHeader, key: str) -> Value:
    """Return what llama.cpp uses: the value, or that of other keys in its place."""
    value = header.of_model(key)
    if key == "attention.sliding_window_pattern" and isinstance(value, int) and not isinstance(value, bool):
        layers = int(header.of_model("block_count") or 0)  # type: ignore[arg-type]
        return tuple(value == 0 or (i + 1) % value != 0 for i in range(layers))
    if value is not None:
        return value
    if key == "rope.freq_base":
        return 10000.0
    if key == "attention.head_count_kv":
        return header.of_model("attention.head_count")
    return None


def _same(theirs: Value, ours: object) -> bool:
    if isinstance(theirs, float) and isinstance(ours, (int, float)):
        return math.isclose(theirs, ours, rel_tol=1e-6)  # GGUF has them in float32
    return theirs == ours


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any, kind: str) -> dict[str, Any]:
    """Return the RoPE parameters of a kind of layers, or of all."""
    found: dict[str, Any] = config.rope_parameters
    return found.get(kind) or found


def _rotary(config: Any) -> int:
    return int(_head_dim(config) * _rope(config, "full_attention").get("partial_rotary_factor", 1.0))
