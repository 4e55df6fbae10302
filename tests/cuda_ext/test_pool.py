"""The pool of record slots: nothing is read before it is there, nor overwritten while it is read."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from spilld.cuda_ext.device.base import (
    Copy,
    Device,
    DeviceEvent,
    Stream,
)
from spilld.cuda_ext.device.cpu import CpuDevice
from spilld.cuda_ext.errors import LaunchFailed, OutOfMemory
from spilld.cuda_ext.memory.record_pool import PoolFull, RecordPool

from .device_contract import Host, fill
from .fake import FakeDevice, Fault

RECORD = 320
SLOTS = 6
SOURCES, TARGETS = 8, 8
UNKNOWN = -1
"""A slot that holds nothing, or what it held: there was no memory to fill it."""


class Records(RuleBasedStateMachine):
    """What each slot holds is what was put there last, in every legal order of the device's work."""

    def over(self, fake: FakeDevice) -> Device[Any]:
        """The device that is used: the fake itself, or one that drives it."""
        return fake

    @initialize(seed=st.integers(0, 1 << 20))
    def start(self, seed: int) -> None:
        self.fake = FakeDevice(seed)
        self.device = self.over(self.fake)
        self.host = Host(self.device, RECORD * (SOURCES + TARGETS))
        self.sent = fill(self.host)
        self.pool = RecordPool(self.device, SLOTS * RECORD + RECORD - 1, RECORD)
        self.slots: dict[int, int | None] = {}  # of taken ones, the number of the record, or UNKNOWN
        self.drained: dict[int, tuple[DeviceEvent, int]] = {}  # of targets, when which record is there

    def source(self, number: int) -> int:
        return self.host.address + number * RECORD

    @rule(n=st.integers(0, 4))
    def take(self, n: int) -> None:
        free = self.pool.free
        if n > free:
            with pytest.raises(PoolFull):
                self.pool.take(n)
            assert self.pool.free == free
        else:
            self.slots |= dict.fromkeys(self.pool.take(n))

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        for slot in self.some_slots(data):
            self.pool.give_back([slot])
            del self.slots[slot]

    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        slots = self.some_slots(data)
        numbers = [data.draw(st.integers(0, SOURCES - 1)) for _ in slots]
        self.slots |= dict.fromkeys(slots, UNKNOWN)
        with contextlib.suppress(OutOfMemory):
            self.pool.fill(slots, [self.source(number) for number in numbers])
            self.slots |= dict(zip(slots, numbers, strict=True))

    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        free = [target for target in range(TARGETS) if target not in self.drained]
        slots = self.full_slots(data)[: len(free)]
        targets = free[: len(slots)]
        with contextlib.suppress(OutOfMemory):
            event = self.pool.drain(slots, [self.source(SOURCES + target) for target in targets])
            for slot, target in zip(slots, targets, strict=True):
                number = self.slots[slot]
                assert number is not None
                self.drained[target] = (event, number)

    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        """A kernel that reads one slot and writes another."""
        full, taken = self.full_slots(data)[:1], self.some_slots(data)[:1]
        if not full or not taken or full == taken:
            return
        address, moved = self.pool.address, self.slots[full[0]]
        with contextlib.suppress(OutOfMemory), self.pool.use(Stream.COMPUTE, reads=full, writes=taken):
            self.slots[taken[0]] = None
            with pytest.raises(ValueError, match="within its use"):
                self.pool.give_back(full)
            self.device.copy(Stream.COMPUTE, [Copy(address(taken[0]), address(full[0]), RECORD)])
            self.slots[taken[0]] = moved

    @precondition(lambda self: self.drained)
    @rule(data=st.data(), poll=st.booleans())
    def look(self, data: st.DataObject, poll: bool) -> None:
        target = data.draw(st.sampled_from(sorted(self.drained)))
        event, number = self.drained[target]
        with contextlib.suppress(OutOfMemory):
            if poll and not event.passed():
                return
            event.synchronise()
            found = self.fake.read(self.source(SOURCES + target), RECORD)
            assert found == self.sent[number * RECORD :][:RECORD].tobytes()
            del self.drained[target]

    @rule(soon=st.integers(1, 12))
    def memory_ends(self, soon: int) -> None:
        self.fake.fail_at = self.fake.calls + soon

    @rule(data=st.data())
    def what_holds_nothing_is_not_read(self, data: st.DataObject) -> None:
        for slot in range(SLOTS):
            if self.slots.get(slot) is None:
                with pytest.raises(ValueError, match="not taken"):
                    self.pool.drain([slot], [self.source(SOURCES)])

    @invariant()
    def books(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            assert self.pool.used_bytes == RECORD * len(self.slots)
            assert self.fake.used_bytes == RECORD * SLOTS

    def some_slots(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(self.slots)), unique=True)) if self.slots else []

    def full_slots(self, data: st.DataObject) -> list[int]:
        full = sorted(slot for slot, number in self.slots.items() if number not in (None, UNKNOWN))
        return data.draw(st.lists(st.sampled_from(full), unique=True)) if full else []

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.fake.fail_at = 0
            self.pool.close()
            for event, _ in self.drained.values():
                event.synchronise()
            self.device.unregister(self.host.address)
            self.fake.assert_empty()
            self.device.close()


