"""Loading: every family, every way a folder can be broken, and what stored KV is tied to."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spilld.errors import (
    ConfigError,
    CorruptModel,
    InvalidRequest,
    ModelError,
    UnsupportedModel,
)
from spilld.models.families.rope import fix_rope
from spilld.models.files.weights import read_weight_files
from spilld.models.model import (
    Model,
    load,
    load_module,
    resolve,
)
from spilld.protocol.messages import Message
from spilld.tokenizer.tokenizer import Tokenizer

from .tiny_models import END, FAMILIES, LONGROPE_ORIGINAL, VOCAB, build


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {family: build(family, root / family) for family in FAMILIES}


@pytest.fixture
def llama(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "model"))


def load_eager(folder: Path, **options: Any) -> Model:
    return load(folder, "float32", "eager", cache=folder.parent / "cache", **options)


def load_ours(folder: Path) -> Model:
    return load(folder, "float32", cache=folder.parent / "cache")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_is_what_the_attention_is_called_with(family: str, folders: dict[str, Path]) -> None:
    calls: list[tuple[int, tuple[int, ...], tuple[int, ...], int | None, float | None, float]] = []

    def record(
        layer: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any
    ) -> Any:
        window, cap = options.get("sliding_window"), options.get("softcap")
        calls.append((layer.layer_idx, tuple(q.shape), tuple(k.shape), window, cap, options["scaling"]))
        return torch.zeros_like(q).transpose(1, 2), None

    transformers.AttentionInterface.register("recorder", record)
    model = load(folders[family], "float32", "recorder", cache=folders[family].parent / "cache")
    with torch.inference_mode():
        logits = model.module(torch.tensor([[5, 6, 7]]), use_cache=False).logits
    g = model.geometry
    assert logits.shape == (1, 3, g.vocab) == (1, 3, VOCAB)
    assert calls == [
        (
            i,
            (1, layer.heads, 3, layer.head_dim),
            (1, layer.kv_heads, 3, layer.head_dim),
            layer.sliding_window,
            layer.softcap or None,
            layer.scaling,
        )
        for i, layer in enumerate(g.layers)
    ]
    assert (g.max_positions, g.eos) == (4096, frozenset({END}))
    assert all((layer.softcap > 0) == (family == "gemma2") for layer in g.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_what_transformers_loads(family: str, folders: dict[str, Path]) -> None:
    model = load_eager(folders[family])
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    plain = transformers.AutoModelForCausalLM.from_pretrained(folders[family], attn_implementation="eager")
    tokens = torch.arange(LONGROPE_ORIGINAL + 40)[None]  # so that longrope is long in both
    with torch.inference_mode():
        assert torch.equal(model.module(tokens).logits, plain(tokens).logits)


def test_a_file_of_weights_that_is_cut_off(tmp_path: Path) -> None:
    save_file({"a": torch.ones(64)}, whole := tmp_path / "model.safetensors")
    whole.write_bytes(whole.read_bytes()[:-4])
    with pytest.raises(CorruptModel, match="header says"):
        read_weight_files(tmp_path)


def test_no_connection_is_attempted(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_eager(llama).tokenizer.encode("no hub")


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda tensors: tensors.__delitem__(name))


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return damage


def headed(header: bytes) -> bytes:
    """A safetensors file without tensors."""
    return len(header).to_bytes(8, "little") + header


NORM = "model.layers.1.input_layernorm.weight"
CORRUPTIONS: dict[str, Callable[[Path], object]] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config not JSON": rewrite("config.json", lambda data: data[:-4]),
    "config not an object": rewrite("config.json", lambda data: b"[]"),
    "config not text": rewrite("config.json", lambda data: b"\xff\xfe\x00"),
    "no model_type": lambda folder: edit_config(folder, model_type=None),
    "heads that do not divide": lambda folder: edit_config(folder, num_attention_heads=7),
    "size of the wrong type": lambda folder: edit_config(folder, hidden_size="wide"),
    "other size than the weights": lambda folder: edit_config(folder, intermediate_size=128),
    "weights cut off": rewrite("model.safetensors", lambda data: data[:-1]),
    "weights too long": rewrite("model.safetensors", lambda data: data + b"\0"),
    "weights empty": rewrite("model.safetensors", lambda data: b""),
    "header cut off": rewrite("model.safetensors", lambda data: data[:100]),
    "header length flipped": rewrite("model.safetensors", lambda data: data[:7] + b"\x7f" + data[8:]),
    "header not JSON": rewrite("model.safetensors", lambda data: data[:8] + b"?" + data[9:]),
    "header nested": rewrite("model.safetensors", lambda data: headed(b"[" * 100_000)),
    "header with endless numbers": rewrite(
        "model.safetensors",
        lambda data: headed(b'{"a": {"data_offsets": [0, 1e999], "dtype": "F32", "shape": []}}'),
    ),
    "header of another shape": rewrite("model.safetensors", lambda data: headed(b'{"a": []}')),
    "config nested": rewrite("config.json", lambda data: b"[" * 100_000),
    "tokenizer settings are a list": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "template not text": lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff\xfe"),
    "a tensor missing": drop(NORM),
    "a tensor too many": lambda folder: edit_weights(
        folder, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2)})
    ),
    "a tensor of another shape": lambda folder: edit_weights(
        folder, lambda tensors: tensors.update({NORM: torch.ones(95)})
    ),
    "tokenizer not JSON": rewrite("tokenizer.json", lambda data: data[:-9]),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("damage", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corrupt_folder_is_refused(damage: Callable[[Path], object], llama: Path) -> None:
    load_eager(llama)
    damage(llama)
    with pytest.raises(CorruptModel) as caught:
        load_eager(llama)
    assert str(llama) in caught.value.message
    assert "\n" not in caught.value.message


UNSUPPORTED: dict[str, Callable[[Path], object]] = {
    "another family": lambda folder: edit_config(folder, model_type="gpt2"),
    "images, around what is not served": lambda folder: edit_config(
        folder, model_type="gemma3", text_config={"model_type": "gemma2"}
    ),
    "dynamic rope": lambda folder: edit_config(
        folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
    "not causal": lambda folder: edit_config(folder, is_causal=False),
    "code of its own": lambda folder: edit_config(
        folder, auto_map={"AutoModelForCausalLM": "modeling_llama.OtherLlamaForCausalLM"}
    ),
    "another class": lambda folder: edit_config(folder, architectures=["LlamaForSequenceClassification"]),
    "an adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "layers of a kind": lambda folder: edit_config(
        folder, layer_types=["full_attention", "chunked_attention"]
    ),
    "layers that slide in config.json only": lambda folder: edit_config(
        folder, layer_types=["full_attention", "sliding_attention"], sliding_window=64
    ),
    "pickled weights": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "integer weights": lambda folder: edit_weights(
        folder, lambda tensors: tensors.update({NORM: torch.ones(96, dtype=torch.int8)})
    ),
}


@pytest.mark.parametrize("change", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_folder_is_refused(change: Callable[[Path], object], llama: Path) -> None:
    change(llama)
    with pytest.raises(UnsupportedModel):
        load_ours(llama)


UNREAD = {
    "an unknown method": ({"quantization_config": {"quant_method": "aqlm"}}, "aqlm"),
    "MLX": ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    "older": ({"compression_config": {"quant_method": "sparseml"}}, "sparseml"),
}


@pytest.mark.parametrize(("config", "method"), UNREAD.values(), ids=UNREAD)
def test_folder_whose_method_is_not_read_is_refused(
    config: dict[str, Any], method: str, llama: Path, tmp_path: Path
) -> None:
    """Also where the dtypes of its weights would be refused, and before anything is converted."""
    edit_weights(llama, lambda tensors: tensors.update({NORM: torch.ones(96, dtype=torch.int8)}))
    edit_config(llama, **config)
    with pytest.raises(UnsupportedModel, match=rf"quantised by {method} are not read;.* take a GGUF file"):
        resolve(str(llama), tmp_path, "bfloat16")


def test_quantised_folder_that_says_so_in_a_file(llama: Path, tmp_path: Path) -> None:
    (llama / "quantize_config.json").write_text('{"bits": 3}')
    with pytest.raises(UnsupportedModel, match="quantised by gptq with bits = 3 are not read"):
        resolve(str(llama), tmp_path, "bfloat16")


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
        ("{{ messages[0].content.__class__.__base__.__subclasses__() }}", "unsafe|refuses"),
    ],
    ids=["loops", "escapes"],
)
def test_template_of_a_folder_runs_within_limits(template: str, fault: str, llama: Path) -> None:
    (llama / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.load(llama)
    try:
        with pytest.raises(InvalidRequest, match=f"chat template.*({fault})"):
            tokenizer.chat([Message(role="user", content="hello")])
    finally:
        tokenizer.close()


INDEXES = {
    "outside": ('{"weight_map": {"a": "../other.safetensors"}}', "'../other.safetensors', which is no"),
    "missing": ('{"weight_map": {"a": "model-2.safetensors"}}', "'model-2.safetensors', which is no"),
    "no names": ('{"weight_map": {"a": 5}}', "'5', which is no"),
    "no map": ('{"weight_map": [1]}', "is damaged"),
    "no JSON": ("{", "is damaged"),
    "nested": ("[" * 100_000, "is damaged"),
}


@pytest.mark.parametrize(("text", "message"), INDEXES.values(), ids=INDEXES)
def test_index_that_names_no_files_of_the_folder(
    text: str, message: str, llama: Path, tmp_path: Path
) -> None:
    shutil.copyfile(llama / "model.safetensors", tmp_path / "other.safetensors")
    (llama / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptModel, match=message):
        resolve(str(llama), tmp_path, "float32")


def test_what_a_folder_without_safetensors_has(llama: Path, tmp_path: Path) -> None:
    (llama / "model.safetensors").rename(llama / "m.gguf")
    with pytest.raises(UnsupportedModel, match=r"give the file, --model .*m\.gguf"):
        resolve(str(llama), tmp_path, "bfloat16")
    (llama / "m.gguf").rename(llama / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin is a pickle"):
        resolve(str(llama), tmp_path, "bfloat16")


def test_code_that_transformers_has_by_now_is_no_obstacle(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["phi3"], tmp_path / "phi3"))
    edit_config(
        folder,
        auto_map={
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
    )
    (folder / "modeling_phi3.py").write_text("raise SystemExit")
    assert len(load_eager(folder).geometry.layers) == 2


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_yarn_reaches_as_far_as_its_factor(
    family: str, key: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The recipe of model cards, with max_position_embeddings as it was."""
    folder = Path(shutil.copytree(folders[family], tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    kind = {"rope_scaling": "type", "rope_parameters": "rope_type"}[key]
    yarn = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    config |= {key: yarn, "rope_theta": 1e6}
    for positions, reached in ((4096, 16384), (32768, 32768)):
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
        assert load_eager(folder, max_context=reached).geometry.max_positions == reached
        with pytest.raises(ConfigError, match=str(reached)):
            load_eager(folder, max_context=reached + 1)


def test_unsupported_family_names_the_supported_ones(llama: Path) -> None:
    edit_config(llama, model_type="t5")
    with pytest.raises(
        UnsupportedModel,
        match=r"t5.*llama, mistral, .*qwen3_moe, .*, gemma3, gemma3n, .*mistral3, qwen3_5, qwen3_5_moe are,",
    ):
        load_eager(llama)


def test_head_dim_without_a_record_layout_is_refused(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "odd", head_dim=24)
    with pytest.raises(UnsupportedModel, match="head_dim 24"):
        load_eager(folder)


def test_bidirectional_model_is_refused(tmp_path: Path) -> None:
    folder = build("gemma3", tmp_path / "both", use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModel, match="bidirectional"):
        load_eager(folder)


def test_context_beyond_the_model_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match="4097") as caught:
        load_eager(llama, max_context=4097)
    assert not isinstance(caught.value, ModelError)


def test_several_end_tokens(llama: Path) -> None:
    edit_config(llama, eos_token_id=[5, 6])
    generation = llama / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [7]}))
    assert load_eager(llama).geometry.eos == {5, 6, 7, END}


