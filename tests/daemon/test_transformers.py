"""Format exact in float32 gives plain transformers' greedy tokens on real weights, however KV is split."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from spilld.demo.plain_transformers import greedy
from spilld.models.model import Model, load

from .harness import column_bytes, engine, random_split

COUNT = 24


@cache
def document(model: Model, length: int) -> tuple[int, ...]:
    return tuple(model.tokenizer.encode("".join(topics[name] for name in sorted(topics)))[:length])


def wanted(model: Model, length: int, cache_folder: Path) -> list[int]:
    """What transformers answers: computed once per machine and version, as models are converted once."""
    prompt = document(model, length)
    question = [model.fingerprint.hex(), version("torch"), version("transformers"), prompt, COUNT]
    known = cache_folder / "tests" / f"{hashlib.sha256(json.dumps(question).encode()).hexdigest()}.json"
    if not known.exists():
        tokens = greedy(model.folder, "float32", prompt, COUNT, threads=1).tokens
        known.parent.mkdir(parents=True, exist_ok=True)
        known.with_suffix(f".{os.getpid()}").write_text(json.dumps(tokens))
        known.with_suffix(f".{os.getpid()}").replace(known)
    found: list[int] = json.loads(known.read_text())
    return found


@pytest.fixture(scope="module")
def smollm2(smollm2_float32: Path) -> Model:
    return load(smollm2_float32, "float32")


@pytest.fixture(scope="module")
def gemma3(gemma3_float32: Path) -> Model:
    return load(gemma3_float32, "float32")


def cases(usual: int) -> list[Any]:
    """Ways to split KV; all but one are left to `make test-slow`: test_engine splits tiny models in many."""
    return [pytest.param(split, marks=() if split == usual else pytest.mark.slow) for split in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("split", [1, 2, 3])
def test_smollm2_in_the_window(smollm2: Model, cache_folder: Path, tmp_path: Path, split: int) -> None:
    check(smollm2, cache_folder, tmp_path, 512, split)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("split", cases(3))
def test_smollm2_on_disk(smollm2: Model, cache_folder: Path, tmp_path: Path, split: int) -> None:
    check(smollm2, cache_folder, tmp_path, 1664, split)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("split", [1, 2, 3])
def test_smollm2_long(smollm2: Model, cache_folder: Path, tmp_path: Path, split: int) -> None:
    check(smollm2, cache_folder, tmp_path, 7500, split)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("split", cases(2))
def test_gemma3(gemma3: Model, cache_folder: Path, tmp_path: Path, split: int) -> None:
    check(gemma3, cache_folder, tmp_path, 1664, split)


def check(model: Model, cache_folder: Path, tmp_path: Path, length: int, split: int) -> None:
    """Host memory for a part of the KV only, whose blocks leave in random runs."""
    host = max(17, length // 64 // (split + 2)) * column_bytes(model, "exact")
    prompt = document(model, length)
    with engine(
        model, tmp_path / "s", random_split(split), format="exact", host_budget=host, disk_budget="4GiB"
    ) as harness:
        found = harness.ask(prompt, max_tokens=COUNT, ignore_eos=True)
        usage = harness.done().usage
        assert found == wanted(model, length, cache_folder)
        if length > 17 * 64 + 512:
            assert usage.kv_bytes["disk"] > 0
            assert usage.read_bytes["disk"] > 0
