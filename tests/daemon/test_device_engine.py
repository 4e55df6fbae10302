"""The whole engine on the fake device: the tokens are those of the CPU, in any order of the device's work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spilld import assembly
from spilld.assembly import build_engine, welcome
from spilld.config.config import Config
from spilld.engine.service import EngineService
from spilld.kv.attention_span import CELL
from spilld.models.model import Model, load
from spilld.protocol.messages import Generate, Reply

from ..cuda_ext.conftest import Emulate, emulate
from ..cuda_ext.driver.process import run_tests
from ..cuda_ext.fake import FakeDevice
from .fake_device import tier_of
from .harness import CLIENT, Harness, engine, one_thread, shared, some_tokens

__all__ = ["emulate"]

Tokens = dict[str, list[int]]
Wanted = Callable[[str], Tokens]
PROMPTS = {"long": some_tokens(1, 640), "short": some_tokens(2, 90)}
ANSWER = 8
SETTINGS: dict[str, Any] = {"chunk_tokens": 128, "disk_floor": 0}
ON_GPU: dict[str, Any] = {**SETTINGS, "device": "cuda", "device_budget": "256 MiB"}
FORMS = ["exact", "k8v4", "int4"]

ROUNDED = 0.05
"""Nats between two computations in bfloat16, in the mean."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    return shared(tmp_path_factory, "llama", num_hidden_layers=2, **heads)


@pytest.fixture(scope="module")
def wanted(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokens]:
    """The CPU's tokens, by format."""

    @cache
    def tokens(form: str) -> Tokens:
        with engine(model, tmp_path_factory.mktemp("cpu"), format=form, **SETTINGS) as harness:
            return answers(harness)

    return tokens


def answers(harness: Harness) -> Tokens:
    for name, prompt in PROMPTS.items():
        harness.add(name, prompt, max_tokens=ANSWER)
    harness.run()
    return {name: harness.tokens(name) for name in PROMPTS}


@pytest.mark.parametrize(
    ("hot", "form", "flash"), [(0, "exact", False), (5, "k8v4", True), (100, "int4", False)]
)
def test_the_tokens_are_the_cpus(
    hot: int, form: str, flash: bool, model: Model, wanted: Wanted, tmp_path: Path, emulate: Emulate
) -> None:
    device = FakeDevice(hot)
    tier = tier_of(device, emulate, hot=hot, windows=2, flash=flash)
    with engine(model, tmp_path, tier=tier, format=form, **SETTINGS) as harness:
        assert answers(harness) == wanted(form)
        stats = harness.engine.stats()
        assert 0 < int(str(stats["device_used_bytes"])) <= int(str(stats["device_budget_bytes"]))
        assert (device.computed > 0) == flash
    device.assert_empty()


def sealing(harness: Harness, device: FakeDevice) -> None:
    """Run the long prompt up to the step that seals."""
    harness.add("long", PROMPTS["long"], max_tokens=ANSWER)
    while harness.engine.stats()["computed_tokens"] != 2 * CELL:
        harness.engine.turn()


@pytest.mark.parametrize("calls", [3, 20, 44])
def test_memory_that_ends_changes_no_token(
    calls: int, model: Model, wanted: Wanted, tmp_path: Path, emulate: Emulate
) -> None:
    """Whatever call in the step that seals finds no memory: what was lost is computed again."""
    device = FakeDevice(calls)
    tier = tier_of(device, emulate, hot=3, windows=2)
    with engine(model, tmp_path, tier=tier, format="exact", **SETTINGS) as harness:
        sealing(harness, device)
        device.fail_at = device.calls + calls
        harness.run()
        assert device.fail_at == 0
        assert harness.tokens("long") == wanted("exact")["long"]
    device.assert_empty()


def test_a_lost_device_loses_no_request(
    model: Model, wanted: Wanted, tmp_path: Path, emulate: Emulate
) -> None:
    """The next process, here one without a device, computes it again; what was sealed by a step that did not
    end is nobody's, though the client cancels and sends its request once more."""
    device = FakeDevice(3)
    tier = tier_of(device, emulate, windows=2)
    config = Config.load(None, {"state": str(tmp_path), "dtype": "float32", "format": "exact", **SETTINGS})
    lost = threading.Event()
    posted: list[Reply] = []
    with one_thread():
        service = EngineService(
            lambda post: build_engine(config, model, post, tier=tier),
            lambda _client, event: posted.append(event),
            welcome(config, model),
            4,
            lost.set,
        )
        device.lose_at = device.calls + 124
        service.start()
        service.submit(CLIENT, Generate(request_id="long", prompt=tuple(PROMPTS["long"]), max_tokens=ANSWER))
        assert lost.wait(60)
        service.cancel("long")
        assert service.lost is not None
        assert service.stop() <= {"long"}
    with engine(model, tmp_path, format="exact", **SETTINGS) as harness:
        for left in harness.engine.left_behind():
            harness.engine.restore(left)
        harness.run()
        for again in ("once", "twice"):
            assert harness.ask(PROMPTS["long"], again, max_tokens=ANSWER) == wanted("exact")["long"]


def test_an_engine_that_cannot_be_made_leaves_nothing_open(
    model: Model, tmp_path: Path, emulate: Emulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("weights of another size")

    device, tried = FakeDevice(1), tmp_path / "s"
    with monkeypatch.context() as patched:
        patched.setattr(assembly, "Runner", fails)
        with (
            pytest.raises(ValueError, match="of another size"),
            engine(model, tried, tier=tier_of(device, emulate), **SETTINGS),
        ):
            pass
    device.assert_empty()
    with engine(model, tried, **SETTINGS) as harness:
        assert len(harness.ask(PROMPTS["short"], max_tokens=1)) == 1


def loaded(model: Model, dtype: str, device: str) -> Model:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this torch finds no GPU")
    return load(model.folder, dtype, cache=model.folder / "cache", device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights_on", ["cpu", "cuda"])
def test_the_tokens_on_a_gpu_are_the_cpus(
    weights_on: str, form: str, model: Model, wanted: Wanted, tmp_path: Path
) -> None:
    model = loaded(model, "float32", weights_on)
    with engine(model, tmp_path, format=form, **ON_GPU) as harness:
        assert answers(harness) == wanted(form)


def prompt_logprobs(harness: Harness) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of every token of the long prompt but the first."""
    harness.ask(PROMPTS["long"], max_tokens=1, prompt_logprobs=0)
    return np.array([entry.logprob for entry in harness.done().prompt_logprobs or ()][1:], np.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights_on", ["cpu", "cuda"])
def test_logprobs_on_a_gpu_are_the_cpus_but_for_bfloat16(
    weights_on: str, form: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """By tensor cores, and with weights on the GPU by torch's flash attention, over several heads."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    tiny = shared(tmp_path_factory, "llama", num_hidden_layers=2, **heads)
    with engine(loaded(tiny, "bfloat16", "cpu"), tmp_path / "cpu", format=form, **SETTINGS) as harness:
        cpus = prompt_logprobs(harness)
    with engine(loaded(tiny, "bfloat16", weights_on), tmp_path / "gpu", format=form, **ON_GPU) as harness:
        gpus = prompt_logprobs(harness)
    print(f"{form}, weights on {weights_on}: mean {np.abs(gpus - cpus).mean():.2g}")
    assert np.abs(gpus - cpus).mean() < ROUNDED


def test_the_engine_over_the_fake_driver(cache_folder: Path) -> None:
    run_tests(Path(__file__).with_name("engine_under_driver.py"), cache_folder)
