"""The engine with `device = "cuda"` over the fake driver; run by test_device_engine.py in its own process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spilld.attention.device.tier import has_flash
from spilld.cli.cubins import kernels
from spilld.cuda_ext.device.cuda import CudaDevice
from spilld.cuda_ext.memory.windows import KVWindowShape
from spilld.errors import BudgetError, ConfigError, DeviceUnusable
from spilld.models.model import Model
from spilld.offload.record import Element, Format, Layout

from ..cuda_ext.conftest import Emulate, emulate
from ..cuda_ext.driver import FakeDriver
from ..cuda_ext.fake import FakeDevice
from .harness import engine
from .test_device_engine import SETTINGS, answers, model

__all__ = ["emulate", "model"]


@pytest.fixture
def driver(model: Model, emulate: Emulate) -> FakeDriver:
    """A GPU whose kernels are those of the model, emulated."""
    sizes = model.geometry.sizes
    layout = Layout(Format.K8V4, Element.FLOAT32, sizes.kv_heads, sizes.head_dim)
    driver = FakeDriver(FakeDevice(5), {k.name: emulate(k.source, dict(k.defines)) for k in kernels(layout)})
    driver.connect()
    return driver


def test_the_tokens_are_the_cpus(driver: FakeDriver, model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "cpu", **SETTINGS) as harness:
        wanted = answers(harness)
    with engine(model, tmp_path / "cuda", device="cuda", device_budget="20 MiB", **SETTINGS) as harness:
        assert answers(harness) == wanted
        assert driver.device.registered
    driver.assert_empty()


def test_a_torch_without_flash_attention_leaves_prompts_to_our_kernels(
    driver: FakeDriver, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that claims to find the GPU and cannot work there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device, shape = CudaDevice(), KVWindowShape.uniform(64, 1, 1, 64, torch.bfloat16)
    assert not has_flash(device, shape, model.geometry)
    assert "does not run here" in caplog.text
    device.close()
    driver.assert_empty()


def test_a_budget_that_is_too_small(driver: FakeDriver, model: Model, tmp_path: Path) -> None:
    for budget, error in ((None, ConfigError), ("1 MiB", BudgetError)):
        with (
            pytest.raises(error, match=r"device.budget"),
            engine(model, tmp_path, device="cuda", device_budget=budget, **SETTINGS),
        ):
            pass
    driver.assert_empty()


def test_a_machine_without_a_gpu(driver: FakeDriver, model: Model, tmp_path: Path) -> None:
    driver.gpus = 0
    with (
        pytest.raises(DeviceUnusable, match="nvidia-smi"),
        engine(model, tmp_path, device="cuda", device_budget="20 MiB", **SETTINGS),
    ):
        pass
