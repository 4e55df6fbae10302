"""Weights on a GPU: when they are there, the whole engine with them, and what happens when the GPU fails."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from spilld.assembly import build_engine, load_model, welcome
from spilld.attention.device.tier import has_flash
from spilld.cli import doctor
from spilld.config.config import Config
from spilld.cuda_ext.device.cpu import CpuDevice
from spilld.cuda_ext.device.tensors import gpu_errors
from spilld.cuda_ext.errors import LaunchFailed, OutOfMemory
from spilld.cuda_ext.memory.windows import KVWindowShape
from spilld.engine.service import EngineService
from spilld.errors import DeviceUnusable, Overloaded
from spilld.models.model import Model, load
from spilld.protocol.messages import Generate, Reply, Token
from spilld.runner.placement import place

from ..cuda_ext.conftest import Emulate, emulate
from ..cuda_ext.fake import FakeDevice
from .elsewhere import GPU, Elsewhere, Gpu
from .fake_device import tier_of
from .harness import CLIENT, changed, engine, one_thread, shared, some_tokens

__all__ = ["emulate"]

PROMPTS = {"long": some_tokens(1, 530), "short": some_tokens(2, 20)}
FIELDS: dict[str, Any] = {"max_tokens": 3, "ignore_eos": True}
SETTINGS: dict[str, Any] = {"chunk_tokens": 128, "disk_floor": 0, "format": "exact"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    return shared(tmp_path_factory, "llama", num_hidden_layers=1, **heads)


@pytest.mark.parametrize(
    ("device", "weights", "finds", "built", "wanted", "says"),
    [
        ("cuda", "auto", True, "13.0", "cuda", ""),
        ("cuda", "bf16", True, "13.0", "cuda", ""),
        ("cuda", "int8", True, "13.0", "cpu", ""),
        ("cuda", "int4", True, "13.0", "cpu", ""),
        ("cuda", "auto", False, None, "cpu", "built without CUDA"),
        ("cuda", "bf16", False, None, "cpu", "built without CUDA"),
        ("cuda", "auto", False, "13.0", "cpu", "finds no GPU"),
        ("cuda", "int4", False, None, "cpu", ""),
        ("cpu", "auto", True, "13.0", "cpu", ""),
        ("cpu", "bf16", False, None, "cpu", ""),
    ],
)
def test_where_weights_lie(
    device: str,
    weights: str,
    finds: bool,
    built: str | None,
    wanted: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: finds)
    monkeypatch.setattr(torch.version, "cuda", built)
    placement = place(Config.load(None, {"device": device, "weights": weights}))
    assert placement.device == wanted
    assert (says in placement.missing) if says else not placement.missing


@pytest.mark.parametrize(
    ("finds", "dtype", "runs", "changes", "wanted"),
    [
        (True, torch.bfloat16, True, {}, True),
        (True, torch.bfloat16, False, {}, False),
        (True, torch.float32, True, {}, False),
        (False, torch.bfloat16, True, {}, False),
        (True, torch.bfloat16, True, {"softcap": 5.0}, False),
        (True, torch.bfloat16, True, {"sliding_windows": (100, 100)}, False),
        (True, torch.bfloat16, True, {"sliding_windows": (100, None)}, True),
    ],
)
def test_where_prompts_take_flash_attention(
    finds: bool,
    dtype: torch.dtype,
    runs: bool,
    changes: dict[str, Any],
    wanted: bool,
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    device, shape = (
        CpuDevice(),
        KVWindowShape.uniform(tokens=64, layers=1, kv_heads=1, head_dim=64, dtype=dtype),
    )

    def refuses(*_: object) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: finds)
    if not runs:
        monkeypatch.setattr(device, "compute", refuses)
    assert has_flash(device, shape, changed(model.geometry, **changes)) == wanted
    assert ("no kernel image" in caplog.text) is not runs


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (torch.OutOfMemoryError("full"), None, OutOfMemory),
        (torch.AcceleratorError("CUDA error: out of memory"), 2, OutOfMemory),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), 700, LaunchFailed),
        (torch.AcceleratorError("of another torch"), None, LaunchFailed),
    ],
)
def test_what_torchs_errors_mean(error: Exception, code: int | None, kind: type[Exception]) -> None:
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]
    with pytest.raises(kind, match=str(error)), gpu_errors():
        raise error


@pytest.mark.parametrize("finds", [False, True])
def test_the_configured_model_is_loaded_there(
    finds: bool, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log says why if it is not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: finds)
    monkeypatch.setattr(torch.version, "cuda", "13.0" if finds else None)
    settings = {"model": str(model.folder), "cache": str(model.folder / "cache"), "dtype": "float32"}
    with Gpu():
        loaded = load_model(Config.load(None, {**settings, "device": "cuda"}))
    assert {isinstance(x, Elsewhere) for x in (*loaded.module.parameters(), *loaded.module.buffers())} == {
        finds
    }
    assert loaded.fingerprint == model.fingerprint
    assert ("built without CUDA" in caplog.text) is not finds


def test_codes_are_not_used_on_a_gpu(model: Model) -> None:
    """Where the CPU would have some for the same weights."""
    cache = model.folder / "cache"
    assert load(model.folder, "float32", cache=cache, weights="int8").packed
    with Gpu():
        assert load(model.folder, "float32", cache=cache, weights="int8", device="cuda").packed is None


def test_what_doctor_says(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(name: object) -> doctor.Finding:
        config = Config.load(None, {"model": str(name), "device": "cuda"})
        return doctor.weights(config, place(config))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in says(model.folder).advice
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    taken = 2 * sum(x.numel() for x in model.module.parameters()) / doctor.MIB
    found = says(model.folder)
    assert f"on the GPU: {taken:.1f} MiB" in found.found
    assert "device_budget" in found.found
    assert "2 bytes a parameter" in says("smollm2-135m").found
    assert "no .safetensors" in says(tmp_path).advice


def test_a_gpu_that_does_not_take_them(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 8 GiB")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(DeviceUnusable, match=r'tried to allocate 8 GiB.* weights = "int4"'):
        load(model.folder, "float32", cache=model.folder / "cache", device="cuda")


def test_what_stands_for_a_gpu_refuses_what_one_does() -> None:
    with Gpu():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert (
            there.device == here.to("cuda:0").device == torch.tensor([1], device=there.device).device == GPU
        )
        for mixed in (lambda: there + here, lambda: here.mul_(there), lambda: torch.stack([here, there])):
            with pytest.raises(RuntimeError, match="on one device"):
                mixed()  # type: ignore[no-untyped-call]
        with pytest.raises(TypeError, match="host memory first"):
            there.numpy()
        here[1:] = (there + 1)[1:]
        assert here.tolist() == [1, 2, 2]
        assert type(there.cpu()) is torch.Tensor


def answers(model: Model, state: Path, **options: Any) -> dict[str, list[int]]:
    with engine(model, state, **options, **SETTINGS) as harness:
        for name, prompt in PROMPTS.items():
            harness.add(name, prompt, **FIELDS)
        harness.run()
        return {name: harness.tokens(name) for name in PROMPTS}


def test_the_tokens_are_the_cpus(model: Model, tmp_path: Path, emulate: Emulate) -> None:
    device = FakeDevice(7)
    with Gpu():
        there = load(model.folder, "float32", cache=model.folder / "cache", device="cuda")
        found = answers(there, tmp_path / "gpu", tier=tier_of(device, emulate, hot=5, windows=2))
    assert found == answers(model, tmp_path / "cpu")
    device.assert_empty()


@contextmanager
def failing(model: Model, error: Callable[[], Exception], calls: range) -> Iterator[list[Any]]:
    """The last layer fails in these of its calls. What it was given then, weakly."""
    given: list[Any] = []
    count = 0

    def hook(_module: object, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal count
        count += 1
        if count in calls:
            given.append(weakref.ref(arguments[0]))
            raise error()

    handle = model.module.model.layers[-1].mlp.register_forward_pre_hook(hook)
    try:
        yield given
    finally:
        handle.remove()


def full() -> Exception:
    return torch.OutOfMemoryError("tried to allocate 2 GiB")


@pytest.mark.parametrize("call", [1, 5, 7])
def test_memory_that_ends_changes_no_token(call: int, model: Model, tmp_path: Path) -> None:
    """In a chunk, in the chunk that ends a prompt, in a decode step; nothing of that step stays in memory."""
    wanted = answers(model, tmp_path / "wanted")
    gc.disable()
    try:
        with failing(model, full, range(call, call + 1)) as given:
            assert answers(model, tmp_path) == wanted
        assert [activations() for activations in given] == [None]
    finally:
        gc.enable()


def test_memory_that_never_suffices_fails_the_request_alone(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path, **SETTINGS) as harness:
        with failing(model, full, range(1000)), pytest.raises(Overloaded, match="tried to allocate 2 GiB"):
            harness.ask(PROMPTS["short"], "a", **FIELDS)
        assert len(harness.ask(PROMPTS["short"], "b", **FIELDS)) == FIELDS["max_tokens"]


@pytest.mark.parametrize("call", [1, 2])
def test_memory_that_does_not_suffice_for_a_chunk_or_a_token_ends_the_start(
    call: int, model: Model, tmp_path: Path
) -> None:
    config = Config.load(None, {"state": str(tmp_path), "dtype": "float32", **SETTINGS})
    service = EngineService(
        lambda post: build_engine(config, model, post),
        lambda _client, _event: None,
        welcome(config, model),
        4,
        lambda: None,
    )
    with (
        one_thread(),
        failing(model, full, range(call, call + 1)),
        pytest.raises(DeviceUnusable, match=r"tried to allocate 2 GiB.*lower device_budget"),
    ):
        service.warm_up()
    with engine(model, tmp_path, **SETTINGS) as harness:  # nothing holds the folder any more
        harness.engine.warm_up()


def test_a_gpu_that_fails_is_a_lost_device(model: Model, tmp_path: Path) -> None:
    """Nothing of the step is served or saved; the next process goes on with the request."""
    wanted = answers(model, tmp_path / "wanted")["long"]
    config = Config.load(None, {"state": str(tmp_path), "dtype": "float32", **SETTINGS})
    lost, posted = threading.Event(), list[Reply]()
    with (
        one_thread(),
        failing(model, lambda: torch.AcceleratorError("an illegal memory access"), range(6, 1000)),
    ):
        service = EngineService(
            lambda post: build_engine(config, model, post),
            lambda _client, event: posted.append(event),
            welcome(config, model),
            4,
            lost.set,
        )
        service.start()
        service.submit(CLIENT, Generate(request_id="long", prompt=tuple(PROMPTS["long"]), **FIELDS))
        lost.wait(60)
        assert service.stop() == {"long"}
        assert service.lost == "the device is lost: torch: an illegal memory access"
        assert [event.token for event in posted if isinstance(event, Token)] == wanted[:1]
    with engine(model, tmp_path, **SETTINGS) as harness:
        for left in harness.engine.left_behind():
            harness.engine.restore(left)
        harness.resume("long")
        harness.run()
        assert harness.tokens("long") == wanted
