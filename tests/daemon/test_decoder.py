"""Steps over packed weights give what the transformers module gives with the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spilld.attention.base import AttentionPlan
from spilld.errors import CorruptModel, UnsupportedModel
from spilld.models.model import Model, load
from spilld.models.packed.packable import check_packable
from spilld.models.packed.packing import (
    WEIGHTS,
    matrices,
    pack_module,
    read,
)
from spilld.offload.kernels.linear.forms import Form
from spilld.offload.kernels.linear.packed import (
    Packed,
    quantise,
    stack,
    unpack,
)
from spilld.runner.packed_model import PackedModel

from .harness import engine, greedy, reference, some_tokens
from .tiny_models import FAMILIES, MODULES, build

PROMPT = some_tokens(3, 700)
COUNT = 24


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose weights int8 represents exactly: then packing changes nothing."""
    return representable(request.param, tmp_path_factory.mktemp("packed") / request.param)


def representable(family: str, folder: Path) -> Path:
    build(family, folder)
    module = reference(folder, "eager")
    for parts in matrices(module).values():
        for part in parts:
            part.data.copy_(torch.from_numpy(unpack(quantise(part.detach().numpy(), Form.INT8))))
    module.save_pretrained(folder)
    return folder


def packed(folder: Path, weights: str = "int8") -> Model:
    return load(folder, "float32", weights=weights, cache=folder / "cache")


def test_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    model = packed(folder)
    assert model.packed is not None
    with engine(model, tmp_path / "s", format="exact") as harness:
        assert harness.ask(PROMPT, max_tokens=COUNT, ignore_eos=True) == greedy(
            reference(folder, "eager"), PROMPT, COUNT
        )


def test_the_same_logits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closer than tokens can tell: the rows of every step, beside the module's own."""
    steps: list[tuple[list[int], torch.Tensor]] = []
    run = PackedModel.run

    def noted(self: PackedModel, plan: AttentionPlan, keep: list[int]) -> torch.Tensor:
        logits = run(self, plan, keep)
        last = {part.start + part.count - 1: part for part in plan.batch.items}
        steps.extend(
            (list(last[row].sequence.tokens), found) for row, found in zip(keep, logits, strict=True)
        )
        return logits

    monkeypatch.setattr(PackedModel, "run", noted)
    with engine(packed(folder), tmp_path / "s", format="exact") as harness:
        harness.add("a", PROMPT[:300], max_tokens=5, ignore_eos=True)
        harness.add("b", PROMPT[300:620], max_tokens=5, ignore_eos=True)
        harness.run()
    assert len(steps) == 10
    module = reference(folder, "eager")
    with torch.inference_mode():
        for tokens, found in steps:
            wanted = module(input_ids=torch.tensor([tokens]), logits_to_keep=1).logits[0, -1]
            assert (found - wanted).abs().max() <= 2e-3 * wanted.abs().max()


def test_an_answer_does_not_depend_on_what_else_runs(tmp_path: Path) -> None:
    model = packed(build("llama", tmp_path / "m"), "int4")
    fields: dict[str, Any] = {"max_tokens": COUNT, "ignore_eos": True}
    with engine(model, tmp_path / "s") as harness:
        alone = harness.ask(PROMPT, **fields)
    with engine(model, tmp_path / "s", device_budget="64MiB") as harness:
        harness.add("r", PROMPT, **fields)
        for i in range(9):  # more than one pass over the weights holds, and their prefill
            harness.add(f"other {i}", some_tokens(50 + i, 300 + 40 * i), **fields)
        harness.run()
        assert harness.tokens("r") == alone


