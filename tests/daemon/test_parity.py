"""The parity check: what a family computes through spilld's attention is what it computes by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from spilld.errors import UnsupportedModel
from spilld.models.families.registry import FAMILIES, class_of
from spilld.models.parity import parity as parities
from spilld.models.parity import passed_once
from spilld.models.parity.parity import check_parity_once, parity
from spilld.models.parity.reduced import make, reduced_config

from .harness import engine, greedy, load_tiny, reference, some_tokens
from .tiny_hybrids import hybrid_config
from .tiny_models import SHARED, VOCAB, byte_level, config_of

UNLISTED: dict[str, dict[str, Any]] = {
    "gemma": {},
    "phi": {"partial_rotary_factor": 0.5},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "exaone4": {"sliding_window": 80, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
_HEADS = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def stranger(family: str, **changes: Any) -> tuple[Any, Any]:
    """A family's class of transformers, and a tiny config of it."""
    config = CONFIG_MAPPING[family](**{**SHARED, **_HEADS, **changes})
    return getattr(transformers, str(class_of(family))), config


def write(family: str, folder: Path, **changes: Any) -> Path:
    """A whole folder of a tiny model."""
    module_class, config = stranger(family, **changes)
    make(module_class, config).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", UNLISTED)
def test_a_family_that_is_not_listed_is_served_if_it_passes(family: str, tmp_path: Path) -> None:
    assert family not in FAMILIES
    folder = write(family, tmp_path / family, **UNLISTED[family])
    prompt = some_tokens(5, 700)
    with engine(load_tiny(folder), tmp_path / "s", format="exact") as harness:
        assert harness.ask(prompt, max_tokens=16, ignore_eos=True) == greedy(reference(folder), prompt, 16)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("bloom", "no list of layers"),
        ("stablelm", "does not run through spilld's attention"),
        ("deepseek_v3", "deepseek_v3"),
    ],
)
def test_a_family_that_fails_is_refused(family: str, why: str, tmp_path: Path) -> None:
    """Its attention has a bias for distance that goes elsewhere, or is not called through the interface."""
    folder = write(family, tmp_path / family)
    with pytest.raises(UnsupportedModel, match=why):
        load_tiny(folder)


def test_a_family_of_more_than_text_must_be_listed(tmp_path: Path) -> None:
    folder = write("gemma", tmp_path / "m")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vision_config": {}}))
    with pytest.raises(UnsupportedModel, match="'gemma' is not supported; llama, "):
        load_tiny(folder)


def _no_mask(hidden: torch.Tensor, group: int) -> torch.Tensor:
    return torch.zeros(hidden.shape[0] * group, hidden.shape[1])


@pytest.mark.parametrize(
    ("family", "place", "wrong"),
    [
        ("mistral", "spilld.attention.cpu.additive_mask", _no_mask),
        ("llama", "spilld.attention.cpu.exact_ranges", lambda start, _window: [(start - 1, start)]),
        ("lfm2", "spilld.attention.state_layers.keep_states", lambda *_: None),
    ],
)
def test_what_attention_computes_wrongly_is_found(
    family: str, place: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, wrong)
    config = hybrid_config(family) if family == "lfm2" else config_of(family)
    with pytest.raises(UnsupportedModel):
        parity(getattr(transformers, FAMILIES[family]), config)


def test_a_module_that_counts_positions_by_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the rows of a step for one sequence that begins with them."""

    def counted(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "position_ids": None}

    def hooked(*args: Any) -> Any:
        module = make(*args)
        module.base_model.register_forward_pre_hook(counted, with_kwargs=True)
        return module

    monkeypatch.setattr(parities, "make", hooked)
    with pytest.raises(UnsupportedModel, match="other logits"):
        parity(transformers.LlamaForCausalLM, config_of("llama"))


def test_what_passed_is_not_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module_class, config = stranger("gemma", head_dim=32)
    check_parity_once(module_class, config, tmp_path)
    monkeypatch.setattr(passed_once, "_passed", set())
    monkeypatch.delattr(parities, "parity")
    check_parity_once(module_class, config, tmp_path)
    with pytest.raises(NameError):
        check_parity_once(module_class, config, tmp_path / "another")
    config.rms_norm_eps = 0.5
    with pytest.raises(NameError):
        check_parity_once(module_class, config, tmp_path)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (transformers.Qwen3MoeConfig(), 2),
        (transformers.Qwen3_5TextConfig(), 4),
        (transformers.Gemma3TextConfig(), 6),
        (transformers.Glm4MoeConfig(), 2),
        (transformers.DeepseekV3Config(), 4),
        (transformers.Cohere2Config(), 4),
        (hybrid_config("nemotron_h"), 4),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_a_reduced_model_has_every_kind_of_layer(config: Any, layers: int) -> None:
    """And the heads of the whole one; it takes seconds, however large that is."""
    small = reduced_config(config)
    assert small.num_hidden_layers == layers
    assert small.vocab_size <= VOCAB
    assert set(getattr(small, "layer_types", None) or ()) == set(getattr(config, "layer_types", None) or ())
    assert small.num_attention_heads * config.num_key_value_heads == (
        config.num_attention_heads * small.num_key_value_heads
    )
    module_class = getattr(transformers, str(class_of(config.model_type)))
    with torch.device("meta"):
        module = module_class._from_config(small)
    assert sum(parameter.numel() for parameter in module.parameters()) < 3e8
