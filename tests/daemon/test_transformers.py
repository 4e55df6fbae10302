"""Format exact in float32 gives plain transformers' greedy tokens on real weights, however KV is split."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from spilld.daemon.model import Model, load
from spilld.daemon.plain import greedy

from .harness import column_bytes, engine, random_split

COUNT = 64


@cache
def document(model: Model, length: int) -> tuple[int, ...]:
    return tuple(model.tokenizer.encode("".join(topics[name] for name in sorted(topics)))[:length])


@cache
def wanted(folder: Path, model: Model, length: int) -> list[int]:
    return greedy(folder, "float32", document(model, length), COUNT, threads=1).tokens


@pytest.fixture(scope="module")
def smollm2(smollm2_float32: Path) -> Model:
    return load(smollm2_float32, "float32")


@pytest.fixture(scope="module")
def gemma3(gemma3_float32: Path) -> Model:
    return load(gemma3_float32, "float32")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("length", "split"),
    [(512, 1), (512, 2), (512, 3), (2048, 1), (2048, 2), (2048, 3), (7500, 1)]
    + [pytest.param(7500, split, marks=pytest.mark.slow) for split in (2, 3)],
)
def test_smollm2(smollm2: Model, smollm2_float32: Path, tmp_path: Path, length: int, split: int) -> None:
    check(smollm2, smollm2_float32, tmp_path, length, split)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("split", [1, 2, 3])
def test_gemma3(gemma3: Model, gemma3_float32: Path, tmp_path: Path, split: int) -> None:
    check(gemma3, gemma3_float32, tmp_path, 2048, split)


def check(model: Model, folder: Path, tmp_path: Path, length: int, split: int) -> None:
    """Host memory for a part of the KV only, whose blocks leave in random runs."""
    host = max(17, length // 64 // (split + 2)) * column_bytes(model, "exact")
    prompt = document(model, length)
    with engine(
        model, tmp_path / "s", random_split(split), format="exact", host_budget=host, disk_budget="4GiB"
    ) as harness:
        found = harness.ask(prompt, max_tokens=COUNT, ignore_eos=True)
        usage = harness.done().usage
        assert found == wanted(folder, model, length)
        if length > 17 * 64 + 512:
            assert usage.kv_bytes["disk"] > 0
            assert usage.read_bytes["disk"] > 0
