"""What is stored is for these weights: whatever else has their names, sizes and times gets none of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spilld.errors import CorruptModel
from spilld.models import model
from spilld.models.files import digest
from spilld.models.model import (
    Model,
    identify,
    load,
    load_module,
    resolve,
)

from .harness import engine, greedy, reference, some_tokens
from .replaced import overwrite, replace
from .tiny_models import build

PROMPT = some_tokens(11, 700)


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are kept at once."""
    monkeypatch.setattr(digest, "_SETTLED_NS", 0)


def loaded(folder: Path, weights: str = "bf16") -> Model:
    return load(folder, "float32", cache=folder.parent / "cache", weights=weights)


@pytest.mark.parametrize("change", [replace, overwrite])
def test_weights_of_the_same_size_and_time(change: object, tmp_path: Path) -> None:
    assert callable(change)
    folder, other = build("llama", tmp_path / "m"), build("llama", tmp_path / "other", seed=1)
    before = loaded(folder)
    with engine(before, tmp_path / "s", keep_state=True, format="exact") as harness:
        harness.ask(PROMPT, max_tokens=5, session="kept")
    change(folder / "model.safetensors", (other / "model.safetensors").read_bytes())
    after = loaded(folder)
    assert after.fingerprint != before.fingerprint
    assert after.identity != before.identity
    with engine(after, tmp_path / "s", format="exact") as harness:
        tokens = harness.ask(PROMPT, max_tokens=5, ignore_eos=True)
        assert harness.done().usage.cached_tokens == 0
    assert tokens == greedy(reference(other), PROMPT, 5)


def test_packed_weights_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    before = loaded(folder, "int8")
    [packed] = (tmp_path / "cache" / "models").iterdir()
    data = bytearray(packed.read_bytes())
    data[-100] ^= 1
    overwrite(packed, bytes(data))
    after = loaded(folder, "int8")
    assert after.fingerprint != before.fingerprint
    assert after.identity == before.identity


def test_weights_that_change_while_they_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = build("llama", tmp_path / "m"), build("llama", tmp_path / "other", seed=1)

    def load_then_change(*arguments: str) -> object:
        module = load_module(folder, *arguments[1:])
        replace(folder / "model.safetensors", (other / "model.safetensors").read_bytes())
        return module

    monkeypatch.setattr(model, "load_module", load_then_change)
    with pytest.raises(CorruptModel, match="changed while it was loaded"):
        loaded(folder)


def test_identity_is_of_weights_and_tokenizer(tmp_path: Path) -> None:
    folder, cache = build("llama", tmp_path / "m"), tmp_path / "cache"
    first = identify(str(folder), cache)
    assert len(first) == 16
    cast = resolve(str(folder), cache, "bfloat16")
    same = load(cast, "bfloat16", cache=cache, identity=identify(str(folder), cache))
    assert same.identity == loaded(folder).identity == first
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert identify(str(folder), cache) == first
    tokenizer = folder / "tokenizer.json"
    vocabulary = json.loads(tokenizer.read_text())
    vocabulary["model"]["vocab"] |= {"a": 70, "b": 69}
    tokenizer.write_text(json.dumps(vocabulary))
    assert identify(str(folder), cache) != first
