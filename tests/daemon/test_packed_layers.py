"""Layers over packed weights give what float32 products of the same numbers give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import linear
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from spilld.models.model import load
from spilld.models.packed.packed_linear import ROWS, PackedLinear
from spilld.models.packed.replacing import of_experts, pack_layers, replaceable
from spilld.offload.kernels.linear.forms import Form
from spilld.offload.kernels.linear.packed import Packed, quantise, unpack
from spilld.offload.kernels.linear.row_operations import Inputs

from .harness import engine, reference, some_tokens
from .tiny_hybrids import HYBRIDS, build_hybrid
from .tiny_models import MODULES, build

SIZES: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 32}
EXPERTS = {
    "gated": (Qwen3MoeExperts, transformers.Qwen3MoeConfig(num_experts=5, **SIZES)),
    "transposed, with biases": (GptOssExperts, transformers.GptOssConfig(num_local_experts=5, **SIZES)),
    "without a gate": (NemotronHExperts, transformers.NemotronHConfig(n_routed_experts=5, **SIZES)),
}


def packed(outputs: int, form: Form) -> Packed:
    return quantise(torch.randn(outputs, 96).numpy(), form)


@pytest.mark.parametrize("rows", [1, 3, ROWS + 5])
def test_parts_of_two_forms_with_a_bias(rows: int) -> None:
    torch.manual_seed(0)
    parts, bias = [packed(16, Form.INT8), packed(24, Form.INT4)], torch.nn.Parameter(torch.randn(40))
    layer = PackedLinear(parts, 40, bias, torch.float32, Inputs.of(ROWS, 96)).requires_grad_(False)
    x = torch.randn(rows, 1, 96)
    wanted = linear(x, torch.from_numpy(np.concatenate([unpack(part) for part in parts])), bias)
    found = layer(x)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 2e-4 * wanted.abs().max()
    narrow = PackedLinear(parts, 37, None, torch.bfloat16, Inputs.of(ROWS, 96))(x)
    assert narrow.dtype == torch.bfloat16
    assert (narrow - (wanted - bias)[..., :37]).abs().max() < 5e-3 * wanted.abs().max()


def test_weights_that_do_not_make_the_layer_are_refused() -> None:
    for outputs in (16, 41):
        with pytest.raises(ValueError, match="outputs"):
            PackedLinear([packed(32, Form.INT8)], outputs, None, torch.float32, Inputs.of(ROWS, 96))


def test_nobody_computes_with_the_weights_that_a_layer_has_not() -> None:
    layer = PackedLinear([packed(32, Form.INT8)], 32, None, torch.float32, Inputs.of(ROWS, 96))
    assert layer.weight.shape == (32, 96)
    with pytest.raises(TypeError):
        linear(torch.randn(2, 96), layer.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("tokens", [1, 3, 1100])
def test_experts(kind: str, tokens: int) -> None:
    make, config = EXPERTS[kind]
    torch.manual_seed(1)
    config._experts_implementation = "eager"
    experts: Any = make(config).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    make_representable(experts)
    x, index = torch.randn(tokens, 64), torch.rand(tokens, 5).argsort(1)[:, :2]
    weights = torch.rand(tokens, 2)
    wanted = experts(x, index, weights)
    module = torch.nn.Sequential(experts)
    pack_layers(module, Form.INT8)
    found = module[0](x, index, weights)
    assert not [parameter for parameter in module.parameters() if parameter.ndim == 3]
    assert (found - wanted).abs().max() < 5e-4 * wanted.abs().max()


@pytest.mark.parametrize("family", dict.fromkeys([*MODULES, *HYBRIDS]))
def test_a_module_with_packed_layers_is_the_same_model(family: str, tmp_path: Path) -> None:
    folder = tmp_path / family
    module = reference((build if family in MODULES else build_hybrid)(family, folder), "eager")
    module.requires_grad_(False)
    for _, _, layer in replaceable(module):
        make_representable(layer)
    tokens = torch.tensor([some_tokens(3, 70)])
    with torch.inference_mode():
        wanted = module(input_ids=tokens).logits
        pack_layers(module, Form.INT8)
        found = module(input_ids=tokens).logits
    kinds = [type(part) for part in module.modules()]
    assert kinds.count(PackedLinear) > 6
    assert not list(replaceable(module))
    assert (found - wanted).abs().max() < 1e-3 * (wanted.max() - wanted.min())


def test_a_served_module_with_packed_layers(tmp_path: Path) -> None:
    """A mixture of experts with a state, several requests at once: each answer is as alone."""
    folder = build_hybrid("qwen3_5_moe_text", tmp_path / "m")
    model = load(folder, "float32", weights="int4", cache=tmp_path / "cache")
    assert model.packed is None
    assert model.forms == {Form.INT8, Form.INT4}
    fields: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
    prompts = [some_tokens(n, 100 + 150 * n) for n in range(3)]
    alone = []
    for number, prompt in enumerate(prompts):
        with engine(model, tmp_path / str(number), format="exact") as harness:
            alone.append(harness.ask(prompt, **fields))
    with engine(model, tmp_path / "s", format="exact") as harness:
        for number, prompt in enumerate(prompts):
            harness.add(str(number), prompt, **fields)
        harness.run()
        assert [harness.tokens(str(number)) for number in range(3)] == alone


def make_representable(layer: Any) -> None:
    """Make the weights of a linear layer or of experts what int8 represents: packing them changes nothing."""
    if isinstance(layer, torch.nn.Linear):
        matrices = [layer.weight]
    else:
        matrices = [matrix for which in (0, 1) for matrix in of_experts(layer, which)]
    for matrix in matrices:
        numbers = np.ascontiguousarray(matrix.numpy())
        matrix.copy_(torch.from_numpy(unpack(quantise(numbers, Form.INT8))))
