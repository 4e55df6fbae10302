"""Tests that need the fake driver run in a process of their own: once loaded, a driver stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..emulator import Unavailable
from .compiler import compile_driver


def run_tests(file: Path, cache: Path, *options: str) -> str:
    """Run the tests of a file in a process that finds the fake libcuda.so.1; what pytest printed."""
    pytest.importorskip("cuda.core")
    try:
        folder = compile_driver(cache / "emulator")
    except Unavailable as error:
        pytest.skip(str(error))
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    return done.stdout
