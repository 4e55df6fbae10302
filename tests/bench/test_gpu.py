"""The benchmarks that nobody here can run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import gpu
import gpu_copies
import pytest

from ..cuda_ext.driver.process import run_tests


@pytest.mark.slow
def test_over_the_fake_driver(cache_folder: Path) -> None:
    run_tests(Path(__file__).with_name("gpu_under_driver.py"), cache_folder)


@pytest.mark.parametrize("bench", [gpu, gpu_copies])
def test_without_a_gpu(bench: ModuleType) -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver here")
    done = subprocess.run([sys.executable, str(bench.__file__)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU to measure: ")
