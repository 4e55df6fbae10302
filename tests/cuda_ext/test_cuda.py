"""CudaDevice over the fake driver, and without any."""

from __future__ import annotations

from pathlib import Path

import pytest

from spilld.cuda_ext.compile import build
from spilld.cuda_ext.device.cuda import CudaDevice

from .driver.process import run_tests


def test_cuda_over_the_fake_driver(cache_folder: Path) -> None:
    run_tests(Path(__file__).with_name("under_driver.py"), cache_folder)


def test_without_a_driver() -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver here")
    pytest.importorskip("cuda.bindings")
    with pytest.raises(build.DriverMissing, match=r"libcuda\.so\.1"):
        CudaDevice()
