"""The contract for CudaDevice over the fake driver; run by test_cuda.py in a process that has that driver."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from spilld.cuda_ext.compile import build
from spilld.cuda_ext.device.base import Copy, Kernel, Stream
from spilld.cuda_ext.device.cuda import CudaDevice
from spilld.cuda_ext.errors import (
    LaunchFailed,
    NoDevice,
    OutOfMemory,
    RegistrationRefused,
)

from .conftest import Emulate
from .cubins import compiled
from .device_contract import TURN_BYTES, DeviceContract, Host, fill
from .driver import FakeDriver
from .emulator import Emulated
from .fake import FakeDevice
from .kernels import assert_close
from .test_arena import Windows
from .test_pool import Records
from .tier import ATTEND, TOLERANCE, Step, problem

SHIFT = Path(__file__).parent / "shift.cu"
Connect = Callable[[FakeDevice], FakeDriver]


@pytest.fixture(scope="session")
def cubin() -> bytes:
    return compiled(SHIFT, "sm_90")


@pytest.fixture(scope="session")
def kernels(emulate: Emulate) -> Mapping[str, Emulated]:
    image = emulate(SHIFT, {})
    attend = emulate(ATTEND.source, dict(ATTEND.defines))
    return {"shift": image, "turn": image, ATTEND.name: attend}


@pytest.fixture
def connect(kernels: Mapping[str, Emulated]) -> Connect:
    def connected(fake: FakeDevice) -> FakeDriver:
        driver = FakeDriver(fake, kernels)
        driver.connect()
        return driver

    return connected


class TestCuda(DeviceContract):
    @pytest.fixture(params=range(4))
    def device(self, request: pytest.FixtureRequest, connect: Connect) -> Iterator[CudaDevice]:
        driver = connect(FakeDevice(request.param))
        device = CudaDevice()
        yield device
        device.close()
        driver.assert_empty()

    @pytest.fixture
    def shift(self, device: CudaDevice, cubin: bytes) -> Kernel:
        return device.load(cubin, "shift")

    @pytest.fixture
    def turn(self, device: CudaDevice, cubin: bytes) -> Kernel:
        return device.load(cubin, "turn", shared_bytes=TURN_BYTES)


@pytest.mark.parametrize("seed", range(3))
def test_attention_over_the_pool(connect: Connect, cache_folder: Path, seed: int) -> None:
    driver = connect(FakeDevice(seed))
    device = CudaDevice()
    step, records = Step(device, device.compiled(ATTEND, cache_folder / "cubins")), problem()
    assert_close(step.attend(records), records.oracle(), TOLERANCE)
    step.close()
    device.close()
    driver.assert_empty()


def test_what_is_no_kernel_of_this_gpu(connect: Connect, cubin: bytes) -> None:
    connect(FakeDevice())
    device = CudaDevice()
    assert (device.name, device.architecture) == ("no GPU", "sm_90")
    with pytest.raises(KeyError, match="absent"):
        device.load(cubin, "absent")
    with pytest.raises(ValueError, match="sm_90"):
        device.load(b"PTX or whatever", "shift")
    with pytest.raises(ValueError, match="shared memory"):
        device.load(cubin, "shift", shared_bytes=228 << 10)
    device.close()


def test_any_thread_calls_it(connect: Connect) -> None:
    """An engine is made in one thread and computes in another."""
    driver = connect(FakeDevice())
    device, found = CudaDevice(), []
    thread = threading.Thread(target=lambda: found.append(device.allocate(4096)))
    thread.start()
    thread.join()
    [address] = found
    device.free(address)
    device.close()
    driver.assert_empty()


def test_machines_that_cannot(connect: Connect) -> None:
    driver = connect(FakeDevice())
    driver.version = 12090
    with pytest.raises(build.DriverTooOld, match=r"12\.9"):
        CudaDevice()
    driver.version, driver.gpus = 13000, 0
    with pytest.raises(NoDevice, match="nvidia-smi"):
        CudaDevice()
    driver.gpus = 1
    with pytest.raises(NoDevice, match="nvidia-smi"):
        CudaDevice(1)
    driver.attributes[102] = 0
    with pytest.raises(NoDevice, match="cannot map memory"):
        CudaDevice()
    driver.assert_empty()


def test_host_memory_is_registered_in_parts_and_copied_across_them(connect: Connect) -> None:
    driver = connect(FakeDevice(5))
    driver.most_registered = 8192
    device = CudaDevice(register_bytes=8192)
    host = Host(device, 20 << 10)
    sent = fill(host).copy()
    address = device.allocate(20 << 10)
    device.copy(Stream.COPY_IN, [Copy(address, host.address, 20 << 10)])
    device.copy(Stream.COPY_IN, [Copy(host.address + 100, address, 20000)])
    device.record(Stream.COPY_IN).synchronise()
    np.testing.assert_array_equal(host.bytes[100:20100], sent[:20000])
    device.unregister(host.address)
    assert not len(driver.device.registered)
    device.close()
    driver.assert_empty()


def test_host_memory_that_cannot_be_pinned(connect: Connect) -> None:
    driver = connect(FakeDevice())
    driver.most_registered = 4096
    device = CudaDevice(register_bytes=8192)
    memory = np.frombuffer(mmap.mmap(-1, 8192), np.uint8)
    with pytest.raises(RegistrationRefused, match="LimitMEMLOCK"):
        device.register(memory.ctypes.data, 8192)
    driver.most_registered = 8192
    device.register(memory.ctypes.data, 8192)
    device.close()
    driver.assert_empty()


class Program:
    """Some of everything, in steps each of which can be taken again if it failed."""

    def __init__(self, cubin: bytes) -> None:
        self.cubin = cubin
        self.device: Any = None
        self.brought: Any = None
        self.memory = np.frombuffer(mmap.mmap(-1, 16384), np.uint8)
        self.memory[:4096] = np.arange(1024, dtype=np.float32).view(np.uint8)

    def run(self, take: Callable[[Callable[[], object]], object] = lambda step: step()) -> None:
        begin = (self.open, self.pin, self.allocate, self.reserve, self.map, self.bring, self.mark)
        for step in (*begin, self.order, self.launch, self.take, self.finish, self.unmap):
            take(step)

    def open(self) -> None:
        self.device = CudaDevice(register_bytes=8192)

    def pin(self) -> None:
        self.device.register(self.memory.ctypes.data, 16384)

    def allocate(self) -> None:
        self.address = self.device.allocate(4096)

    def reserve(self) -> None:
        self.room = self.device.reserve(4 * self.device.page_bytes)

    def map(self) -> None:
        self.device.map(self.room, 2 * self.device.page_bytes)

    def bring(self) -> None:
        here = self.memory.ctypes.data
        batch = [Copy(self.address + 1024 * i, here + 1024 * i, 1024) for i in range(4)]
        self.device.copy(Stream.COPY_IN, batch)

    def mark(self) -> None:
        self.brought = self.device.record(Stream.COPY_IN)

    def order(self) -> None:
        self.brought.before(Stream.COMPUTE)

    def launch(self) -> None:
        self.device.load(self.cubin, "shift").launch(
            Stream.COMPUTE, (32, 1, 1), self.room, self.address, 1000, 1.0
        )

    def take(self) -> None:
        self.device.copy(Stream.COMPUTE, [Copy(self.memory.ctypes.data + 8000, self.room, 4000)])

    def finish(self) -> None:
        self.device.record(Stream.COMPUTE).synchronise()

    def unmap(self) -> None:
        self.device.unmap(self.room, 2 * self.device.page_bytes)

    def close(self) -> None:
        self.brought = None
        if self.device:
            self.device.close()


def calls(connect: Connect, cubin: bytes, seed: int) -> int:
    """How many calls the program makes before it closes."""
    fake = FakeDevice(seed)
    driver = connect(fake)
    program = Program(cubin)
    program.run()
    made = fake.calls
    program.close()
    driver.assert_empty()
    return made


def test_any_call_of_the_driver_can_find_no_memory(connect: Connect, cubin: bytes) -> None:
    """What was asked for is not taken, and can be asked for again."""
    failed = set[str]()
    for n in range(1, calls(connect, cubin, 1) + 1):
        driver = connect(FakeDevice(1, fail_at=n))
        program = Program(cubin)

        def take(step: Callable[[], object]) -> None:
            try:
                step()
            except (OutOfMemory, RegistrationRefused):
                failed.add(step.__name__)
                step()

        program.run(take)
        program.close()
        driver.assert_empty()
        numbers = program.memory[8000:12000].view(np.float32)
        np.testing.assert_array_equal(numbers, np.arange(1, 1001, dtype=np.float32))
    takers = {"open", "pin", "allocate", "reserve", "map", "bring", "mark", "launch", "take"}
    assert failed == takers | {"finish"}  # which records an event


def test_a_device_can_be_lost_at_any_call(connect: Connect, cubin: bytes) -> None:
    for n in range(1, calls(connect, cubin, 2) + 1):
        driver = connect(FakeDevice(2, lose_at=n))
        program = Program(cubin)
        with pytest.raises(LaunchFailed, match="restart"):
            program.run()
        program.close()
        assert driver.contexts == 0
        assert not driver.streams
        assert driver.faults == []


class Driven(RuleBasedStateMachine):
    """For state machines of the pool and the arena: what they use is CudaDevice."""

    driver: FakeDriver | None = None

    def over(self, fake: FakeDevice) -> CudaDevice:
        self.driver = FakeDriver(fake, {})
        self.driver.connect()
        return CudaDevice()

    def teardown(self) -> None:
        super().teardown()
        if self.driver:
            self.driver.assert_empty()


class CudaRecords(Driven, Records):
    pass


class CudaWindows(Driven, Windows):
    pass


@pytest.mark.parametrize("machine", [CudaRecords, CudaWindows])
def test_the_tier_over_cuda(machine: type[RuleBasedStateMachine]) -> None:
    few = settings(max_examples=40, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(machine, settings=few)
