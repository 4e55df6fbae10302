"""The contract of a device, on a real GPU: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from spilld.cuda_ext.device.base import Kernel
from spilld.cuda_ext.device.cuda import CudaDevice
from spilld.offload.record import Format

from .cubins import compiled
from .device_contract import TURN_BYTES, ComputeContract, DeviceContract
from .flash import check
from .kernels import assert_close
from .numbers import Number
from .tier import ATTEND, TOLERANCE, Step, problem

SHIFT = Path(__file__).parent / "shift.cu"

pytestmark = pytest.mark.gpu


def finds_torch() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch finds no GPU")


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

    @pytest.mark.parametrize("form", [Format.EXACT, Format.K8V4, Format.INT4])
    def test_flash_over_the_pool(self, device: CudaDevice, cache_folder: Path, form: Format) -> None:
        finds_torch()
        check(device, partial(device.compiled, cache=cache_folder / "cubins"), form, Number.BFLOAT16)


class TestTorch(ComputeContract):
    @pytest.fixture
    def device(self) -> Iterator[CudaDevice]:
        finds_torch()
        device = CudaDevice()
        yield device
        device.close()
