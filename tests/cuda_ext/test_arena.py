"""The arena of windows: contiguous addresses, and memory where a window is taken or still used."""

from __future__ import annotations

import contextlib
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
from spilld.cuda_ext.memory.arena import Arena, ArenaFull

from .device_contract import Host, fill
from .fake import FakeDevice

PAGE = 4096
WINDOWS = 6
MARKS = 16
"""Bytes at each end of a window that tell whose it is."""


class Windows(RuleBasedStateMachine):
    """What was written to both ends of a window is there until it is written again or given back."""

    def over(self, fake: FakeDevice) -> Device[Any]:
        """The device that is used: the fake itself, or one that drives it."""
        return fake

    @initialize(
        seed=st.integers(0, 1 << 20),
        window_bytes=st.sampled_from([PAGE // 4, PAGE - 64, PAGE, 3 * PAGE // 2, 3 * PAGE]),
        pages=st.integers(4, 14),
        memory_pages=st.integers(6, 20),
    )
    def start(self, seed: int, window_bytes: int, pages: int, memory_pages: int) -> None:
        self.fake = FakeDevice(seed, page_bytes=PAGE, memory_bytes=memory_pages * PAGE)
        self.device = self.over(self.fake)
        self.host = Host(self.device, 64 << 10)
        self.sent = fill(self.host)
        self.bytes, self.budget = window_bytes, pages * PAGE + 17
        self.arena = Arena(self.device, window_bytes, WINDOWS, self.budget)
        self.windows: dict[int, int | None] = {}  # of taken ones, the place in the host's memory
        self.looks: list[tuple[DeviceEvent, int, int]] = []  # when the host has what of which it sent
        self.next_look = 32 << 10

    @rule()
    def take(self) -> None:
        before = dict(self.windows)
        with contextlib.suppress(ArenaFull, OutOfMemory):
            window = self.arena.take()
            assert window not in before
            self.windows[window] = None

    @precondition(lambda self: self.windows)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        window = data.draw(st.sampled_from(sorted(self.windows)))
        self.arena.give_back(window)
        del self.windows[window]
        with pytest.raises(ValueError, match="not taken"):
            self.arena.give_back(window)

    @precondition(lambda self: self.windows)
    @rule(data=st.data(), at=st.integers(0, 1000), stream=st.sampled_from(Stream))
    def write(self, data: st.DataObject, at: int, stream: Stream) -> None:
        window = data.draw(st.sampled_from(sorted(self.windows)))
        self.windows[window] = None
        with contextlib.suppress(OutOfMemory), self.arena.use(stream, writes=[window]):
            with pytest.raises(ValueError, match="within its use"):
                self.arena.give_back(window)
            ends, here = self.ends(window), self.host.address + 16 * at
            self.device.copy(stream, [Copy(end, here + MARKS * i, MARKS) for i, end in enumerate(ends)])
            self.windows[window] = 16 * at

    @rule(data=st.data(), stream=st.sampled_from(Stream))
    def read(self, data: st.DataObject, stream: Stream) -> None:
        written = sorted(window for window, at in self.windows.items() if at is not None)
        if not written or self.next_look + 2 * MARKS > 64 << 10:
            return
        window = data.draw(st.sampled_from(written))
        to, at = self.next_look, self.windows[window]
        assert at is not None
        with contextlib.suppress(OutOfMemory):
            with self.arena.use(stream, reads=[window]) as event:
                there = self.host.address + to
                copies = [Copy(there + MARKS * i, end, MARKS) for i, end in enumerate(self.ends(window))]
                self.device.copy(stream, copies)
            self.looks.append((event, to, at))
            self.next_look += 2 * MARKS

    @precondition(lambda self: self.looks)
    @rule()
    def look(self) -> None:
        event, to, at = self.looks[0]
        with contextlib.suppress(OutOfMemory):
            event.synchronise()
            found = self.fake.read(self.host.address + to, 2 * MARKS)
            assert found == self.sent[at : at + 2 * MARKS].tobytes()
            self.looks.pop(0)

    @rule()
    def trim(self) -> None:
        with contextlib.suppress(OutOfMemory):
            self.arena.trim()

    @rule(soon=st.integers(1, 12))
    def memory_ends(self, soon: int) -> None:
        self.fake.fail_at = self.fake.calls + soon

    @invariant()
    def books(self) -> None:
        if hasattr(self, "arena"):
            self.arena.check_integrity()
            assert self.arena.mapped_bytes == self.fake.used_bytes <= self.budget

    def ends(self, window: int) -> tuple[int, int]:
        return self.arena.address(window), self.arena.address(window) + self.bytes - MARKS

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.fake.fail_at = 0
            while self.looks:
                self.look()
            self.arena.close()
            self.device.unregister(self.host.address)
            self.fake.assert_empty()
            self.device.close()


TestWindows = Windows.TestCase
TestWindows.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_memory_follows_use() -> None:
    device = FakeDevice(page_bytes=PAGE)
    arena = Arena(device, 3 * PAGE // 2, 4, 6 * PAGE)
    assert device.used_bytes == 0
    first, second = arena.take(), arena.take()
    assert arena.address(second) - arena.address(first) == 3 * PAGE // 2
    assert device.used_bytes == 3 * PAGE  # of the three pages, one is behind both
    arena.give_back(first)
    arena.trim()
    assert device.used_bytes == 2 * PAGE
    assert arena.take() == first
    arena.give_back(first)
    arena.give_back(second)
    arena.trim()
    assert device.used_bytes == 0


def test_what_does_not_fit_is_refused() -> None:
    device = FakeDevice(page_bytes=PAGE)
    for window_bytes, windows in ((2 * PAGE, 4), (0, 4), (10, 0)):
        with pytest.raises(ValueError, match="backs no window"):
            Arena(device, window_bytes, windows, 2 * PAGE - 1)
    arena = Arena(device, 2 * PAGE, 3, 4 * PAGE + 100)
    arena.take()
    second = arena.take()
    with pytest.raises(ArenaFull, match="budget"):
        arena.take()
    arena.give_back(second)
    arena.take()
    assert device.used_bytes == 4 * PAGE
    arena.trim()
    small = Arena(device, 10, 1, PAGE)
    small.take()
    with pytest.raises(ArenaFull, match="all 1 windows"):
        small.take()
    with pytest.raises(ValueError, match="not taken"):
        arena.use(Stream.COMPUTE, reads=[2])


def test_memory_stays_until_its_last_reader_has_ended_and_trim_does_not_wait() -> None:
    for seed in range(20):
        device = FakeDevice(seed, page_bytes=PAGE)
        host = Host(device, 8192)
        arena = Arena(device, PAGE, 3, 2 * PAGE)
        window = arena.take()
        with arena.use(Stream.COPY_OUT, reads=[window]):
            copies = [Copy(host.address + n, arena.address(window) + n, 1) for n in range(50)]
            device.copy(Stream.COPY_OUT, copies)
        arena.give_back(window)
        arena.trim()
        assert arena.mapped_bytes == PAGE
        while arena.mapped_bytes:
            arena.trim()
        arena.close()


def test_a_budget_bounds_what_is_backed() -> None:
    device = FakeDevice(page_bytes=PAGE)
    arena = Arena(device, PAGE, 3, 2 * PAGE)
    windows = [arena.take(), arena.take()]
    with pytest.raises(ArenaFull, match="budget"):
        arena.take()
    arena.give_back(windows[0])
    assert arena.take() == windows[0]


def test_memory_that_others_took_is_none_of_ours() -> None:
    device = FakeDevice(page_bytes=PAGE, memory_bytes=3 * PAGE)
    arena = Arena(device, 2 * PAGE, 2, 4 * PAGE)
    first = arena.take()
    with pytest.raises(OutOfMemory):
        arena.take()
    arena.check_integrity()
    assert device.used_bytes == 2 * PAGE
    arena.give_back(first)
    assert arena.take() == first


def test_the_cpu_has_the_same_arena() -> None:
    device = CpuDevice()
    host = Host(device, 4096)
    sent = fill(host)
    arena = Arena(device, 5000, 100, 8 * device.page_bytes)
    window = arena.take()
    with arena.use(Stream.COMPUTE, writes=[window]):
        device.copy(Stream.COMPUTE, [Copy(arena.address(window) + 4000, host.address, 1000)])
    with arena.use(Stream.COMPUTE, reads=[window]) as event:
        copy = Copy(host.address + 2048, arena.address(window) + 4000, 1000)
        device.copy(Stream.COMPUTE, [copy])
    event.synchronise()
    np.testing.assert_array_equal(host.bytes[2048:3048], sent[:1000])
    arena.give_back(window)
    arena.trim()
    assert arena.mapped_bytes == 0
    arena.close()
    device.close()


def live(device: FakeDevice) -> None:
    arena = Arena(device, 3 * PAGE // 2, 4, 4 * PAGE)
    windows = [arena.take(), arena.take()]
    with arena.use(Stream.COMPUTE, writes=windows[:1], reads=windows[1:]):
        ends = [arena.address(window) for window in windows]
        device.copy(Stream.COMPUTE, [Copy(ends[0], ends[1], 100)])
    for window in windows:
        arena.give_back(window)
    arena.trim()
    arena.close()


def test_a_lost_device_says_so_at_once() -> None:
    device = FakeDevice(4, page_bytes=PAGE)
    live(device)
    device.assert_empty()
    for n in range(1, device.calls + 1):
        lost = FakeDevice(4, page_bytes=PAGE, lose_at=n)
        with pytest.raises(LaunchFailed):
            live(lost)
        lost.close()
        lost.assert_empty()
