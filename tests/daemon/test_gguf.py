"""GGUF files are the models that their metadata says, or are refused: at once, whatever headers claim."""

from __future__ import annotations

import math
import os
import struct
import tracemalloc
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from spilld.errors import CorruptModel, UnsupportedModel
from spilld.models.catalog import resolve
from spilld.models.convert import convert
from spilld.models.files import digest
from spilld.models.gguf.header import read_header
from spilld.models.gguf.metadata import config_values
from spilld.models.gguf.split import read_whole
from spilld.models.gguf.weights import GgufWeights
from spilld.models.model import load
from spilld.models.packed.packing import matrices, parts_of
from spilld.offload.kernels.linear.packed import unpack

from .harness import engine, greedy, reference, some_tokens
from .replaced import replace
from .tiny_gguf import write
from .tiny_models import LONGROPE_ORIGINAL, build

TOKENS = torch.arange(5, 60)[None]
PROMPT = some_tokens(3, 300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {family: build(family, root / family) for family in ("llama", "qwen2", "qwen3")}


def logits(folder: Path, rope: dict[str, Any] | None = None, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Of plain transformers, with other RoPE parameters if given."""
    module = reference(folder, "eager")
    if rope:
        config = module.config
        config.rope_parameters = {**config.rope_parameters, **rope}
        module.model.rotary_emb = type(module.model.rotary_emb)(config)
    with torch.inference_mode():
        found: torch.Tensor = module(tokens).logits
    return found


def converted(file: Path, dtype: str = "float32") -> Path:
    convert([file], file.with_suffix(""), dtype)
    return file.with_suffix("")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_file_is_the_model_of_its_folder(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """qwen3's heads are smaller here than what transformers takes where it reads no key_length."""
    found = converted(write(folders[family], tmp_path / "m.gguf"))
    assert torch.equal(logits(found), logits(folders[family]))


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": ({"sliding_window": None}, {}),
    "qwen2_moe": ({}, {}),
    "qwen3_moe": ({"mlp_only_layers": []}, {}),
    "gemma2": ({"query_pre_attn_scalar": 32}, {}),
    "gemma3": (
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        {"gemma3__rope__scaling__type": "linear", "gemma3__rope__scaling__factor": 8.0},
    ),
    "phi3": ({"sliding_window": 40}, {"phi3__attention__sliding_window": 40}),
    "phi3-longrope": (
        {"sliding_window": None},
        {
            "phi3__rope__scaling__original_context_length": LONGROPE_ORIGINAL,
            "phi3__rope__scaling__attn_factor": math.sqrt(1 + math.log(4096 / 64) / math.log(64)),
            "rope_factors_short__weight": [1.0 + 0.1 * i for i in range(8)],
            "rope_factors_long__weight": [2.0 + 1.5 * i for i in range(8)],
        },
    ),
    "smollm3": ({"no_rope_layer_interval": 4, "num_hidden_layers": 4}, {}),
}


@pytest.mark.parametrize("family", OTHERS)
def test_a_file_of_another_family(family: str, tmp_path: Path) -> None:
    changes, keys = OTHERS[family]
    folder = build(family, tmp_path / "folder", **changes)
    found = converted(write(folder, tmp_path / "m.gguf", **keys))
    for tokens in (TOKENS, TOKENS.repeat(1, 2)):
        torch.testing.assert_close(
            logits(found, tokens=tokens), logits(folder, tokens=tokens), rtol=0, atol=1e-4
        )


FREQUENCIES = [1.0 + 0.5 * i for i in range(8)]
SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "factors of frequencies": (
        {"rope_freqs__weight": FREQUENCIES},
        {
            "rope_type": "longrope",
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": 4096,
            "short_factor": FREQUENCIES,
            "long_factor": FREQUENCIES,
        },
    ),
    "yarn": (
        {
            "llama__rope__scaling__type": "yarn",
            "llama__rope__scaling__factor": 4.0,
            "llama__rope__scaling__original_context_length": 1024,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    ),
}


@pytest.mark.parametrize("scaling", SCALED)
def test_scaled_frequencies(scaling: str, folders: dict[str, Path], tmp_path: Path) -> None:
    keys, rope = SCALED[scaling]
    found = converted(write(folders["llama"], tmp_path / "m.gguf", **keys))
    wanted = logits(folders["llama"], rope)
    torch.testing.assert_close(logits(found), wanted, rtol=0, atol=1e-4)
    assert not torch.allclose(wanted, logits(folders["llama"]), atol=0.1)


def test_factors_divide_frequencies(folders: dict[str, Path], tmp_path: Path) -> None:
    """As llama.cpp reads Llama 3's."""
    found = converted(write(folders["llama"], tmp_path / "m.gguf", rope_freqs__weight=FREQUENCIES))
    plain, scaled = (reference(folder, "eager").model.rotary_emb for folder in (folders["llama"], found))
    torch.testing.assert_close(scaled.inv_freq * torch.tensor(FREQUENCIES), plain.inv_freq)
    assert scaled.attention_scaling == 1.0


def test_a_split_file_is_read_from_all_its_parts(folders: dict[str, Path], tmp_path: Path) -> None:
    write(folders["llama"], tmp_path / "m.gguf", split=8)
    first = tmp_path / "m-00001-of-00003.gguf"
    found = resolve(str(first), tmp_path / "cache", "float32")
    assert torch.equal(logits(found), logits(folders["llama"]))
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(CorruptModel, match=r"m-00002-of-00003\.gguf is missing"):
        resolve(str(first), tmp_path / "cache", "float32")


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.F16])
def test_packed_weights_are_the_dense_ones(family: str, kind: Kind, tmp_path: Path) -> None:
    """Also of experts, and of rows in another order."""
    folder = build(family, tmp_path / "folder")
    file = write(folder, tmp_path / "m.gguf", kind)
    weights = GgufWeights(read_whole(file), "m")
    packs = 0
    for name in weights.names:
        dense, packed = weights.dense(name), weights.packed(name)
        assert tuple(dense.shape) == weights.shape(name)
        if packed is not None:
            packs += 1
            found = np.concatenate([unpack(one) for one in packed])
            assert np.array_equal(
                found[: dense.shape[-2]] if len(packed) == 1 else found, dense.flatten(0, -2)
            )
    assert (packs > 0) == (kind is not Kind.F16)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [("blk.0.attn_q_norm.weight", "which its family has not"), ("blk.0.something.weight", "not understood")],
)
def test_a_tensor_that_the_family_has_not_is_refused(
    tensor: str, why: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    more: dict[str, Any] = {tensor.replace(".", "__"): [1.0] * 16}
    with pytest.raises(UnsupportedModel, match=why):
        converted(write(folders["llama"], tmp_path / "m.gguf", **more))


@pytest.mark.parametrize(
    "keys",
    [
        {"rope__scale_linear": 4.0},
        {"rope__scaling__factor": 4.0},
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0, "rope__scale_linear": 2.0},
    ],
    ids=["legacy", "factor alone", "both"],
)
def test_linear_rope_scaling_is_applied(
    keys: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """As llama.cpp does: a factor without a type is linear, and the older key counts where there is none."""
    metadata = {f"llama__{key}": value for key, value in keys.items()}
    found = converted(write(folders["llama"], tmp_path / "m.gguf", **metadata))
    wanted = logits(folders["llama"], {"rope_type": "linear", "factor": 4.0})
    assert torch.equal(logits(found), wanted)
    assert not torch.allclose(wanted, logits(folders["llama"]), atol=0.1)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope__scale_linear": 1.0},
        {"rope__scaling__type": "none", "rope__scaling__factor": 4.0},
        {"rope__scaling__factor": 0.0},
        {"attention__causal": True, "expert_count": 0, "logit_scale": 1.0, "pooling_type": 3},
        {"rope__scaling__finetuned": True, "tensor_data_layout": "Meta AI original pth"},
        {"attention__value_length": 16, "attention__key_length": 16, "rope__dimension_count": 16},
        {"rope__freq_base": None},
        {"attention__head_count_kv": 2},
    ],
)
def test_keys_that_ask_for_nothing_else(
    keys: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    metadata = {f"llama__{key}": value for key, value in keys.items()}
    more: dict[str, Any] = {"general__tags": ["a"], "quantize__imatrix__file": "x", "somebody__note": 1.5}
    found = converted(write(folders["llama"], tmp_path / "m.gguf", **metadata, **more))
    assert torch.equal(logits(found), logits(folders["llama"]))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown scaling": ({"llama__rope__scaling__type": "dynamic"}, "RoPE scaling 'dynamic'"),
    "yarn of another kind": (
        {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__yarn_ext_factor": 0.5},
        "yarn_ext_factor",
    ),
    "two scalings": (
        {"llama__rope__scaling__factor": 4.0, "rope_freqs__weight": [1.0] * 8},
        "factors of RoPE beside",
    ),
    "factor of attention": ({"llama__rope__scaling__attn_factor": 1.2}, r"llama\.rope\.scaling\.attn_factor"),
    "not causal": ({"llama__attention__causal": False}, r"llama\.attention\.causal = False"),
    "clamped": ({"llama__attention__clamp_kqv": 8.0}, r"llama\.attention\.clamp_kqv"),
    "alibi": ({"llama__attention__max_alibi_bias": 8.0}, "max_alibi_bias"),
    "scaled logits": ({"llama__logit_scale": 0.5}, r"llama\.logit_scale = 0\.5"),
    "scaled embeddings": ({"llama__embedding_scale": 12.0}, r"llama\.embedding_scale"),
    "scaled residuals": ({"llama__residual_scale": 0.22}, r"llama\.residual_scale"),
    "attention scale": ({"llama__attention__scale": 0.1}, r"llama\.attention\.scale"),
    "parallel": ({"llama__use_parallel_residual": True}, "use_parallel_residual"),
    "more tokens ahead": ({"llama__nextn_predict_layers": 1}, "nextn_predict_layers"),
    "a key that nobody knows": ({"llama__new_thing": 1}, r"what llama\.new_thing says"),
    "a word for each layer": ({"llama__new_things": ["a", "b"]}, r"what llama\.new_things says"),
    "heads by layer": ({"llama__attention__head_count_kv": [2, 2]}, r"llama\.attention\.head_count_kv"),
    "an adapter": ({"general__type": "adapter"}, "is no model"),
}


@pytest.mark.parametrize(("keys", "why"), REFUSED.values(), ids=REFUSED)
def test_keys_of_another_model_are_refused_at_once(
    keys: dict[str, Any], why: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(folders["llama"], tmp_path / "m.gguf", **keys)
    monkeypatch.delattr(digest, "_read")
    with pytest.raises(UnsupportedModel, match=why):
        resolve(str(file), tmp_path / "cache", "float32")


@pytest.mark.parametrize(
    "keys",
    [
        {"attention__sliding_window": 64},
        {"attention__value_length": 8},
        {"rope__dimension_count_swa": 8},
        {"attn_logit_softcapping": 50.0},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_what_a_family_does_not_compute_is_refused(
    keys: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    file = write(
        folders["llama"], tmp_path / "m.gguf", **{f"llama__{key}": value for key, value in keys.items()}
    )
    [key] = keys
    with pytest.raises(UnsupportedModel, match=key.replace("__", ".")):
        config_values(read_header(file), "m")


@pytest.mark.parametrize("key", ["context_length", "attention__head_count", "feed_forward_length"])
def test_what_a_header_must_say(key: str, folders: dict[str, Path], tmp_path: Path) -> None:
    without: dict[str, Any] = {f"llama__{key}": None}
    file = write(folders["llama"], tmp_path / "m.gguf", **without)
    with pytest.raises(CorruptModel, match=f"does not say llama.{key.replace('__', '.')}"):
        resolve(str(file), tmp_path / "cache", "float32")


@pytest.mark.parametrize(
    ("kind", "packed"),
    [(Kind.F32, False), (Kind.F16, False), (Kind.BF16, False), (Kind.Q8_0, True), (Kind.Q5_0, True)],
)
def test_only_quantised_files_have_codes(
    kind: Kind, packed: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """weights = "auto" reads the rest as bf16."""
    folder = converted(write(folders["llama"], tmp_path / "m.gguf", kind), "bfloat16")
    model = load(folder, "bfloat16", cache=tmp_path, weights="auto")
    assert (model.packed is not None) == packed


def test_matrices_of_several_forms_are_kept_bit_for_bit(folders: dict[str, Path], tmp_path: Path) -> None:
    """As in files of K-quants, whose values have more bits than queries and keys."""
    others = {"k_proj": Kind.Q5_0, "v_proj": Kind.Q8_0, "up_proj": Kind.Q5_1, "down_proj": Kind.Q4_1}
    files = [write(folders["llama"], tmp_path / f"{n}.gguf", Kind.Q4_0, others=others) for n in range(2)]
    plain = load(converted(files[0], "float32"), "float32", cache=tmp_path / "cache")
    weights = load(
        converted(files[1], "bfloat16"), "bfloat16", cache=tmp_path / "cache", weights="auto"
    ).packed
    assert weights is not None
    assert {part.form for part in weights.values()} == {"q4_0", "q5_0", "int8", "q5_1", "int4"}
    for name, parts in matrices(plain.module).items():
        wanted = np.concatenate([part.numpy() for part in parts])
        np.testing.assert_array_equal(np.concatenate([unpack(p) for p in parts_of(weights, name)]), wanted)
    with engine(replace_fields(plain, packed=weights), tmp_path / "s", format="exact") as harness:
        found = harness.ask(PROMPT, max_tokens=16, ignore_eos=True)
    assert found == greedy(reference(plain.folder), PROMPT, 16)


def test_matrices_that_the_file_has_as_one_are_kept(tmp_path: Path) -> None:
    """Phi 3's queries, keys and values, and its gate and up."""
    file = write(build("phi3", tmp_path / "folder"), tmp_path / "m.gguf", Kind.Q4_0)
    weights = load(converted(file, "bfloat16"), "bfloat16", cache=tmp_path / "cache", weights="auto").packed
    assert weights is not None
    assert {weights[f"layers.1.{name}"].form for name in ("qkv", "out", "gate_up", "down")} == {"q4_0"}


def test_a_file_of_the_same_size_and_time_is_converted_anew(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "_SETTLED_NS", 0)
    other = write(build("llama", tmp_path / "other", seed=1), tmp_path / "other.gguf")
    file = write(folders["llama"], tmp_path / "m.gguf")
    first = resolve(str(file), tmp_path / "cache", "float32")
    assert resolve(str(file), tmp_path / "cache", "float32") == first
    replace(file, other.read_bytes())
    second = resolve(str(file), tmp_path / "cache", "float32")
    assert torch.equal(logits(first), logits(folders["llama"]))
    assert torch.equal(logits(second), logits(tmp_path / "other"))


@pytest.mark.parametrize("part", [2, 3])
def test_another_part_of_a_split_file_names_the_first(
    part: int, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folders["llama"], tmp_path / "m.gguf", split=8)
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.delattr(digest, "_read")
    with pytest.raises(UnsupportedModel, match=r"of 3 of a split GGUF file.*-00001-of-00003\.gguf"):
        resolve(str(tmp_path / f"m-{part:05}-of-00003.gguf"), tmp_path / "cache", "float32")


U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack


def header(values: bytes = b"", count: int = 0, tensors: bytes = b"", tensor_count: int = 0) -> bytes:
    name = text("general.architecture") + U32(8) + text("llama")
    return b"GGUF" + U32(3) + U64(tensor_count) + U64(count + 1) + name + values + tensors


def text(content: str) -> bytes:
    return U64(len(content)) + content.encode()


BOMBS = {
    "values": header(count=2**60),
    "values that a large file could hold": header(count=2**30),
    "tensors": header(tensor_count=2**60),
    "tensors that a large file could hold": header(tensor_count=2**30),
    "a long key": header(U64(2**60), 1),
    "a key as long as the file": header(U64(2**35), 1),
    "a long string": header(text("a") + U32(8) + U64(2**35), 1),
    "strings": header(text("a") + U32(9) + U32(8) + U64(2**60), 1),
    "strings that a large file could hold": header(text("a") + U32(9) + U32(8) + U64(2**32), 1),
    "numbers": header(text("a") + U32(9) + U32(12) + U64(2**60), 1),
    "arrays of arrays": header(text("a") + U32(9) + U32(9) + U64(1), 1),
    "a kind that is none": header(text("a") + U32(77), 1),
    "a long element": header(text("a") + U32(9) + U32(8) + U64(2) + U64(2**63), 1),
    "dimensions": header(tensors=text("a") + U32(2**32 - 1), tensor_count=1),
    "a large tensor": header(
        tensors=text("a") + U32(2) + U64(2**40) * 2 + U32(0) + U64(2**63), tensor_count=1
    ),
    "an alignment of 3": header(text("general.alignment") + U32(4) + U32(3), 1),
    "an alignment of 0": header(text("general.alignment") + U32(4) + U32(0), 1),
    "an alignment that is a word": header(text("general.alignment") + U32(8) + text("x"), 1),
    "a tensor on another": header(
        tensors=b"".join(text(name) + U32(1) + U64(64) + U32(0) + U64(32) for name in "ab"), tensor_count=2
    ),
    "a tensor between two places": header(
        tensors=text("a") + U32(1) + U64(1) + U32(0) + U64(4), tensor_count=1
    ),
    "half a block": header(tensors=text("a") + U32(1) + U64(16) + U32(2) + U64(0), tensor_count=1),
    "no numbers": header(tensors=text("a") + U32(1) + U64(0) + U32(0) + U64(0), tensor_count=1),
    "a key twice": header((text("a") + U32(4) + U32(1)) * 2, 2),
    "a tensor twice": header(tensors=(text("a") + U32(1) + U64(1) + U32(0) + U64(0)) * 2, tensor_count=2),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_whatever_a_header_claims_takes_little(bomb: bytes, tmp_path: Path) -> None:
    """Also where the file, of holes, is as large as it says."""
    file = tmp_path / "x.gguf"
    for size in (len(bomb), 2**36):
        file.write_bytes(bomb)
        os.truncate(file, max(24, size))
        tracemalloc.start()
        with pytest.raises(CorruptModel):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
        tracemalloc.stop()