TestRecords = Records.TestCase
TestRecords.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_budget_is_kept_to_the_byte() -> None:
    device = FakeDevice()
    assert RecordPool(device, 3 * RECORD + RECORD - 1, RECORD).capacity == 3
    assert device.used_bytes == 3 * RECORD
    with pytest.raises(ValueError, match="holds no record"):
        RecordPool(device, RECORD - 1, RECORD)
    with pytest.raises(OutOfMemory):
        RecordPool(device, 1 << 40, RECORD)


def test_slots_are_given_back_once() -> None:
    pool = RecordPool(FakeDevice(), 4 * RECORD, RECORD)
    slots = pool.take(3)
    for wrong in ([slots[0], slots[0]], [*slots, 3], [-1], [4]):
        with pytest.raises(ValueError, match="given back"):
            pool.give_back(wrong)
        assert pool.free == 1
    pool.give_back(slots)
    assert pool.take(4) == [3, *slots]


def test_an_error_in_a_scope_leaves_nothing_in_what_it_writes() -> None:
    device = FakeDevice()
    host = Host(device, 4096)
    pool = RecordPool(device, 2 * RECORD, RECORD)
    a, b = pool.take(2)
    pool.fill([a, b], [host.address, host.address + RECORD])

    def fails() -> None:
        with pool.use(Stream.COMPUTE, reads=[a], writes=[b]):
            device.copy(Stream.COMPUTE, [Copy(pool.address(b), pool.address(a), 8)])
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fails()
    with pytest.raises(ValueError, match="before it was written"):
        pool.drain([b], [host.address])
    pool.drain([a], [host.address + 2048]).synchronise()
    pool.give_back([a, b])
    pool.close()
    pool.close()
    assert device.used_bytes == 0


def test_an_event_passes_before_what_is_given_later() -> None:
    device = FakeDevice()
    host = Host(device, 4096)
    pool = RecordPool(device, RECORD, RECORD)
    slots = pool.take(1)
    pool.fill(slots, [host.address])
    first = pool.drain(slots, [host.address + 1024])
    pool.drain(slots, [host.address + 2048])
    first.synchronise()
    assert device.read(host.address + 1024, RECORD) == host.bytes[:RECORD].tobytes()
    with pytest.raises(Fault, match="pending work"):
        device.read(host.address + 2048, RECORD)


def test_the_cpu_holds_records_too() -> None:
    device = CpuDevice()
    host = Host(device, 4096)
    sent = fill(host)
    pool = RecordPool(device, 2 * RECORD, RECORD)
    slots = pool.take(2)
    pool.fill(slots, [host.address, host.address + RECORD])
    event = pool.drain(slots[::-1], [host.address + 1000, host.address + 1000 + RECORD])
    assert event.passed()
    np.testing.assert_array_equal(host.bytes[1000 : 1000 + RECORD], sent[RECORD : 2 * RECORD])
    pool.close()
    device.close()


def live(device: FakeDevice, here: int) -> None:
    device.register(here, 4096)
    pool = RecordPool(device, 2 * RECORD, RECORD)
    for _ in range(3):
        slots = pool.take(2)
        pool.fill(slots, [here, here + RECORD])
        with pool.use(Stream.COMPUTE, reads=slots):
            device.copy(Stream.COMPUTE, [Copy(here + 2048, pool.address(slots[0]), RECORD)])
        pool.give_back(slots)
    pool.close()


def test_a_lost_device_says_so_at_once() -> None:
    memory = np.frombuffer(mmap.mmap(-1, 4096), np.uint8)
    device = FakeDevice(4)
    live(device, memory.ctypes.data)
    for n in range(1, device.calls + 1):
        lost = FakeDevice(4, lose_at=n)
        with pytest.raises(LaunchFailed):
            live(lost, memory.ctypes.data)
        lost.close()
        lost.assert_empty()


def test_a_stream_waits_once_for_an_event() -> None:
    """What stays in a slot is read in every step."""
    device = FakeDevice()
    host = Host(device, 4096)
    pool = RecordPool(device, 2 * RECORD, RECORD)
    slots = pool.take(2)
    pool.fill(slots, [host.address, host.address + RECORD])
    calls = []
    for _ in range(3):
        before = device.calls
        with pool.use(Stream.COMPUTE, reads=slots):
            pass
        calls.append(device.calls - before)
    assert calls == [2, 1, 1], "it waits and records; then it records"
