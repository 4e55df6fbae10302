"""The benchmarks over the fake driver, whose times mean nothing: that they run. Run by test_gpu.py."""

from __future__ import annotations

import ctypes

import device_machine
import gpu
import gpu_copies
import numpy as np

from spilld.cli.cubins import kernels
from spilld.cuda_ext.device.cpu import CpuDevice
from spilld.cuda_ext.device.cuda import CudaDevice
from spilld.offload.record import Format

from ..cuda_ext.conftest import Emulate, emulate
from ..cuda_ext.driver import FakeDriver
from ..cuda_ext.fake import FakeDevice
from ..offload import reference

__all__ = ["emulate"]


def test_what_a_gpu_is_in_a_line() -> None:
    driver = FakeDriver(FakeDevice(memory_bytes=51_200_000), {})
    driver.connect()
    said = "no GPU, sm_90, driver of CUDA 13.0, 0.1 of 0.1 GB free, pages of 65536"
    assert device_machine.gpu() == said
    driver.assert_empty()


def test_records_are_random() -> None:
    device, layout = CpuDevice(), gpu.layouts()[Format.K8V4]
    with gpu.pinned(device, layout, 5) as address:
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (5 * layout.record_bytes)).from_address(address))
        for record in memory.reshape(5, -1):
            keys, _ = reference.values(layout, record)
            assert abs(keys.std() - 1) < 0.1
    assert gpu.random(3, 4).all()


def test_every_figure_comes(emulate: Emulate) -> None:
    layout = gpu.layouts()[Format.K8V4]
    driver = FakeDriver(FakeDevice(2), {k.name: emulate(k.source, dict(k.defines)) for k in kernels(layout)})
    driver.connect()
    device = CudaDevice()
    found = gpu.measured(device, gpu.loader(device), layout, gpu.Size(blocks=4, sealed=2, calls=1))
    device.close()
    driver.assert_empty()
    numbers = {f"{form} {name}": number for form in gpu.layouts() for name, number in found.items()}
    lines = list(gpu.results(Format.K8V4, layout, numbers, numbers, 1e12))
    assert [line.case for line in lines] == ["k8v4 M=1", "k8v4 M=4", "k8v4 M=16", "k8v4", "k8v4"]
    assert all(line.ours > 0 for line in lines)


def test_copies_in_batches_and_one_by_one() -> None:
    driver = FakeDriver(FakeDevice(3), {})
    driver.connect()
    device = CudaDevice()
    found = gpu_copies.measured(device, (2, 3), calls=1)
    device.close()
    driver.assert_empty()
    limits, lines = gpu_copies.results(found)
    assert limits["fetch_bytes_s"] > 0
    assert [line.case for line in lines[:3]] == ["2 x 23 KB", "3 x 23 KB", "2 x 119 KB"]
    assert all(line.ours > 0 and line.baseline and line.limit for line in lines)
