"""What a GGUF file's metadata says of its model: the values of the config that transformers computes it with.

Every key under the name of the architecture has a meaning here: it is in the config, or asks for nothing, or
does not matter to text, or the file is refused. What llama.cpp takes where a key is missing is taken here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from spilld.errors import CorruptModel, UnsupportedModel

from .header import GgufHeader, Scalar, Value

GGUF_ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen2moe",
    "qwen3moe",
    "gemma2",
    "gemma3",
    "phi3",
    "smollm3",
)
"""GGUF's general.architecture of the supported families."""

INSTEAD = "use the model's Hugging Face folder"

_ONE_WAY: dict[str, tuple[Value, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_gating_func": (1,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (0.0, 1.0),
    "use_parallel_residual": (False,),
}
"""Values with which a key that a family does not have asks for nothing: 0 is no factor for llama.cpp."""

_HARMLESS = frozenset(
    {
        *("pooling_type", "tensor_data_layout", "rope.scaling.finetuned"),
        *("rope.scaling.original_context_length", "rope.scaling.yarn_log_multiplier"),
        *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    }
)
"""Of no effect on a text model without YaRN; with it, yarn() reads them."""

_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
"""llama.cpp knows the size whose attention scale is another one by its layers: no key says it."""

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors of factors that RoPE's frequencies are divided by."""


class MetadataKeys:
    """The keys under the name of the architecture; those that were asked for are noted."""

    def __init__(self, header: GgufHeader, name: str) -> None:
        """Read from `header`; `name` is what errors call the file."""
        self.header = header
        self.name = name
        self._asked: set[str] = set()

    def get(self, key: str) -> Scalar | None:
        """Return a key's value, or None.

        Raises:
            UnsupportedModel: It is an array, one value for each layer.
        """
        self._asked.add(key)
        value = self.header.of_model(key)
        if isinstance(value, tuple) or (value is None and f"{self._prefix}{key}" in self.header.values):
            raise self.refused(key)
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a count or a length, which is `default` where it is missing.

        Raises:
            CorruptModel: It is missing without a default, or no count.
        """
        value = default if (said := self.get(key)) is None else said
        if value is None:
            raise CorruptModel(f"{self.name}: the GGUF header does not say {self._prefix}{key}")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
            raise CorruptModel(f"{self.name}: {self._prefix}{key} is {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number, which is `default` where it is missing.

        Raises:
            CorruptModel: It is missing without a default, or not finite.
        """
        value = default if (said := self.get(key)) is None else said
        if value is None:
            raise CorruptModel(f"{self.name}: the GGUF header does not say {self._prefix}{key}")
        if isinstance(value, (str, bool)) or not math.isfinite(value):
            raise CorruptModel(f"{self.name}: {self._prefix}{key} is {value!r}")
        return float(value)

    def must_be(self, key: str, wanted: Scalar) -> None:
        """Check that a key, if there is one, says what is computed.

        Raises:
            UnsupportedModel: It does not.
        """
        value = self.get(key)
        if value is not None and value != wanted:
            raise UnsupportedModel(
                f"{self.name}: {self._prefix}{key} is {value} and would be {wanted}; {INSTEAD}"
            )

    def pattern(self, key: str, period: int, layers: int) -> list[bool]:
        """Return which layers slide: all but each `period`-th, or as the key says."""
        self._asked.add(key)
        said = self.header.of_model(key)
        if isinstance(said, tuple):
            if len(said) < layers:
                raise CorruptModel(f"{self.name}: {self._prefix}{key} is of {len(said)} layers of {layers}")
            return [bool(slides) for slides in said[:layers]]
        if said is not None or f"{self._prefix}{key}" in self.header.values:
            period = self.size(key)
        return [period == 0 or (layer + 1) % period != 0 for layer in range(layers)]

    def check_rest(self) -> None:
        """Check that the keys that nobody asked for ask for nothing.

        Raises:
            UnsupportedModel: One does not.
        """
        for key in self.header.model_keys():
            if key in self._asked or key in _HARMLESS:
                continue
            value = self.header.of_model(key)
            if key not in _ONE_WAY or isinstance(value, tuple) or value is None:
                raise self.refused(key)
            if value not in _ONE_WAY[key]:
                raise UnsupportedModel(
                    f"{self.name}: {self._prefix}{key} = {value} is not supported; {INSTEAD} if that is"
                )

    def refused(self, key: str) -> UnsupportedModel:
        """Return the error for a key that is not understood."""
        return UnsupportedModel(
            f"{self.name}: what {self._prefix}{key} says cannot be read from GGUF; {INSTEAD}"
        )

    @property
    def _prefix(self) -> str:
        return f"{self.header.architecture}."


def config_values(header: GgufHeader, name: str) -> dict[str, Any]:
    """Return the values of transformers' config, with `model_type`.

    Factors of RoPE that are tensors are to be put in yet (`rope_factors`).

    Args:
        header: The file's header, with the tensors of all its parts.
        name: What errors call the file.

    Raises:
        UnsupportedModel: The model is of a kind that is not served, or would be another one.
        CorruptModel: The header lacks a key, or says what cannot be.
    """
    architecture = header.architecture
    if architecture not in GGUF_ARCHITECTURES:
        raise UnsupportedModel(
            f"{name}: GGUF architecture {architecture!r} is not supported; "
            f"{', '.join(GGUF_ARCHITECTURES)} are"
        )
    if header.values.get("general.type") not in (None, "model"):
        raise UnsupportedModel(f"{name} is no model, but of type {header.values['general.type']!r}")
    keys = MetadataKeys(header, name)
    values = _of_all(keys)
    values |= _OF_FAMILY[architecture](keys, values)
    keys.check_rest()
    return values


def _of_all(keys: MetadataKeys) -> dict[str, Any]:
    header = keys.header
    layers, hidden, heads = (
        keys.size(key) for key in ("block_count", "embedding_length", "attention.head_count")
    )
    if "token_embd.weight" not in header.tensors:
        raise CorruptModel(f"{keys.name} lacks the tensor token_embd.weight")
    if not 0 < layers <= len(header.tensors) or not 0 < heads <= hidden:
        raise CorruptModel(
            f"{keys.name}: a model of {layers} layers, {heads} heads and width {hidden}, in "
            f"{len(header.tensors)} tensors"
        )
    head_dim = keys.size("attention.key_length", hidden // heads)
    keys.must_be("attention.value_length", head_dim)
    for key in ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"):
        keys.must_be(key, head_dim)
    vocabulary = header.tensors["token_embd.weight"].shape[0]
    keys.must_be("vocab_size", vocabulary)
    ids = {
        f"{which}_token_id": header.values.get(f"tokenizer.ggml.{key}_token_id")
        for which, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **ids,
    }


def _rope(keys: MetadataKeys, rotary: int) -> dict[str, Any]:
    """Return the RoPE parameters of transformers for heads of which `rotary` numbers are turned.

    llama.cpp takes a factor without a type for a linear one, and the older rope.scale_linear where there is
    none.
    """
    keys.must_be("rope.dimension_count", rotary)
    base = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    kind = keys.get("rope.scaling.type")
    factor = keys.number("rope.scale_linear", 1.0)
    factor = keys.number("rope.scaling.factor", factor) or 1.0
    own = {FREQUENCIES, LONG, SHORT} & keys.header.tensors.keys()
    if kind not in (None, "none", "linear", "yarn", "longrope"):
        raise UnsupportedModel(f"{keys.name}: RoPE scaling {kind!r} cannot be read from GGUF; {INSTEAD}")
    if kind == "longrope" and own != {LONG, SHORT}:
        raise CorruptModel(f"{keys.name} says RoPE scaling 'longrope' and lacks {LONG} or {SHORT}")
    if own:
        if (kind not in (None, "none") or factor != 1.0) and kind != "longrope":
            raise UnsupportedModel(f"{keys.name} has factors of RoPE beside scaling {kind!r}; {INSTEAD}")
        return base | _own_factors(keys, own)
    if kind == "yarn":
        return base | _yarn(keys, factor)
    if kind == "none" or factor == 1.0:
        return base | {"rope_type": "default"}
    return base | {"rope_type": "linear", "factor": factor}


def _own_factors(keys: MetadataKeys, own: set[str]) -> dict[str, Any]:
    """One set of factors for any length is what longrope computes where both of its sets are that one."""
    context = keys.size("context_length")
    found = {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": keys.number("rope.scaling.attn_factor", 1.0) or 1.0,
        "original_max_position_embeddings": context,
        "short_factor": FREQUENCIES,
        "long_factor": FREQUENCIES,
    }
    if own == {LONG, SHORT}:
        original = keys.size("rope.scaling.original_context_length", context)
        return found | {
            "original_max_position_embeddings": original,
            "short_factor": SHORT,
            "long_factor": LONG,
        }
    if own != {FREQUENCIES}:
        raise CorruptModel(f"{keys.name} has factors of RoPE only in {', '.join(sorted(own))}")
    return found


def _yarn(keys: MetadataKeys, factor: float) -> dict[str, Any]:
    keys.must_be("rope.scaling.yarn_ext_factor", 1.0)
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        keys.must_be(key, 1.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.size(
            "rope.scaling.original_context_length", keys.size("context_length")
        ),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama(keys: MetadataKeys, values: dict[str, Any]) -> dict[str, Any]:
    found = _dense(keys, values, "llama")
    if not keys.get("expert_count"):
        return found
    return found | {
        "model_type": "mixtral",
        "num_local_experts": keys.size("expert_count"),
        "num_experts_per_tok": _experts_used(keys),
        "sliding_window": None,
    }


def _dense(keys: MetadataKeys, values: dict[str, Any], model_type: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "intermediate_size": keys.size("feed_forward_length"),
        "rope_parameters": _rope(keys, values["head_dim"]),
    }


def _qwen2_moe(keys: MetadataKeys, values: dict[str, Any]) -> dict[str, Any]:
    return _qwen_experts(keys, values) | {
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": _width(
            keys, "expert_shared_feed_forward_length", "blk.0.ffn_gate_shexp.weight"
        ),
        "norm_topk_prob": False,
    }


def _qwen3_moe(keys: MetadataKeys, values: dict[str, Any]) -> dict[str, Any]:
    keys.must_be("expert_weights_norm", True)
    return _qwen_experts(keys, values) | {"model_type": "qwen3_moe", "norm_topk_prob": True}


def _qwen_experts(keys: MetadataKeys, values: dict[str, Any]) -> dict[str, Any]:
    width = _width(keys, "expert_feed_forward_length", "blk.0.ffn_gate_exps.weight")
    return {
        "intermediate_size": keys.size("feed_forward_length", width) or width,
        "moe_intermediate_size": width,
        "num_experts": keys.size("expert_count"),
        "num_experts_per_tok": _experts_used(keys),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rope_parameters": _rope(keys, values["head_dim"]),
    }


def _experts_used(keys: MetadataKeys) -> int:
    used = keys.size("expert_used_count")
    if not 0 < used <= keys.size("expert_count"):
        raise CorruptModel(f"{keys.name}: a token uses {used} of {keys.get('expert_count')} experts")
    return used


def _width(keys: MetadataKeys, key: str, tensor: str) -> int:
    """Return the outputs of the first layer's tensor, which older files do not say."""
    found = keys.header.tensors.get(tensor)
    if found is None or len(found.shape) < 2:
        raise CorruptModel(f"{keys.name} lacks the matrix {tensor}")
    keys.must_be(key, found.shape[-2])
    return found.shape[-2]


def _gemma(keys: MetadataKeys, values: dict[str, Any], model_type: str, period: int) -> dict[str, Any]:
    architecture, layers = keys.header.architecture, values["num_hidden_layers"]
    own_scale = layers == _GEMMA_27B_LAYERS[architecture]
    slides = keys.pattern("attention.sliding_window_pattern", period, layers)
    return _dense(keys, values, model_type) | {
        "query_pre_attn_scalar": values["hidden_size"] // values["num_attention_heads"]
        if own_scale
        else values["head_dim"],
        "sliding_window": keys.size("attention.sliding_window"),
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in slides],
    }


def _gemma2(keys: MetadataKeys, values: dict[str, Any]) -> dict[str, Any]:
    found = _gemma(keys, values, "gemma2", 2)
    if found["rope_parameters"]["rope_type"] != "default":
        raise UnsupportedModel(f"{keys.name}: Gemma 2 with RoPE scaling is not supported")
    return found | {
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0) or None,
    }


