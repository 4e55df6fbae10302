"""Tiny GGUF files: the weights of a tiny model's folder, in any type that the gguf package writes."""

from __future__ import annotations

import json
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
}


def write(
    folder: Path,
    file: Path,
    kind: Kind = Kind.F32,
    split: int = 0,
    others: Mapping[str, Kind] | None = None,
    **metadata: Any,
) -> Path:
    """The model of a folder of family llama, qwen2 or qwen3, its matrices in `kind`.

    others: kinds of the matrices whose names end so, {"v_proj": Kind.Q8_0}. split: the most tensors of a
    part, 0 for one whole file. metadata: more keys, or others: `llama__rope__scale_linear=4.0`; None leaves
    one out.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    name = config.model_type
    values = {
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{name}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{name}.vocab_size": config.vocab_size,
        **({f"{name}.attention.key_length": config.head_dim} if name == "qwen3" else {}),
        **{key.replace("__", "."): value for key, value in metadata.items()},
    }
    writer = GGUFWriter(file, name, split_max_tensors=split)
    for key, value in values.items():
        if value is not None:
            add(writer, key, value)
    _add_tokenizer(writer, folder, config)
    for tensor, weight in load_file(folder / "model.safetensors").items():
        its = [other for end, other in (others or {}).items() if tensor.endswith(f"{end}.weight")]
        _add_tensor(writer, tensor, weight.numpy(), its[0] if its else kind, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


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
    if stem.startswith("model.layers."):
        layer, _, stem = stem.removeprefix("model.layers.").partition(".")
        target = f"blk.{layer}.{_NAMES[stem]}.{suffix}"
    else:
        target = f"{_NAMES[stem]}.{suffix}"
    weight = np.ascontiguousarray(weight, np.float32)
    if config.model_type == "llama" and stem.endswith(("q_proj", "k_proj")):
        weight = _interleaved(
            weight, config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads
        )
    if weight.ndim == 1 or kind is Kind.F32:
        writer.add_tensor(target, weight)
    else:
        writer.add_tensor(target, gguf.quantize(weight, kind), raw_dtype=kind)


def _interleaved(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """llama.cpp's order of the rows of Q and K."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
