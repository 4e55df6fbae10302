"""Quantised folders: each method's numbers, written here as its format says, and whole models of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from spilld.errors import CorruptModel, UnsupportedModel
from spilld.models.convert import convert
from spilld.models.model import load
from spilld.models.quantised.config import METHODS, read_scheme
from spilld.models.quantised.folder import QuantisedFolder
from spilld.offload.kernels.linear.forms import Form
from spilld.offload.kernels.linear.packed import unpack

from .harness import reference
from .tiny_models import build

Floats = NDArray[np.float32]
OUTPUTS, INPUTS = 32, 256
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass
class Made:
    """A weight as a quantiser would write it.

    Attributes:
        tensors: What is stored, by the end of its name.
        numbers: What it means.
        says: The folder's quantization_config.
        form: What it is packed as.
        within: What packing changes at most, as a share of the largest number of 32 inputs.
    """

    tensors: dict[str, torch.Tensor]
    numbers: Floats
    says: dict[str, Any]
    form: Form
    within: float = 0.0


Maker = Callable[[np.random.Generator, int, int], Made]


def pack_words(codes: NDArray[Any], bits: int, axis: int, order: list[int] | None = None) -> torch.Tensor:
    """Put codes into int32 along an axis, one after another from the lowest bits on."""
    codes = np.moveaxis(codes, axis, -1).astype(np.uint64)
    each = 32 // bits
    words = codes.reshape(*codes.shape[:-1], -1, each)[..., order or list(range(each))]
    whole = sum(words[..., i] << np.uint64(bits * i) for i in range(each))
    whole = np.asarray(whole, np.uint64).astype(np.uint32).view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(whole, -1, axis)))


def half(numbers: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers)).half()


def scales_of(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.uniform(0.001, 0.01, shape).astype(np.float16).astype(np.float32)


def awq(rng: np.random.Generator, outputs: int, inputs: int) -> Made:
    group = 32 if inputs % 64 else 64
    codes, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (inputs // group, outputs))
    scales = scales_of(rng, inputs // group, outputs)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    wide_zeros, wide_scales = np.repeat(zeros, group, 0), np.repeat(scales, group, 0)
    return Made(
        {
            "qweight": pack_words(codes, 4, 1, order),
            "qzeros": pack_words(zeros, 4, 1, order),
            "scales": half(scales),
        },
        ((codes - wide_zeros).astype(np.float32) * wide_scales).T,
        {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"},
        Form.INT4,
        2**-11,
    )


def gptq_like(
    bits: int, form: Form, *, version: str = "gptq", act_order: bool = False, within: float = 0.0
) -> Maker:
    def make(rng: np.random.Generator, outputs: int, inputs: int) -> Made:
        group, most = 32, 1 << bits
        codes = rng.integers(0, most, (inputs, outputs))
        zeros = np.full((inputs // group, outputs), most // 2) if bits > 4 else None
        zeros = rng.integers(1, most, (inputs // group, outputs)) if zeros is None else zeros
        scales = scales_of(rng, inputs // group, outputs)
        groups = np.arange(inputs) // group
        if act_order:
            groups = rng.permutation(groups)
        stored = zeros - 1 if version == "gptq" else zeros
        return Made(
            {
                "qweight": pack_words(codes, bits, 0),
                "qzeros": pack_words(stored, bits, 1),
                "scales": half(scales),
                "g_idx": torch.from_numpy(groups.astype(np.int32)),
            },
            ((codes - zeros[groups]).astype(np.float32) * scales[groups]).T,
            {
                "quant_method": "gptq",
                "bits": bits,
                "group_size": group,
                "desc_act": act_order,
                "sym": False,
                "checkpoint_format": version,
            },
            form,
            within,
        )

    return make


def compressed_packed(bits: int, form: Form, symmetric: bool) -> Maker:
    def make(rng: np.random.Generator, outputs: int, inputs: int) -> Made:
        group, low = 32, 1 << bits - 1
        codes = rng.integers(-low, low, (outputs, inputs))
        zeros = np.zeros((outputs, inputs // group), np.int64)
        if not symmetric:
            zeros = rng.integers(-3, 4, zeros.shape)
            codes = codes.clip(-low + 4, low - 5) if bits == 8 else codes
        scales = torch.from_numpy(scales_of(rng, *zeros.shape)).bfloat16()
        tensors = {
            "weight_packed": pack_words(codes + low, bits, 1),
            "weight_scale": scales,
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack_words(zeros + low, bits, 0)
        wide = [np.repeat(some, group, 1) for some in (zeros, scales.float().numpy())]
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group"}
        return Made(
            tensors,
            (codes - wide[0]).astype(np.float32) * wide[1],
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
                "ignore": ["lm_head"],
            },
            form,
            0.0 if symmetric else 2**-11,
        )

    return make


def compressed_int8(rng: np.random.Generator, outputs: int, inputs: int) -> Made:
    codes, scales = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8), scales_of(rng, outputs, 1)
    return Made(
        {"weight": torch.from_numpy(codes), "weight_scale": half(scales)},
        codes * scales,
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        Form.INT8,
    )


def fp8_like(method: str, scale: str, blocks: tuple[int, int] | None) -> Maker:
    def make(rng: np.random.Generator, outputs: int, inputs: int) -> Made:
        weight = torch.from_numpy(rng.normal(0, 20, (outputs, inputs))).to(torch.float8_e4m3fn)
        rows, columns = blocks or (outputs, inputs)
        scales = scales_of(rng, -(-outputs // rows), -(-inputs // columns))
        wide = np.kron(scales, np.ones((rows, columns), np.float32))[:outputs, :inputs]
        stored = torch.from_numpy(scales if blocks else scales.reshape(()))
        says: dict[str, Any] = {"quant_method": method}
        if method == "fp8":
            says |= {"weight_block_size": blocks, "activation_scheme": "dynamic"}
        if method == "modelopt":
            says |= {"quant_algo": "FP8"}
        return Made(
            {"weight": weight, scale: stored, "input_scale": torch.tensor(1.0)},
            weight.float().numpy() * wide,
            says,
            Form.INT8,
            1 / 250,
        )

    return make


def nvfp4(method: str) -> Maker:
    def make(rng: np.random.Generator, outputs: int, inputs: int) -> Made:
        codes = rng.integers(0, 16, (outputs, inputs)).astype(np.uint8)
        scales = torch.from_numpy(rng.uniform(1, 400, (outputs, inputs // 16))).to(torch.float8_e4m3fn)
        octets = torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4)
        factor = np.float32(3e-4)
        numbers = E2M1[codes] * np.repeat(scales.float().numpy(), 16, 1) * factor
        if method == "modelopt":
            tensors = {"weight": octets, "weight_scale_2": torch.tensor(factor)}
            says: dict[str, Any] = {"quant_method": method, "quant_algo": "NVFP4", "ignore": ["lm_head"]}
        else:
            tensors = {"weight_packed": octets, "weight_global_scale": torch.tensor([1 / factor])}
            says = {"quant_method": method, "format": "nvfp4-pack-quantized"}
        return Made(tensors | {"weight_scale": scales}, numbers, says, Form.INT8, 1 / 250)

    return make


def mxfp4_linear(rng: np.random.Generator, outputs: int, inputs: int) -> Made:
    codes = rng.integers(0, 16, (outputs, inputs)).astype(np.uint8)
    exponents = rng.integers(115, 125, (outputs, inputs // 32)).astype(np.uint8)
    return Made(
        {
            "weight_packed": torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4),
            "weight_scale": torch.from_numpy(exponents),
        },
        E2M1[codes] * np.repeat(np.exp2(exponents.astype(np.float32) - 127), 32, 1),
        {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
        Form.MXFP4,
    )


def bnb4(kind: str, nested: bool) -> Maker:
    def make(rng: np.random.Generator, outputs: int, inputs: int) -> Made:
        codes = rng.integers(0, 16, outputs * inputs).astype(np.uint8)
        table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
        count = codes.size // 64
        state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [outputs, inputs]}
        absmax = rng.uniform(0.01, 0.1, count).astype(np.float32)
        tensors = {"weight.absmax": torch.from_numpy(absmax)}
        if nested:
            outer_table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
            outer = rng.uniform(0.01, 0.1, -(-count // 32)).astype(np.float32)
            small = rng.integers(0, 256, count).astype(np.uint8)
            state |= {"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": 0.25}
            absmax = outer_table[small] * np.repeat(outer, 32)[:count] + np.float32(0.25)
            tensors = {
                "weight.absmax": torch.from_numpy(small),
                "weight.nested_absmax": torch.from_numpy(outer),
                "weight.nested_quant_map": torch.from_numpy(outer_table),
            }
        said = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
        return Made(
            tensors
            | {
                "weight": torch.from_numpy(codes[0::2] << 4 | codes[1::2])[:, None],
                "weight.quant_map": torch.from_numpy(table),
                f"weight.quant_state.bitsandbytes__{kind}": torch.from_numpy(said),
            },
            (table[codes] * np.repeat(absmax, 64)).reshape(outputs, inputs),
            {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested},
            Form.INT8,
            1 / 250,
        )

    return make


def bnb8(rng: np.random.Generator, outputs: int, inputs: int) -> Made:
    codes = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    scales = rng.uniform(0.1, 1, outputs).astype(np.float32)
    return Made(
        {
            "weight": torch.from_numpy(codes),
            "SCB": torch.from_numpy(scales),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        },
        codes * (scales[:, None] * np.float32(1 / 127)),
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        Form.INT8,
        1 / 250,
    )


MAKERS: dict[str, Maker] = {
    "awq": awq,
    "gptq": gptq_like(4, Form.INT4, within=2**-11),
    "gptq_v2": gptq_like(4, Form.INT4, version="gptq_v2", within=2**-11),
    "gptq 8 bits": gptq_like(8, Form.INT8),
    "gptq 2 bits": gptq_like(2, Form.INT4, within=2**-11),
    "gptq act-order": gptq_like(4, Form.INT8, act_order=True, within=1 / 250),
    "pack-quantized": compressed_packed(4, Form.INT4, symmetric=True),
    "pack-quantized asymmetric": compressed_packed(4, Form.INT4, symmetric=False),
    "pack-quantized 8 bits": compressed_packed(8, Form.INT8, symmetric=False),
    "int-quantized": compressed_int8,
    "float-quantized": fp8_like("compressed-tensors", "weight_scale", (1, INPUTS)),
    "fp8 blocks": fp8_like("fp8", "weight_scale_inv", (16, 128)),
    "fp8 a tensor": fp8_like("fp8", "weight_scale", None),
    "modelopt fp8": fp8_like("modelopt", "weight_scale", None),
    "modelopt nvfp4": nvfp4("modelopt"),
    "nvfp4-pack-quantized": nvfp4("compressed-tensors"),
    "mxfp4-pack-quantized": mxfp4_linear,
    "nf4": bnb4("nf4", nested=False),
    "nf4 double": bnb4("nf4", nested=True),
    "fp4 double": bnb4("fp4", nested=True),
    "llm.int8": bnb8,
}


def opened(folder: Path, says: dict[str, Any]) -> QuantisedFolder:
    scheme = read_scheme(folder, {"quantization_config": says})
    assert scheme is not None
    return QuantisedFolder([folder / "model.safetensors"], scheme)


@pytest.mark.parametrize("name", MAKERS)
def test_weights_are_what_the_format_says(name: str, tmp_path: Path) -> None:
    made = MAKERS[name](np.random.default_rng(len(name)), OUTPUTS, INPUTS)
    norm = torch.randn(8).bfloat16()
    tensors = {f"layer.{end}": tensor for end, tensor in made.tensors.items()}
    save_file(tensors | {"norm.weight": norm}, tmp_path / "model.safetensors")
    source = opened(tmp_path, made.says)
    assert source.names == {"layer.weight", "norm.weight"}
    assert torch.equal(source.dense("norm.weight"), norm)
    assert source.packed("norm.weight") is None
    assert source.shape("layer.weight") == (OUTPUTS, INPUTS)
    found = source.dense("layer.weight").numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, made.numbers, rtol=3e-7)

    (packed,) = source.packed("layer.weight") or ()
    assert packed.form is made.form
    groups = (OUTPUTS, INPUTS // 32, 32)
    wrong = np.abs(unpack(packed) - made.numbers).reshape(groups).max(-1)
    assert (wrong <= made.within * np.abs(made.numbers).reshape(groups).max(-1) * 16).all()
    if made.within == 0:
        np.testing.assert_allclose(unpack(packed), made.numbers, rtol=1e-7)


def test_experts_of_gpt_oss_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(1)
    blocks = torch.from_numpy(rng.integers(0, 256, (3, 16, 2, 16)).astype(np.uint8))
    scales = torch.from_numpy(rng.integers(100, 130, (3, 16, 2)).astype(np.uint8))
    save_file({"x_blocks": blocks, "x_scales": scales}, tmp_path / "model.safetensors")
    source = opened(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert source.shape("x") == (3, 64, 16)
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(source.dense("x"), wanted)
    packed = source.packed("x")
    assert packed is not None
    assert [one.form for one in packed] == [Form.MXFP4] * 3
    for one, expert in zip(packed, wanted, strict=True):
        np.testing.assert_array_equal(unpack(one), expert.numpy().T)


def quantised_copy(plain: Path, folder: Path, make: Maker) -> dict[str, torch.Tensor]:
    """Write a folder whose linear layers are quantised; what its weights mean."""
    rng = np.random.default_rng(2)
    shutil.copytree(plain, folder)
    stored, meant = {}, load_file(plain / "model.safetensors")
    says: dict[str, Any] = {}
    for name, tensor in list(meant.items()):
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        made = make(rng, *tensor.shape)
        says = made.says
        stored |= {f"{name.removesuffix('weight')}{end}": part for end, part in made.tensors.items()}
        meant[name] = torch.from_numpy(np.ascontiguousarray(made.numbers))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": says}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("qwen3", tmp_path_factory.mktemp("tiny") / "qwen3")


@pytest.mark.parametrize("name", ["awq", "gptq act-order", "nf4 double"])
def test_models_are_those_of_the_numbers(name: str, plain: Path, tmp_path: Path) -> None:
    meant = quantised_copy(plain, tmp_path / "quantised", MAKERS[name])
    shutil.copytree(plain, tmp_path / "meant")
    save_file(meant, tmp_path / "meant" / "model.safetensors", metadata={"format": "pt"})
    cache = tmp_path / "cache"
    convert([tmp_path / "quantised"], folder := cache / "converted", "float32")
    model = load(folder, "float32", "eager", cache=cache)
    tokens = torch.arange(5, 40)[None]
    with torch.inference_mode():
        logits = model.module(tokens, use_cache=False).logits
        wanted = reference(tmp_path / "meant", "eager")(tokens, use_cache=False).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert not (folder / "packed").exists()


def test_steps_read_the_codes_of_the_folder(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meant = quantised_copy(plain, tmp_path / "quantised", MAKERS["pack-quantized"])
    convert([tmp_path / "quantised"], folder := tmp_path / "cache" / "converted", "bfloat16")
    assert "decode steps read what compressed-tensors becomes: int4" in capsys.readouterr().err
    model = load(folder, "bfloat16", "eager", cache=tmp_path / "cache", weights="auto")
    assert model.packed is not None
    down = model.packed["layers.0.down"]
    assert down.form is Form.INT4
    np.testing.assert_allclose(unpack(down), meant["model.layers.0.mlp.down_proj.weight"].numpy(), rtol=1e-7)


UNREAD = {
    "a method": ({"quant_method": "aqlm"}, "quantised by aqlm are not read"),
    "no method": ({"bits": 4}, "quantised by an unnamed method are not read"),
    "a key": ({"quant_method": "awq", "bits": 4, "rotate": True}, "says 'rotate'"),
    "an order": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version = 'gemv' are not read"),
    "bits": ({"quant_method": "gptq", "bits": 3}, "bits = 3 are not read"),
    "modules": ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {"bits": 8}}}, "dynamic = "),
    "rotations": ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, "transform_config"),
    "types": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt = 'e5m2' are not read"),
}


@pytest.mark.parametrize(("says", "message"), UNREAD.values(), ids=UNREAD)
def test_what_is_not_read_is_refused(says: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=message) as error:
        read_scheme(tmp_path, {"quantization_config": says})
    assert "take a GGUF file" in error.value.message


def with_blocks_of(count: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = "layer.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(tensors[name].numpy().tobytes()) | {"blocksize": count}
        tensors[name] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        tensors["layer.weight.absmax"] = torch.ones(1)

    return change


WRONG = {
    "blocks beyond memory": ("nf4", with_blocks_of(1 << 50), "blocks of 1125899906842624, 256"),
    "scales": ("awq", lambda t: t.update({"layer.scales": t["layer.scales"][:, :8].clone()}), "scales of"),
    "missing": ("awq", lambda t: t.pop("layer.qzeros"), "layer.qzeros is missing"),
    "groups": ("gptq", lambda t: t["layer.g_idx"].fill_(99), "a group that has no scale"),
    "state": (
        "nf4",
        lambda t: t["layer.weight.quant_state.bitsandbytes__nf4"].fill_(91),
        "bitsandbytes__nf4 is damaged",
    ),
    "no scale": ("fp8 blocks", lambda t: t.pop("layer.weight_scale_inv"), "with 0 scales"),
    "blocks": (
        "fp8 blocks",
        lambda t: t.update({"layer.weight_scale_inv": torch.ones(3, 2)}),
        "3 scales for 32 numbers",
    ),
    "unexplained": ("awq", lambda t: t.update({"x.weight": torch.ones(3).char()}), "does not explain"),
    "twice": ("awq", lambda t: t.update({"layer.weight": torch.ones(3)}), "both quantised and not"),
    "widths": ("pack-quantized", lambda t: t["layer.weight_shape"].fill_(32), "only codes of 4"),
}


@pytest.mark.parametrize(("name", "change", "message"), WRONG.values(), ids=WRONG)
def test_tensors_that_do_not_fit_are_refused(
    name: str, change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    made = MAKERS[name](np.random.default_rng(3), OUTPUTS, INPUTS)
    tensors = {f"layer.{end}": tensor for end, tensor in made.tensors.items()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CorruptModel, match=message):
        opened(tmp_path, made.says).dense("layer.weight")


def test_every_method_is_tested() -> None:
    tried = {
        make(np.random.default_rng(0), OUTPUTS, INPUTS).says.get("quant_method") for make in MAKERS.values()
    }
    assert tried - {None} | {"mxfp4"} == set(METHODS)