def _gemma3(keys: MetadataKeys, values: dict[str, Any]) -> dict[str, Any]:
    """RoPE scaling is for the layers that see all; those that slide have a base of their own."""
    found = _gemma(keys, values, "gemma3_text", 6)
    full = found["rope_parameters"]
    if full["rope_type"] not in ("default", "linear"):
        raise UnsupportedModel(f"{keys.name}: Gemma 3 with RoPE scaling {full['rope_type']!r}; {INSTEAD}")
    sliding = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    return found | {
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
    }


def _phi3(keys: MetadataKeys, values: dict[str, Any]) -> dict[str, Any]:
    head_dim = values["head_dim"]
    rotary = keys.size("rope.dimension_count", head_dim)
    rope = _rope(keys, rotary) | {"partial_rotary_factor": rotary / head_dim}
    original = rope.get("original_max_position_embeddings", values["max_position_embeddings"])
    return {
        "model_type": "phi3",
        "intermediate_size": keys.size("feed_forward_length"),
        "sliding_window": keys.size("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": original,
        "rope_parameters": rope,
    }


_OF_FAMILY: dict[str, Callable[[MetadataKeys, dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": lambda keys, values: _dense(keys, values, "qwen2"),
    "qwen3": lambda keys, values: _dense(keys, values, "qwen3"),
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "smollm3": lambda keys, values: _dense(keys, values, "smollm3") | {"no_rope_layer_interval": 4},
}
"""What each family has beside what all have."""