class TestFingerprint:
    def test_same_model_elsewhere(self, llama: Path, tmp_path: Path) -> None:
        before = load_eager(llama).fingerprint
        edit_config(llama, transformers_version="9.9", dtype="float32", use_cache=False)
        moved = llama.rename(tmp_path / "moved")
        assert len(before) == 32
        assert load(moved, "float32", "eager", cache=tmp_path / "other").fingerprint == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda folder: edit_weights(
                folder, lambda tensors: tensors.update({NORM: tensors[NORM] * 1.0001})
            ),
            lambda folder: edit_config(
                folder, rope_parameters={"rope_type": "default", "rope_theta": 10001.0}
            ),
            lambda folder: edit_config(folder, rms_norm_eps=1e-5),
        ],
        ids=["weights", "rope", "epsilon"],
    )
    def test_changed_model(self, change: Callable[[Path], None], llama: Path) -> None:
        before = load_eager(llama).fingerprint
        change(llama)
        assert load_eager(llama).fingerprint != before

    def test_dtype(self, llama: Path) -> None:
        cast = load(llama, "bfloat16", "eager", cache=llama.parent / "cache")
        assert cast.module.dtype == torch.bfloat16
        assert cast.fingerprint != load_eager(llama).fingerprint

    def test_longrope_choice(self, folders: dict[str, Path]) -> None:
        prints = {
            longest: load_eager(folders["phi3-longrope"], max_context=longest).fingerprint
            for longest in (32, LONGROPE_ORIGINAL, LONGROPE_ORIGINAL + 1, 4096)
        }
        assert prints[32] == prints[LONGROPE_ORIGINAL]
        assert prints[LONGROPE_ORIGINAL + 1] == prints[4096]
        assert prints[32] != prints[4096]


