"""The contract of a device, on a real GPU: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spilld.cuda_ext.cuda import CudaDevice
from spilld.cuda_ext.device import Kernel

from .cubins import compiled
from .device_contract import TURN_BYTES, DeviceContract
from .kernels import assert_close
from .tier import ATTEND, TOLERANCE, Step, problem

SHIFT = Path(__file__).parent / "shift.cu"

pytestmark = pytest.mark.gpu


class TestGpu(DeviceContract):
    @pytest.fixture
    def device(self) -> Iterator[CudaDevice]:
        device = CudaDevice()
        yield device
        device.close()

    @pytest.fixture
    def shift(self, device: CudaDevice) -> Kernel:
        return device.load(compiled(SHIFT, device.architecture), "shift")

    @pytest.fixture
    def turn(self, device: CudaDevice) -> Kernel:
        return device.load(compiled(SHIFT, device.architecture), "turn", shared_bytes=TURN_BYTES)

    def test_attention_over_the_pool(self, device: CudaDevice, cache_folder: Path) -> None:
        step, records = Step(device, device.compiled(ATTEND, cache_folder / "cubins")), problem()
        assert_close(step.attend(records), records.oracle(), TOLERANCE)
        step.close()
