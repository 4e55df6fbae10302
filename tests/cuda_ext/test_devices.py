"""The contract of a device, for the CPU and for the fake; and what only the fake is for."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spilld.cuda_ext.device.base import Copy, Kernel, Stream
from spilld.cuda_ext.device.cpu import CpuDevice, Function
from spilld.cuda_ext.device.tensors import Array
from spilld.cuda_ext.errors import LaunchFailed, OutOfMemory

from .conftest import Emulate
from .device_contract import TURN_BYTES, ComputeContract, DeviceContract, Host, fill
from .emulator import Emulated
from .fake import FakeDevice, Fault

SHIFT = Path(__file__).parent / "shift.cu"


def floats(address: int, count: int) -> NDArray[np.float32]:
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


def shift_here(grid: tuple[int, int, int], out: int, source: int, count: int, by: float) -> None:
    floats(out, count)[:] = floats(source, count) + np.float32(by)


def turn_here(grid: tuple[int, int, int], out: int, source: int) -> None:
    floats(out, 32 * grid[0]).reshape(-1, 32)[:] = floats(source, 32 * grid[0]).reshape(-1, 32)[:, ::-1]


HERE: Mapping[str, Function] = {"shift": shift_here, "turn": turn_here}


class TestCpu(ComputeContract, DeviceContract):
    @pytest.fixture
    def device(self) -> Iterator[CpuDevice]:
        device = CpuDevice()
        yield device
        device.close()

    @pytest.fixture
    def shift(self, device: CpuDevice) -> Kernel:
        return device.load(HERE, "shift")

    @pytest.fixture
    def turn(self, device: CpuDevice) -> Kernel:
        return device.load(HERE, "turn", shared_bytes=TURN_BYTES)


@pytest.fixture(scope="module")
def image(emulate: Emulate) -> Emulated:
    return emulate(SHIFT, {})


class TestFake(ComputeContract, DeviceContract):
    @pytest.fixture(params=range(8))
    def device(self, request: pytest.FixtureRequest) -> Iterator[FakeDevice]:
        device = FakeDevice(request.param)
        yield device
        device.close()
        device.assert_empty()

    @pytest.fixture
    def shift(self, device: FakeDevice, image: Emulated) -> Kernel:
        return device.load(image, "shift")

    @pytest.fixture
    def turn(self, device: FakeDevice, image: Emulated) -> Kernel:
        return device.load(image, "turn", shared_bytes=TURN_BYTES)


@pytest.fixture(params=range(5))
def fake(request: pytest.FixtureRequest) -> FakeDevice:
    return FakeDevice(request.param)


@pytest.fixture
def host(fake: FakeDevice) -> Host:
    return Host(fake, 16 << 10)


def test_work_without_an_event_between_is_a_fault(fake: FakeDevice, host: Host) -> None:
    address = fake.allocate(1000)
    there, back = Copy(address, host.address, 1000), Copy(host.address + 4096, address, 1000)
    fake.copy(Stream.COPY_IN, [there])
    with pytest.raises(Fault, match="copy-in still uses"):
        fake.copy(Stream.COPY_OUT, [back])
    fake.record(Stream.COPY_IN).before(Stream.COPY_OUT)
    fake.copy(Stream.COPY_OUT, [back])
    with pytest.raises(Fault, match="copy-out still uses"):  # the slot's last reader has not ended
        fake.copy(Stream.COPY_IN, [there])
    with pytest.raises(Fault, match="still uses"):
        fake.copy(Stream.COMPUTE, [there])
    fake.record(Stream.COPY_OUT).synchronise()
    fake.copy(Stream.COPY_IN, [there])
    fake.close()


def test_an_event_orders_only_what_was_given_before_it(fake: FakeDevice, host: Host) -> None:
    address = fake.allocate(1000)
    early = fake.record(Stream.COPY_IN)
    fake.copy(Stream.COPY_IN, [Copy(address, host.address, 1000)])
    early.before(Stream.COMPUTE)
    with pytest.raises(Fault, match="still uses"):
        fake.copy(Stream.COMPUTE, [Copy(host.address + 4096, address, 1000)])


def test_memory_that_work_touches_cannot_go(fake: FakeDevice, host: Host) -> None:
    address, room = fake.allocate(1000), fake.reserve(fake.page_bytes)
    fake.map(room, fake.page_bytes)
    fake.copy(Stream.COPY_IN, [Copy(address, host.address, 1000), Copy(room, host.address, 1000)])
    for verb, call in (
        ("frees", partial(fake.free, address)),
        ("unregisters", partial(fake.unregister, host.address)),
        ("unmaps", partial(fake.unmap, room, fake.page_bytes)),
    ):
        with pytest.raises(Fault, match=f"{verb} memory that pending work touches"):
            call()
    fake.record(Stream.COPY_IN).synchronise()
    fake.free(address)
    fake.unregister(host.address)
    fake.unmap(room, fake.page_bytes)
    fake.release(room)
    fake.assert_empty()


def test_the_host_does_not_look_before_an_event(fake: FakeDevice, host: Host) -> None:
    sent = fill(host)[:1000].tobytes()
    address = fake.allocate(1000)
    fake.copy(Stream.COPY_IN, [Copy(address, host.address, 1000)])
    fake.copy(Stream.COPY_IN, [Copy(host.address + 4096, address, 1000)])
    with pytest.raises(Fault, match="the host reads"):
        fake.read(host.address + 4096, 1000)
    fake.record(Stream.COPY_IN).synchronise()
    assert fake.read(host.address + 4096, 1000) == sent


@pytest.mark.parametrize("ends", ["foreign", "unmapped", "past", "host"])
def test_copies_stay_in_live_memory(fake: FakeDevice, host: Host, ends: str) -> None:
    address, room = fake.allocate(1000), fake.reserve(2 * fake.page_bytes)
    fake.map(room, fake.page_bytes)
    foreign = ctypes.create_string_buffer(1000)
    copy = {
        "foreign": Copy(address, ctypes.addressof(foreign), 1000),
        "unmapped": Copy(room + fake.page_bytes - 500, host.address, 1000),
        "past": Copy(address + 1, host.address, 1000),
        "host": Copy(host.address + 4096, host.address, 1000),
    }[ends]
    with pytest.raises(Fault, match="memory"):
        fake.copy(Stream.COPY_IN, [copy])


def test_kernels_stay_in_live_memory_and_off_what_is_written(fake: FakeDevice, image: Emulated) -> None:
    def run(shift: Kernel, fake: FakeDevice, target: int, source: int, count: int) -> None:
        shift.launch(Stream.COMPUTE, (4, 1, 1), target, source, count, 1.0)
        fake.record(Stream.COMPUTE).synchronise()

    source, target = fake.allocate(400), fake.allocate(400)
    with pytest.raises(Fault, match="out of bounds"):
        run(fake.load(image, "shift"), fake, target, source, 101)
    fake = FakeDevice(fake.chance.randrange(100))
    host = Host(fake, 4096)
    source, target = fake.allocate(400), fake.allocate(400)
    fake.copy(Stream.COPY_IN, [Copy(source + 200, host.address, 4)])
    with pytest.raises(Fault, match="out of bounds"):
        run(fake.load(image, "shift"), fake, target, source, 100)


def test_kernels_do_not_write_what_copies_read(fake: FakeDevice, image: Emulated, host: Host) -> None:
    fill(host)
    source, target = fake.allocate(400), fake.allocate(400)
    fake.copy(Stream.COMPUTE, [Copy(source, host.address, 400)])
    fake.copy(Stream.COPY_OUT, [Copy(host.address + 4096, target, 400)])

    def run() -> None:
        fake.load(image, "shift").launch(Stream.COMPUTE, (4, 1, 1), target, source, 100, 1.0)
        fake.record(Stream.COMPUTE).synchronise()

    with pytest.raises(Fault, match="writes what other work reads"):
        run()


@pytest.mark.parametrize("wrong", ["past", "written", "read"])
def test_torch_stays_in_live_memory_and_off_what_copies_touch(
    fake: FakeDevice, host: Host, wrong: str
) -> None:
    fill(host)
    address = fake.allocate(400)
    if wrong == "written":
        fake.copy(Stream.COPY_IN, [Copy(address, host.address, 400)])
    if wrong == "read":
        fake.copy(Stream.COPY_OUT, [Copy(host.address, address, 400)])
    array = Array(address, (101 if wrong == "past" else 100,), torch.float32)

    def run() -> None:
        fake.compute(Stream.COMPUTE, lambda x: x.zero_(), array)
        fake.record(Stream.COMPUTE).synchronise()

    with pytest.raises(Fault, match=r"torch|live|still uses"):
        run()


def test_what_was_not_written_is_nan(fake: FakeDevice, host: Host) -> None:
    address = fake.allocate(400)
    fake.copy(Stream.COPY_OUT, [Copy(host.address, address, 400)])
    fake.record(Stream.COPY_OUT).synchronise()
    assert np.isnan(host.floats(0, 100)).all()


def test_copies_of_a_batch_do_not_overlap(fake: FakeDevice, host: Host) -> None:
    address = fake.allocate(400)
    with pytest.raises(Fault, match="overlap"):
        fake.copy(Stream.COPY_IN, [Copy(address, host.address, 8), Copy(address + 4, host.address + 8, 8)])


def test_orders_differ_and_depend_on_the_seed_only(image: Emulated) -> None:
    """Two streams, of which no event says which is first: who is first is not always the same."""

    def first(seed: int) -> bool:
        fake = FakeDevice(seed)
        host = Host(fake, 4096)
        a, b = fake.allocate(100), fake.allocate(100)
        fake.copy(Stream.COPY_IN, [Copy(a, host.address, 100)])
        fake.copy(Stream.COMPUTE, [Copy(b, host.address, 100)])
        event = fake.record(Stream.COPY_IN)
        event.synchronise()
        return fake.record(Stream.COMPUTE).passed()

    found = [first(seed) for seed in range(40)]
    assert len(set(found)) == 2
    assert found == [first(seed) for seed in range(40)]


def test_any_call_can_fail(image: Emulated) -> None:
    memory = mmap.mmap(-1, 4096)
    here = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def program(fake: FakeDevice) -> None:
        fake.register(here, 4096)
        address = fake.allocate(100)
        fake.copy(Stream.COPY_IN, [Copy(address, here, 100)])
        fake.record(Stream.COPY_IN).synchronise()
        fake.free(address)
        fake.unregister(here)

    calls = FakeDevice()
    program(calls)
    out_of_memory = 0
    for n in range(1, calls.calls + 1):
        fake = FakeDevice(lose_at=n)
        with pytest.raises(LaunchFailed):
            program(fake)
        with pytest.raises(LaunchFailed):
            fake.allocate(1)
        fake.close()
        fake.assert_empty()
        fake = FakeDevice(fail_at=n)
        try:
            program(fake)
        except OutOfMemory:
            out_of_memory += 1
        fake.close()
        fake.assert_empty()
    assert out_of_memory >= 4
