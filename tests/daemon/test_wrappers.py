"""Models of text and images are served as the text part that is in them; all else of them is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from spilld.errors import CorruptModel, UnsupportedModel
from spilld.models.families.registry import WRAPPERS
from spilld.models.model import Model, load

from .harness import engine, load_tiny, some_tokens
from .tiny_hybrids import hybrid_config
from .tiny_models import END, VOCAB, build, byte_level, config_of

_EYE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_EYE = {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 64, **_EYE}
_MODELS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "gemma3": (
        transformers.Gemma3Config,
        transformers.Gemma3ForConditionalGeneration,
        config_of("gemma3"),
        {"vision_config": _EYE, "mm_tokens_per_image": 4},
    ),
    "gemma4": (
        transformers.Gemma4Config,
        transformers.Gemma4ForConditionalGeneration,
        config_of("gemma4"),
        {
            "vision_config": {
                **_EYE,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "position_embedding_size": 64,
            },
            "audio_config": None,
        },
    ),
    "mistral3": (
        transformers.Mistral3Config,
        transformers.Mistral3ForConditionalGeneration,
        config_of("mistral", sliding_window=None),
        {"vision_config": {"model_type": "pixtral", "head_dim": 16, **_EYE}},
    ),
    "mistral3 around ministral3": (
        transformers.Mistral3Config,
        transformers.Mistral3ForConditionalGeneration,
        config_of("ministral3"),
        {"vision_config": {"model_type": "pixtral", "head_dim": 16, **_EYE}},
    ),
    "llama4": (
        transformers.Llama4Config,
        transformers.Llama4ForConditionalGeneration,
        config_of("llama4_text"),
        {
            "vision_config": {
                **_EYE,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            }
        },
    ),
    "qwen3_5": (
        transformers.Qwen3_5Config,
        transformers.Qwen3_5ForConditionalGeneration,
        hybrid_config("qwen3_5_text"),
        {"vision_config": _QWEN_EYE},
    ),
    "qwen3_5_moe": (
        transformers.Qwen3_5MoeConfig,
        transformers.Qwen3_5MoeForConditionalGeneration,
        hybrid_config("qwen3_5_moe_text"),
        {"vision_config": _QWEN_EYE},
    ),
}
PROMPT = some_tokens(2, 40)


def wrapped(name: str, folder: Path, *, tied: bool = False) -> Any:
    """Write a tiny wrapper's folder and return the whole model."""
    configure, model, text, parts = _MODELS[name]
    torch.manual_seed(0)
    whole = model(configure(text_config=text.to_dict(), tie_word_embeddings=tied, **parts)).eval()
    whole.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return whole


def logits(module: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = module(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
    return found


def edit(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def eager(folder: Path) -> Model:
    return load(folder, "float32", "eager", cache=folder / "cache")


@pytest.mark.parametrize("name", _MODELS)
def test_the_text_part_is_the_models_own(name: str, tmp_path: Path) -> None:
    whole = wrapped(name, tmp_path / "m")
    assert torch.allclose(logits(eager(tmp_path / "m").module), logits(whole), atol=1e-5)


def test_every_wrapper_is_tried() -> None:
    assert {name.split()[0] for name in _MODELS} == set(WRAPPERS) - {"gemma3n"}


def test_a_wrapper_whose_eye_is_not_installed(tmp_path: Path) -> None:
    """transformers makes a Gemma 3n only where there is timm, of which text needs nothing."""
    folder = build("gemma3n", tmp_path / "m")
    file, config = folder / "model.safetensors", folder / "config.json"
    text = load(folder, "float32", "eager", cache=tmp_path / "cache").module
    tensors = {
        f"model.language_model.{name.removeprefix('model.')}": t for name, t in load_file(file).items()
    }
    save_file(
        {**tensors, "model.vision_tower.timm_model.conv.weight": torch.zeros(1)},
        file,
        metadata={"format": "pt"},
    )
    said = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"]}
    config.write_text(json.dumps({**said, "text_config": json.loads(config.read_text())}))
    assert torch.equal(logits(eager(folder).module), logits(text))


def test_what_a_wrapper_says_for_its_text_part(tmp_path: Path) -> None:
    """Whether embeddings are tied, and where a text ends."""
    whole = wrapped("gemma3", tmp_path / "m", tied=True)
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": [1, 106]}))
    model = eager(tmp_path / "m")
    assert torch.allclose(logits(model.module), logits(whole), atol=1e-5)
    assert {1, 106, END} <= model.geometry.eos


def test_newer_names_of_tensors(tmp_path: Path) -> None:
    """Some name the text part model.language_model, and keep the head beside it."""
    whole = wrapped("gemma3", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    newer = {
        name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head.", "lm_head."
        ): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(newer, file, metadata={"format": "pt"})
    assert torch.allclose(logits(eager(tmp_path / "m").module), logits(whole), atol=1e-5)


def test_the_engine_serves_it(tmp_path: Path) -> None:
    whole = wrapped("gemma3", tmp_path / "m")
    with engine(load_tiny(tmp_path / "m"), tmp_path / "s", format="exact") as harness:
        found = harness.ask(PROMPT, max_tokens=1, ignore_eos=True)
    assert found == [int(logits(whole)[0, -1, :VOCAB].argmax())]


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        (
            {"text_config": {"model_type": "llama"}},
            UnsupportedModel,
            "gemma3 around 'llama'.*gemma3_text it is",
        ),
        ({"text_config": {}}, CorruptModel, "no text_config"),
        ({"architectures": ["Gemma3ForSomethingElse"]}, UnsupportedModel, "Gemma3ForSomethingElse"),
    ],
)
def test_other_wrappers_are_refused(
    change: dict[str, Any], error: type[Exception], why: str, tmp_path: Path
) -> None:
    wrapped("gemma3", tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(error, match=why):
        eager(tmp_path / "m")


def test_tensors_of_a_part_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    wrapped("gemma3", tmp_path / "m")
    edit(tmp_path / "m", **{"model.telepathy.weight": torch.zeros(2)})
    with pytest.raises(CorruptModel, match=r"unexpected keys.*model\.telepathy"):
        eager(tmp_path / "m")
