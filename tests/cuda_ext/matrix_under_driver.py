"""The matrix as a GPU runs it, over the fake driver; run by test_on_gpu.py in a process that has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spilld.cuda_ext.compile.variant import Variant
from spilld.cuda_ext.device.cuda import CudaDevice

from .conftest import Emulate
from .driver import FakeDriver
from .fake import FakeDevice
from .on_gpu import OnGpu
from .test_matrix_gpu import Load, test_kernel

__all__ = ["test_kernel"]


@pytest.fixture
def load(emulate: Emulate, cache_folder: Path) -> Iterator[Load]:
    driver = FakeDriver(FakeDevice(), {})
    driver.connect()
    device = CudaDevice()

    def loaded(made: Variant) -> OnGpu:
        driver.kernels = {made.name: emulate(made.source, dict(made.defines))}
        return OnGpu(device, device.compiled(made, cache_folder / "cubins"))

    yield loaded
    device.close()
    driver.assert_empty()
