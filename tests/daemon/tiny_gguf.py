"""Tiny GGUF files: the weights of a tiny model's folder, in any type that the gguf package writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, TokenType
from numpy.typing import NDArray
from safetensors.torch import load_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.experts.w1": "ffn_gate_exps",
    "mlp.experts.w3": "ffn_up_exps",
    "mlp.experts.w2": "ffn_down_exps",
}
_OTHER_NAMES = {
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
    "gemma": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
_ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}
_EXPERT = re.compile(
    r"(.*\.(?:mlp|block_sparse_moe)\.experts)\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight"
)
_EXPERT_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def write(
    folder: Path,
    file: Path,
    kind: Kind = Kind.F32,
    split: int = 0,
    others: Mapping[str, Kind] | None = None,
    **metadata: Any,
) -> Path:
    """The model of a folder, its matrices in `kind`.

    others: kinds of the matrices whose names end so, {"v_proj": Kind.Q8_0}. split: the most tensors of a
    part, 0 for one whole file. metadata: more keys, or others: `llama__rope__scale_linear=4.0`; None leaves
    one out. A key with a tensor's name, `rope_freqs__weight`, and a list is a tensor.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    name = _ARCHITECTURES.get(config.model_type, config.model_type)
    values = {
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{name}.rope.freq_base": float(_full_rope(config)["rope_theta"]),
        f"{name}.vocab_size": config.vocab_size,
        **_of_family(config, name),
        **{key.replace("__", "."): value for key, value in metadata.items()},
    }
    writer = GGUFWriter(file, name, split_max_tensors=split)
    for key, value in values.items():
        if key.endswith(".weight"):
            writer.add_tensor(key, np.array(value, np.float32))
        elif value is not None:
            add(writer, key, value)
    _add_tokenizer(writer, folder, config)
    weights = {
        tensor: np.ascontiguousarray(weight.float().numpy())
        for tensor, weight in load_file(folder / "model.safetensors").items()
    }
    for tensor, weight in _stacked(weights).items():
        its = [other for end, other in (others or {}).items() if tensor.endswith(f"{end}.weight")]
        _add_tensor(writer, tensor, weight, its[0] if its else kind, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _full_rope(config: Any) -> Any:
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _of_family(config: Any, name: str) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values: dict[str, Any] = {}
    if name.startswith(("gemma", "qwen3")) or config.model_type == "mixtral":
        values |= {f"{name}.attention.key_length": head_dim, f"{name}.attention.value_length": head_dim}
    if name.startswith("gemma"):
        values[f"{name}.attention.sliding_window"] = config.sliding_window
    if name == "gemma2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            values[f"{name}.{key}"] = float(getattr(config, key))
    if (experts := getattr(config, "num_experts", getattr(config, "num_local_experts", None))) is not None:
        values |= {f"{name}.expert_count": experts, f"{name}.expert_used_count": config.num_experts_per_tok}
    if name == "qwen2moe":
        values[f"{name}.expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return values


def _stacked(weights: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The tensors with those of all experts of a layer in one."""
    found: dict[str, Any] = {}
    for name, weight in weights.items():
        if (match := _EXPERT.fullmatch(name)) is None:
            found[name] = weight
        else:
            part = _EXPERT_PARTS.get(match[2], match[2])
            found.setdefault(f"{match[1]}.{part}.weight", []).append((int(name.split(".")[-3]), weight))
    return {
        name: np.stack([part for _, part in sorted(weight, key=lambda each: each[0])])
        if isinstance(weight, list)
        else weight
        for name, weight in found.items()
    }


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    """A key of the type of its value."""
    kinds = {str: "string", int: "uint32", bool: "bool", float: "float32", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def _add_tokenizer(writer: GGUFWriter, folder: Path, config: Any) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    special = {entry["id"]: entry["content"] for entry in content["added_tokens"]}
    words = {index: word for word, index in content["model"]["vocab"].items()} | special
    tokens = [words.get(index, f"[unused{index}]") for index in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [TokenType.CONTROL if index in special else TokenType.NORMAL for index in range(len(tokens))]
    )
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)


def _add_tensor(writer: GGUFWriter, name: str, weight: NDArray[Any], kind: Kind, config: Any) -> None:
    stem, _, suffix = name.rpartition(".")
    family = config.model_type
    names = _NAMES | _OTHER_NAMES.get("gemma" if family.startswith("gemma") else family, {})
    if stem.startswith("model.layers."):
        layer, _, stem = stem.removeprefix("model.layers.").partition(".")
        target = f"blk.{layer}.{names[stem.replace('block_sparse_moe', 'mlp')]}.{suffix}"
    else:
        target = f"{names[stem]}.{suffix}"
    weight = np.ascontiguousarray(weight, np.float32)
    if family in ("llama", "mixtral", "smollm3") and stem.endswith(("q_proj", "k_proj")):
        weight = _interleaved(
            weight, config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads
        )
    if family.startswith("gemma") and target.endswith("norm.weight"):
        weight = weight + 1
    if weight.ndim == 1 or kind is Kind.F32:
        writer.add_tensor(target, weight)
    else:
        writer.add_tensor(target, gguf.quantize(weight, kind), raw_dtype=kind)


def _interleaved(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """llama.cpp's order of the rows of Q and K."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
