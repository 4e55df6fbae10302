"""A model that asks of attention what spilld does not compute is refused before anything is served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spilld.attention.transformers_hook import _forward
from spilld.errors import UnsupportedModel
from spilld.kv.geometry import Geometry, LayerGeometry
from spilld.models import probe as probes
from spilld.models.model import load, load_module
from spilld.models.probe import probe, probe_once

from .harness import changed
from .tiny_models import build


def test_sink_logits_that_the_geometry_does_not_have(tmp_path: Path) -> None:
    folder = build("gpt_oss", tmp_path / "m")
    model = load(folder, "float32", cache=tmp_path)
    layers = tuple(replace(layer, sink_logits=False) for layer in model.geometry.layers)
    with pytest.raises(UnsupportedModel, match="layer 0 attends with other sink logits"):
        probe(model.module, replace(model.geometry, layers=layers))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kv_heads": 3}, r"\(1, 2, 3, 16\)"),
        ({"head_dim": 32}, r"\(1, 6, 3, 16\)"),
        ({"sliding_windows": (None,) * 3}, r"layers \[0, 1\] of 3"),
        ({"sliding_windows": (None,)}, "layer 1 attends, which its config does not say"),
        ({"sliding_windows": (None, 64)}, "window None, not 0.0 and 64"),
        ({"softcap": 30.0}, "softcap 0.0"),
        ({"scaling": 0.5}, "scaling 0.25, not 0.5"),
    ],
)
def test_geometry_that_attention_is_not_called_with(change: Any, why: str, tmp_path: Path) -> None:
    loaded = load(build("llama", tmp_path / "m"), "float32", cache=tmp_path)
    with pytest.raises(UnsupportedModel, match=why):
        probe(loaded.module, changed(loaded.geometry, **change))


def test_no_weight_is_read_or_changed(tmp_path: Path) -> None:
    folder = build("gemma3", tmp_path / "m")
    module = load_module(folder, "float32", "spilld")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    probe(module, load(folder, "float32", cache=tmp_path).geometry)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_what_passed_is_not_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build("llama", tmp_path / "m")
    first = load(folder, "float32", cache=tmp_path)
    monkeypatch.delattr(probes, "probe")
    assert load(folder, "float32", cache=tmp_path).fingerprint == first.fingerprint
    with pytest.raises(NameError):
        probe_once(first.module, changed(first.geometry, softcap=30.0), tmp_path)
    monkeypatch.setattr("spilld.models.parity.passed_once.transformers.__version__", "99")
    with pytest.raises(NameError):
        load(folder, "float32", cache=tmp_path)


class Seen:
    """A ModuleAttention that gives the values back."""

    geometry = Geometry((LayerGeometry(2, 2, 16, None, 0.25, 0.0, 0),), 1, 1, frozenset())

    def forward(self, layer: int, q: Any, k: Any, v: Any, sink_logits: Any) -> Any:
        return v


@pytest.mark.parametrize(
    "keyword",
    [
        {"dropout": 0.1},
        {"is_causal": False},
        {"head_mask": torch.ones(1)},
        {"position_bias": torch.ones(1)},
        {"output_attentions": True},
        {"use_cache": True},
        {"attention_mask": torch.ones(1, 1, 3, 3)},
        {"anything": 0},
    ],
    ids=lambda keyword: next(iter(keyword)),
)
def test_every_other_keyword_is_an_error(keyword: dict[str, Any]) -> None:
    heads = torch.rand(1, 2, 3, 16)
    layer = torch.nn.Linear(1, 1)
    layer.layer_idx = 0  # type: ignore[assignment]
    usual: dict[str, Any] = {"attention_mask": None, "scaling": 0.25, "spilld_attention": Seen()}
    harmless: dict[str, Any] = {
        "dropout": 0.0,
        "s_aux": None,
        "is_causal": True,
        "position_ids": torch.zeros(1, 3),
    }
    assert torch.equal(_forward(layer, heads, heads, heads, **usual, **harmless)[0], heads.transpose(1, 2))
    with pytest.raises(UnsupportedModel, match=f"Linear asks for an attention with {next(iter(keyword))},"):
        _forward(layer, heads, heads, heads, **{**usual, **keyword})
