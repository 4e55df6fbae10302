"""The emulator, compiled once for each kernel and its constants, and kept between runs; errors of a GPU."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from spilld.cuda_ext.compile.variant import Variant
from spilld.cuda_ext.device.base import Kernel
from spilld.cuda_ext.ops import Load

from .emulator import Emulated, Unavailable, compile_kernel
from .fake import FakeDevice
from .kernels import Errors

Emulate = Callable[[Path, Mapping[str, int | str]], Emulated]

ERRORS = pytest.StashKey[dict[str, list[Errors]]]()
"""Of each kernel, in the cases that it passed."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ERRORS] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Errors by kernel, and for the table of bench/device_check.py the largest of all."""
    found = {
        kernel: (max(each.largest for each in errors), sum(each.beyond > 0 for each in errors), len(errors))
        for kernel, errors in config.stash[ERRORS].items()
    }
    for kernel, (largest, beyond, count) in found.items():
        terminalreporter.line(
            f"{kernel}: error {largest:.2g} at most, {beyond} of {count} cases beyond the CPU's"
        )
    if found:
        kernel = max(found, key=lambda kernel: found[kernel][0])
        beyond = sum(each[1] for each in found.values())
        terminalreporter.line(
            f"== error {found[kernel][0]:.2g} at most ({kernel}), {beyond} cases beyond the CPU's tolerance"
        )


@pytest.fixture(scope="session")
def emulate(cache_folder: Path) -> Emulate:
    """A kernel file and what it is compiled with, ready to launch on the CPU."""
    return lambda source, defines: emulated(source, defines, cache_folder / "emulator")


def loader(device: FakeDevice, emulate: Emulate) -> Load:
    """Kernels as Ops takes them, emulated on the device."""

    def load(variant: Variant) -> Kernel:
        image = emulate(variant.source, dict(variant.defines))
        return device.load(image, variant.name, threads=variant.threads, shared_bytes=variant.shared_bytes)

    return load


def emulated(source: Path, defines: Mapping[str, int | str], cache: Path) -> Emulated:
    try:
        return Emulated(compile_kernel(source, defines, cache))
    except Unavailable as error:
        pytest.skip(str(error))
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr)
