"""The warm-up: a daemon that is ready has computed, and nothing of that is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spilld.__main__ import main
from spilld.kv.attention_span import BLOCK
from spilld.kv.batch import BatchItem
from spilld.models.model import Model, load
from spilld.monitoring.sd_notify import Notifier
from spilld.offload.kernels.codec.codec import Codec
from spilld.runner.runner import Runner

from .harness import engine, one_thread, shared, smallest_host_budget, some_tokens, window_bytes
from .tiny_models import FAMILIES

LENGTH = 700


def model_of(kind: str, factory: pytest.TempPathFactory) -> Model:
    """A family's tiny model, or one whose steps read packed weights."""
    if kind != "packed":
        return shared(factory, kind)
    plain = shared(factory, "llama")
    return load(plain.folder, "float32", cache=plain.folder / "cache", weights="int8")


@pytest.mark.parametrize("kind", ["packed", *FAMILIES])
def test_it_computes_and_leaves_nothing(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = model_of(kind, tmp_path_factory), "int8" if kind == "packed" else "bf16"
    prompt = some_tokens(3, LENGTH)
    sealed: list[int] = []
    with engine(model, tmp_path / "cold", weights=weights) as cold:
        wanted = cold.ask(prompt, max_tokens=8, ignore_eos=True)
    seal = Codec.seal

    def noted(codec: Codec, k: Any, v: Any, records: Any, rows: Any) -> None:
        sealed.append(len(rows))
        seal(codec, k, v, records, rows)

    with engine(model, tmp_path / "warm", weights=weights) as warm:
        before = warm.engine.stats()
        monkeypatch.setattr(Codec, "seal", noted)
        warm.engine.warm_up()
        layers = len(model.geometry.layers)
        assert sealed == [3] * layers, "a cell, the sinks excepted"
        assert warm.engine.progress == 2 * layers, "a chunk and a token"
        assert warm.engine.stats() == before
        assert warm.events == {}
        warm.engine.check_integrity()
        assert warm.ask(prompt, max_tokens=8, ignore_eos=True) == wanted
        warm.engine.warm_up()
        assert warm.ask([0] * LENGTH, max_tokens=1) is not None
        assert warm.done().usage.cached_tokens == 0, "what it computed is no beginning of anything"


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_it_needs_no_more_than_a_request(
    chunk: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of host memory, windows, and the rows of a step."""
    model = model_of("packed", tmp_path_factory)
    with engine(
        model,
        tmp_path / "s",
        weights="int8",
        chunk_tokens=chunk,
        device_budget=window_bytes(model),
        host_budget=smallest_host_budget(model, chunk=chunk + BLOCK - 1),
        disk_budget=0,
    ) as harness:
        harness.engine.warm_up()
        harness.engine.check_integrity()


def test_one_that_fails_gives_everything_back(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = model_of("llama", tmp_path_factory), Runner.run

    def fails_later(runner: Runner, items: list[BatchItem], keep: Any) -> Any:
        if items[0].count == 1:
            raise MemoryError("no room for a token")
        return run(runner, items, keep)

    with engine(model, tmp_path / "s") as harness:
        monkeypatch.setattr(Runner, "run", fails_later)
        with pytest.raises(MemoryError):
            harness.engine.warm_up()
        monkeypatch.undo()
        harness.engine.check_integrity()
        assert len(harness.ask(some_tokens(4, 30), max_tokens=3, ignore_eos=True)) == 3


def test_one_that_fails_ends_the_start(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = model_of("llama", tmp_path_factory)
    told: list[str] = []

    def fails(*_: object) -> None:
        raise MemoryError("no room for a step")

    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # serve would set it for good
    monkeypatch.setattr("spilld.monitoring.logs.set_up", lambda *_: None)
    monkeypatch.setattr(Runner, "run", fails)
    monkeypatch.setattr(Notifier, "_send", lambda _, state: told.append(state))
    places = (f"--state={tmp_path}/state", f"--cache={model.folder}/cache", f"--listen=ipc://{tmp_path}/s")
    with one_thread():
        assert main(["serve", f"--model={model.folder}", "--dtype=float32", "--threads=1", *places]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("spilld: the engine cannot compute: MemoryError('no room for a step')")
    assert told[-1].startswith("STATUS=warming up")
    assert not any("READY" in state for state in told)
    monkeypatch.undo()
    with engine(model, tmp_path / "state") as harness:  # nothing holds the folder any more
        harness.engine.warm_up()
