"""The emulator, compiled once for each kernel and its constants, and kept between runs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from spilld.cuda_ext.device import Kernel
from spilld.cuda_ext.ops import Load
from spilld.cuda_ext.variant import Variant

from .emulator import Emulated, Unavailable, compile_kernel
from .fake import FakeDevice

Emulate = Callable[[Path, Mapping[str, int | str]], Emulated]


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