class TestLongrope:
    def rotary(self, folder: Path, longest: int | None) -> Any:
        module = load_module(folder, "float32", "eager")
        if longest is not None:
            fix_rope(module, longest)
        return module.model.rotary_emb

    @pytest.mark.parametrize("longest", [LONGROPE_ORIGINAL, LONGROPE_ORIGINAL + 1])
    def test_long_neighbour_changes_nothing(self, longest: int, folders: dict[str, Path]) -> None:
        positions = torch.arange(10)[None]
        packed = torch.cat([positions, torch.arange(200)[None]], dim=1)
        x = torch.zeros(1)
        plain = self.rotary(folders["phi3-longrope"], None)
        fixed = self.rotary(folders["phi3-longrope"], longest)
        assert not torch.equal(plain(x, positions)[0], plain(x, packed)[0][:, :10])
        assert torch.equal(fixed(x, positions)[0], fixed(x, packed)[0][:, :10])
        assert torch.equal(fixed(x, positions)[1], fixed(x, packed)[1][:, :10])

    @pytest.mark.parametrize(
        ("longest", "tokens"), [(LONGROPE_ORIGINAL, 20), (4096, LONGROPE_ORIGINAL + 1), (4096, 150)]
    )
    def test_logits_are_transformers_own(self, longest: int, tokens: int, folders: dict[str, Path]) -> None:
        prompt = torch.arange(tokens)[None]
        plain = load_module(folders["phi3-longrope"], "float32", "eager")
        fixed = load_eager(folders["phi3-longrope"], max_context=longest).module
        with torch.inference_mode():
            assert torch.equal(fixed(prompt).logits, plain(prompt).logits)

    def test_dynamic_in_a_loaded_module_is_refused(self, llama: Path) -> None:
        module = load_module(llama, "float32", "eager")
        module.model.rotary_emb.rope_type = "dynamic"
        with pytest.raises(UnsupportedModel):
            fix_rope(module, 4096)


