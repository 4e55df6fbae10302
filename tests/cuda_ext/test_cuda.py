"""CudaDevice over the fake driver, in a process of its own: once loaded, a driver stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spilld.cuda_ext import build
from spilld.cuda_ext.cuda import CudaDevice

from .driver import compile_driver
from .emulator import Unavailable

UNDER_DRIVER = Path(__file__).parent / "under_driver.py"


def test_cuda_over_the_fake_driver(cache_folder: Path) -> None:
    pytest.importorskip("cuda.core")
    try:
        folder = compile_driver(cache_folder / "emulator")
    except Unavailable as error:
        pytest.skip(str(error))
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(UNDER_DRIVER)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_without_a_driver() -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver here")
    pytest.importorskip("cuda.bindings")
    with pytest.raises(build.DriverMissing, match=r"libcuda\.so\.1"):
        CudaDevice()
