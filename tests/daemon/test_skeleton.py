"""A model that is loaded by way of SkeletonMode is the one that transformers loads without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from spilld.models.skeleton import SkeletonMode

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def llama(rope: dict[str, Any]) -> Any:
    parameters = {**rope, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=parameters))


def gemma3() -> Any:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, pad_token_id=0))


@pytest.mark.parametrize("build", [lambda: llama(LLAMA3), lambda: llama(YARN), lambda: llama(LINEAR), gemma3])
def test_every_tensor_is_the_same(build: Any, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    with SkeletonMode():
        loaded = type(model).from_pretrained(tmp_path)
    wanted = dict([*plain.named_parameters(), *plain.named_buffers()])
    found = dict([*loaded.named_parameters(), *loaded.named_buffers()])
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].device == tensor.device, name
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