def test_weights_are_mapped_not_copied(llama: Path, smollm2_float32: Path, cache_folder: Path) -> None:
    load_eager(llama)  # what the libraries allocate once is not counted
    before = anonymous_bytes()
    model = load(smollm2_float32, "float32", "eager", cache=cache_folder)
    weights = sum(parameter.nbytes for parameter in model.module.parameters())
    assert weights > 500 << 20
    assert anonymous_bytes() - before < 200 << 20


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def test_smollm2(smollm2_float32: Path, smollm2_bfloat16: Path, cache_folder: Path) -> None:
    model = load(smollm2_float32, "float32", "eager", cache=cache_folder)
    g = model.geometry
    assert (len(g.layers), *g.sizes, g.vocab) == (30, 9, 3, 64, 49152)
    assert (g.max_positions, g.eos, g.sliding_windows) == (8192, frozenset({2}), (None,) * 30)
    with torch.inference_mode():
        ids = torch.tensor([model.tokenizer.encode("The capital of France is")])
        likeliest = int(model.module(ids).logits[0, -1].argmax())
    assert model.tokenizer.decode([likeliest]) == " Paris"
    with (
        safe_open(smollm2_float32 / "model.safetensors", "pt") as full,
        safe_open(smollm2_bfloat16 / "model.safetensors", "pt") as half,
    ):
        for name in ("model.embed_tokens.weight", "model.layers.7.mlp.down_proj.weight", "model.norm.weight"):
            assert torch.equal(full.get_tensor(name).to(torch.bfloat16), half.get_tensor(name))


@pytest.mark.slow
def test_gemma3(gemma3_float32: Path, cache_folder: Path) -> None:
    model = load(gemma3_float32, "float32", "eager", cache=cache_folder)
    g = model.geometry
    assert (len(g.layers), *g.sizes, g.vocab) == (18, 4, 1, 256, 262144)
    assert g.sliding_windows == ((512,) * 5 + (None,)) * 3
    with torch.inference_mode():
        ids = torch.tensor([model.tokenizer.encode("Paris is the capital of")])
        assert model.tokenizer.decode([int(model.module(ids).logits[0, -1].argmax())]) == " France"
