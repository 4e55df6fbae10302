"""The whole engine on the fake device: the tokens are those of the CPU, in any order of the device's work."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from spilld.cuda_ext.errors import LaunchFailed
from spilld.daemon.model import Model

from ..cuda_ext.conftest import Emulate, emulate
from ..cuda_ext.driver.process import run_tests
from ..cuda_ext.fake import FakeDevice
from .fake_device import tier_of
from .harness import Harness, engine, shared, some_tokens

__all__ = ["emulate"]

Tokens = dict[str, list[int]]
Wanted = Callable[[str], Tokens]
PROMPTS = {"long": some_tokens(1, 640), "short": some_tokens(2, 90)}
ANSWER = 8
SETTINGS: dict[str, Any] = {"chunk_tokens": 128, "disk_floor": 0}


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


@pytest.mark.parametrize(("hot", "form"), [(0, "exact"), (5, "k8v4"), (100, "int4")])
def test_the_tokens_are_the_cpus(
    hot: int, form: str, model: Model, wanted: Wanted, tmp_path: Path, emulate: Emulate
) -> None:
    device = FakeDevice(hot)
    tier = tier_of(device, emulate, hot=hot, windows=2)
    with engine(model, tmp_path, tier=tier, format=form, **SETTINGS) as harness:
        assert answers(harness) == wanted(form)
        stats = harness.engine.stats()
        assert 0 < int(str(stats["device_used_bytes"])) <= int(str(stats["device_budget_bytes"]))
    device.assert_empty()


@pytest.mark.parametrize("seed", range(4))
def test_memory_that_ends_changes_no_token(
    seed: int, model: Model, wanted: Wanted, tmp_path: Path, emulate: Emulate
) -> None:
    """Whatever call fails for want of memory: what was lost is computed again."""
    device = FakeDevice(seed)
    with engine(
        model, tmp_path, tier=tier_of(device, emulate, windows=2), format="exact", **SETTINGS
    ) as harness:
        device.fail_at = device.calls + 40 * seed * seed + 3
        assert answers(harness) == wanted("exact")
        assert device.fail_at == 0
    device.assert_empty()


def test_a_lost_device_loses_no_request(
    model: Model, wanted: Wanted, tmp_path: Path, emulate: Emulate
) -> None:
    """The next process, here one without a device, computes it again."""
    device = FakeDevice(3)
    tier = tier_of(device, emulate, windows=2)
    with engine(model, tmp_path, tier=tier, keep_state=True, format="exact", **SETTINGS) as harness:
        harness.add("long", PROMPTS["long"], max_tokens=ANSWER)
        device.lose_at = device.calls + 300
        with pytest.raises(LaunchFailed):
            harness.run()
        assert harness.engine.suspend(saving=False) == {"long"}
    with engine(model, tmp_path, format="exact", **SETTINGS) as harness:
        for left in harness.engine.left_behind():
            harness.engine.restore(left)
        harness.resume("long")
        harness.run()
        assert harness.tokens("long") == wanted("exact")["long"]


@pytest.mark.gpu
def test_the_tokens_on_a_gpu_are_the_cpus(model: Model, wanted: Wanted, tmp_path: Path) -> None:
    settings = {**SETTINGS, "format": "exact", "device": "cuda", "device_budget": "256 MiB"}
    with engine(model, tmp_path, **settings) as harness:
        assert answers(harness) == wanted("exact")


def test_the_engine_over_the_fake_driver(cache_folder: Path) -> None:
    run_tests(Path(__file__).with_name("engine_under_driver.py"), cache_folder)