def test_packed_once_and_by_form(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    plain, int8, int4 = (packed(folder, weights) for weights in ("bf16", "int8", "int4"))
    assert plain.packed is None
    assert int8.packed is not None
    assert int4.packed is not None
    assert {p.form for p in int8.packed.values()} == {Form.INT8}
    assert {name for name, p in int4.packed.items() if p.form is Form.INT8} == {"head"}
    assert len({plain.fingerprint, int8.fingerprint, int4.fingerprint}) == 3
    assert packed(folder, "auto").packed is None
    files = sorted((folder / "cache" / "models").iterdir())
    before = [file.stat().st_mtime_ns for file in files]
    assert packed(folder, "int8").fingerprint == int8.fingerprint
    assert [file.stat().st_mtime_ns for file in files] == before


def test_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    packed(folder)
    [file] = (folder / "cache" / "models").iterdir()
    for damage in (file.read_bytes()[:-7], b"", b"{}" * 50):
        file.write_bytes(damage)
        with pytest.raises(CorruptModel, match="delete it"):
            read(file)


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    module = reference(build("llama", tmp_path / "a", intermediate_size=100))
    with pytest.raises(UnsupportedModel, match=r"gate_up of \(100, 96\)"):
        pack_module(module, Form.INT8, tmp_path / "x")
    module = reference(build("llama", tmp_path / "b", mlp_bias=True))
    with pytest.raises(UnsupportedModel, match="bias"):
        pack_module(module, Form.INT4, tmp_path / "x")
    module = reference(build("llama", tmp_path / "c", hidden_act="relu"))
    with pytest.raises(UnsupportedModel, match="ReLU"):
        pack_module(module, Form.INT4, tmp_path / "x")


@pytest.mark.parametrize("family", MODULES)
def test_a_family_that_would_be_another_model_is_refused(family: str, tmp_path: Path) -> None:
    """The tensors of some have the names and shapes of Llama's."""
    folder = build(family, tmp_path / "m")
    module = reference(folder, "eager")
    with pytest.raises(UnsupportedModel, match=type(module).__module__):
        check_packable(module)
    model = packed(folder)
    assert model.packed is None
    assert model.forms == {Form.INT8}
    assert model.fingerprint != packed(folder, "bf16").fingerprint


def test_what_steps_do_not_read_is_refused(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    module = reference(folder)
    module.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(6))
    with pytest.raises(UnsupportedModel, match=r"leave out model\.layers\.1\.self_attn\.sinks"):
        check_packable(module)
    module = reference(folder)
    module.model.layers[1].mlp = torch.nn.Sequential()
    with pytest.raises(UnsupportedModel, match=r"Sequential, which is model\.layers\.1\.mlp"):
        check_packable(module)
    module = reference(folder)
    module.model.norm.variance_epsilon = 0.1
    with pytest.raises(UnsupportedModel, match="epsilon"):
        check_packable(module)
    module = reference(folder)
    check_packable(module)
    whole = packed(folder)
    strange = replace(whole, module=torch.nn.Sequential())
    with pytest.raises(UnsupportedModel, match="Sequential"):
        PackedModel(strange, whole.packed or {}, None, 8)  # type: ignore[arg-type]


def test_the_codes_of_a_gguf_file_are_kept(smollm2_bfloat16: Path) -> None:
    """SmolLM2 is Q4_1 with Q8_0 embeddings: the same numbers, before bfloat16 rounded them."""
    model = load(smollm2_bfloat16, "bfloat16", weights="auto")
    assert (smollm2_bfloat16 / WEIGHTS).exists()
    assert model.packed is not None
    assert {name for name, p in model.packed.items() if p.form is Form.INT8} == {"head"}
    parts = matrices(model.module)
    for name in ("layers.0.qkv", "layers.17.gate_up", "layers.29.down", "head"):
        wanted = np.concatenate([part.float().numpy() for part in parts[name]])
        found = unpack(model.packed[name])
        assert (np.abs(found - wanted) <= 2**-8 * np.abs(wanted)).all()
        assert (found != wanted).any(), "bfloat16 has rounded"
        np.testing.assert_array_equal(torch.from_numpy(found).bfloat16().float().numpy(), wanted)


def test_stacks_have_one_form() -> None:
    some = np.ones((8, 32), np.float32)
    with pytest.raises(ValueError, match="too many values"):
        stack([quantise(some, Form.INT8), quantise(some, Form.INT4)])


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    """Kernels would read past their end."""
    model = packed(build("llama", tmp_path / "m"))
    assert model.packed is not None
    for name in ("layers.1.qkv", "layers.0.out", "layers.1.down", "head"):
        whole = model.packed[name]
        with engine(model, tmp_path / "s") as harness:
            attention = harness.engine._runner._attention
            for tiles in (whole.tiles[:1], whole.tiles[:, :1]):
                with pytest.raises(ValueError, match=r"weights of .*, not"):
                    PackedModel(model, {**model.packed, name: Packed(whole.form, tiles)}, attention, 8)
