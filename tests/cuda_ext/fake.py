"""A device that does whatever a device may do, and refuses what a program may not.

Work waits in its stream until an event makes it due, or a seed lets it run before. Copies of a batch happen
in any order, and so does the work of streams that no event orders. What was not written is NaN, and so is
what was given back. Two pieces of work of which one writes what the other touches must be ordered by a
stream, an event, or the host's waiting for one; if they are not it is a Fault, however they happen to run.
"""

from __future__ import annotations

import ctypes
import mmap
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from spilld.cuda_ext.device.base import Copy, Stream
from spilld.cuda_ext.device.ranges import AddressRanges
from spilld.cuda_ext.device.tensors import Array, in_process
from spilld.cuda_ext.errors import LaunchFailed, OutOfMemory

from .emulator import Emulated, EmulatorError

SPACE_BYTES = 64 << 20
"""Of addresses: what is allocated or reserved."""
GAP = 512
"""Bytes between two allocations that belong to nobody."""
POISON = 0xFF
MAY_RUN_OUT = ("allocate", "register", "copy", "compute", "record", "reserve", "map", "create")

Span = tuple[int, int]
"""(address, nbytes)"""
Clock = dict[Stream, int]
"""Of each stream, the number of its newest work that is known to come before."""


class Fault(AssertionError):
    """The program did what works only by luck; the message says what."""


@dataclass(eq=False)
class Work:
    """What was given to a stream: steps that happen in any order once all before it is done."""

    stream: Stream
    number: int
    clock: Clock
    steps: list[Callable[[], None]] = field(default_factory=list)
    reads: list[Span] = field(default_factory=list)
    writes: list[Span] = field(default_factory=list)
    after: Work | None = None
    done: bool = False

    def precedes(self, clock: Clock) -> bool:
        return clock[self.stream] >= self.number


@dataclass(eq=False)
class FakeEvent:
    device: FakeDevice
    work: Work

    def before(self, stream: Stream) -> None:
        self.device.call("wait")
        _join(self.device.clocks[stream], self.work.clock)
        self.device.give(stream, after=self.work)

    def passed(self) -> bool:
        self.device.call("query")
        self.device.run(1 + self.device.chance.randrange(3))
        if self.work.done:
            self.device.meet(self.work)
        return self.work.done

    def synchronise(self) -> None:
        self.device.call("synchronise")
        while not self.work.done:
            self.device.run(1)
        self.device.meet(self.work)


@dataclass(frozen=True)
class FakeKernel:
    device: FakeDevice
    image: Emulated
    name: str
    threads: int
    shared_bytes: int

    def launch(self, stream: Stream, grid: tuple[int, int, int], *arguments: int | float) -> None:
        values = self.image.values(self.name, arguments)
        self.device.call("launch")
        work = self.device.give(stream)
        work.steps.append(lambda: self.device.emulate(self, work, grid, values))


class FakeDevice:
    """Satisfies spilld.cuda_ext.device.base.Device.

    memory_bytes: what can be allocated and mapped in all. between: how likely some work is done between two
    calls; 0: none is until the program waits for it. Calls have numbers, the first being 1. fail_at: the
    first from this on that may raise OutOfMemory does, and none after it. lose_at: this one and all after it
    raise LaunchFailed.
    """

    name = "fake"

    def __init__(
        self,
        seed: int = 0,
        *,
        memory_bytes: int = 32 << 20,
        page_bytes: int = 64 << 10,
        fail_at: int = 0,
        lose_at: int = 0,
        between: float = 0.3,
    ) -> None:
        self.chance, self.between = random.Random(seed), between
        self.page_bytes = page_bytes
        self.memory_bytes = memory_bytes
        self.fail_at, self.lose_at = fail_at, lose_at
        self.calls = 0
        self.computed = 0  # by torch
        self.held_bytes = 0  # memory that a driver has promised for mapping
        self.lost: LaunchFailed | None = None
        self.allocated, self.reserved, self.mapped, self.registered = (AddressRanges() for _ in range(4))
        self.clocks: dict[Stream, Clock] = {stream: dict.fromkeys(Stream, 0) for stream in Stream}
        self.host: Clock = dict.fromkeys(Stream, 0)
        self._numbers = dict.fromkeys(Stream, 0)
        self._queues: dict[Stream, deque[Work]] = {stream: deque() for stream in Stream}
        self._open: list[Work] = []  # what the host does not know to be done
        self._space = mmap.mmap(-1, SPACE_BYTES)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._space))

    @property
    def used_bytes(self) -> int:
        return self.allocated.nbytes + self.mapped.nbytes + self.held_bytes

    def load(self, image: Emulated, name: str, *, threads: int = 32, shared_bytes: int = 0) -> FakeKernel:
        if name not in image:
            raise KeyError(name)
        return FakeKernel(self, image, name, threads, shared_bytes)

    def allocate(self, nbytes: int) -> int:
        self.call("allocate")
        if nbytes < 1:
            raise ValueError("no bytes")
        self.charge(nbytes)
        address = self._place(nbytes, 256)
        self.allocated.add(address, nbytes)
        _poison(address, nbytes)
        return address

    def free(self, address: int) -> None:
        nbytes = self.allocated.size(address)
        if nbytes is None:
            raise ValueError(f"nothing was allocated at {address:#x}")
        self.call("free")
        self.idle("frees", address, nbytes)
        self.allocated.remove(address)
        _poison(address, nbytes)

    def register(self, address: int, nbytes: int) -> None:
        if address % 4096 or nbytes % 4096:
            raise ValueError("not whole pages")
        self.call("register")
        self.registered.add(address, nbytes)

    def unregister(self, address: int) -> None:
        nbytes = self.registered.size(address)
        if nbytes is None:
            raise ValueError(f"nothing was registered at {address:#x}")
        self.call("unregister")
        self.idle("unregisters", address, nbytes)
        self.registered.remove(address)

    def copy(self, stream: Stream, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self._check(copy)
        reads = [(copy.source, copy.nbytes) for copy in copies]
        writes = [(copy.to, copy.nbytes) for copy in copies]
        for i, span in enumerate(writes):
            if any(_overlap(span, other) for other in chain(reads, writes[i + 1 :])):
                raise Fault("copies of one batch overlap, which happen in any order")
        self.call("copy")
        work = self.give(stream, reads, writes)
        work.steps = [lambda copy=copy: self._move(copy) for copy in copies]  # type: ignore[misc]
        self.chance.shuffle(work.steps)

    def compute(self, stream: Stream, work: Callable[..., object], *arrays: Array) -> None:
        ended: OutOfMemory | None = None
        try:
            self.call("compute")
        except OutOfMemory as error:  # torch may find that out when some of the operations are given
            if self.chance.random() < 0.5:
                raise
            ended = error
        given = self.give(stream, reads=[(array.address, array.nbytes) for array in arrays])
        given.steps.append(lambda: self._compute(given, work, arrays))
        if ended:
            raise ended

    def record(self, stream: Stream) -> FakeEvent:
        self.call("record")
        return FakeEvent(self, self.give(stream))

    def reserve(self, nbytes: int) -> int:
        if nbytes < 1 or nbytes % self.page_bytes:
            raise ValueError("not whole pages")
        self.call("reserve")
        address = self._place(nbytes, self.page_bytes)
        self.reserved.add(address, nbytes)
        return address

    def release(self, address: int) -> None:
        nbytes = self.reserved.size(address)
        if nbytes is None or self.mapped.touched(address, nbytes):
            raise ValueError("not reserved, or partly mapped")
        self.call("release")
        self.reserved.remove(address)

    def map(self, address: int, nbytes: int) -> None:
        if (address | nbytes) % self.page_bytes or self.reserved.holder(address, nbytes) is None:
            raise ValueError("not whole pages of a reserved range")
        if self.mapped.touched(address, nbytes):
            raise ValueError("mapped already")
        self.call("map")
        self.charge(nbytes)
        self.mapped.add(address, nbytes)
        _poison(address, nbytes)

    def unmap(self, address: int, nbytes: int) -> None:
        if self.mapped.size(address) != nbytes:
            raise ValueError("no call of map backed that")
        self.call("unmap")
        self.idle("unmaps", address, nbytes)
        self.mapped.remove(address)
        _poison(address, nbytes)

    def synchronise(self) -> None:
        while any(self._queues.values()):
            self.run(1)
        self._open.clear()

    def close(self) -> None:
        self.synchronise()
        for ranges in (self.allocated, self.mapped, self.reserved, self.registered):
            for start, _ in list(ranges):
                ranges.remove(start)

    # What follows is for tests, events and kernels.

    def call(self, name: str) -> None:
        """A call of the program's: it may fail, and time may have passed since the one before."""
        if self.lost:
            raise self.lost
        self.calls += 1
        if self.calls == self.lose_at:
            self.lose(f"the device was lost before the call of {name}")
        if 0 < self.fail_at <= self.calls and name in MAY_RUN_OUT:
            self.fail_at = 0
            raise OutOfMemory(f"no memory for {name}, as the test wants it")
        if self.chance.random() < self.between:
            self.run(self.chance.randrange(4))

    def lose(self, words: str) -> None:
        self.lost = LaunchFailed(words)
        for queue in self._queues.values():
            queue.clear()
        self._open.clear()
        raise self.lost

    def give(
        self,
        stream: Stream,
        reads: Iterable[Span] = (),
        writes: Iterable[Span] = (),
        after: Work | None = None,
    ) -> Work:
        """New work at the end of a stream. Raises Fault if it races with other work."""
        clock = self.clocks[stream]
        _join(clock, self.host)
        work = Work(stream, self._numbers[stream] + 1, clock | {stream: self._numbers[stream] + 1})
        work.reads, work.writes, work.after = list(reads), list(writes), after
        for other in self._open:
            if not other.precedes(work.clock):
                _check_race(other, work)
        self._numbers[stream] = clock[stream] = work.number
        touched = [span for other in self._open for span in chain(other.reads, other.writes)]
        for span in work.writes:
            if not any(_overlap(span, other) for other in chain(touched, work.reads)):
                _poison(*span)
        self._queues[stream].append(work)
        self._open.append(work)
        return work

    def run(self, steps: int) -> None:
        """Do some of what can be done next, in an order that the seed decides."""
        for _ in range(steps):
            ready = [queue[0] for queue in self._queues.values() if queue and _can_run(queue[0])]
            if not ready:
                return
            work = self.chance.choice(ready)
            if work.steps:
                work.steps.pop()()
            if not work.steps:
                work.done = True
                self._queues[work.stream].popleft()

    def meet(self, work: Work) -> None:
        """The host knows that this work is done, and with it all that comes before."""
        _join(self.host, work.clock)
        self._open = [other for other in self._open if not other.precedes(self.host)]

    def emulate(self, kernel: FakeKernel, work: Work, grid: tuple[int, int, int], values: list[Any]) -> None:
        """Run a kernel over live device memory, but not over what unordered work writes."""
        live = sorted(chain(self.allocated, self.mapped))
        memory, seed = (self._base, SPACE_BYTES), self.chance.randrange(1 << 30)
        with self._apart(kernel.name, work) as written:
            allowed = [part for span in live for part in _without(span, written)]
            try:
                kernel.image.launch_on(
                    *(memory, allowed, kernel.name, grid, kernel.threads, kernel.shared_bytes, values, seed)
                )
            except EmulatorError as error:
                raise Fault(f"{kernel.name}: {error}") from error

    @contextmanager
    def _apart(self, name: str, work: Work) -> Iterator[list[Span]]:
        """What unordered work writes. Raises Fault if what it reads is written in the scope."""
        others = [other for other in self._open if not self._ordered(work, other)]
        read = [(span, ctypes.string_at(*span)) for other in others for span in other.reads]
        yield [span for other in others for span in other.writes]
        if any(ctypes.string_at(*span) != before for span, before in read):
            raise Fault(f"{name} writes what other work reads")

    def _compute(self, given: Work, work: Callable[..., object], arrays: Sequence[Array]) -> None:
        """torch over live device memory, but not over what unordered work writes."""
        with self._apart("torch", given) as written:
            for array in arrays:
                span = (array.address, array.nbytes)
                if self._owner(*span) != "device" or any(_overlap(span, other) for other in written):
                    raise Fault(f"torch: {span} is not device memory, or other work writes it")
            work(*map(in_process, arrays))
        self.computed += 1

    def read(self, address: int, nbytes: int) -> bytes:
        """What the host sees in its own memory. Raises Fault if pending work writes there."""
        for work in self._open:
            if any(_overlap((address, nbytes), span) for span in work.writes):
                raise Fault("the host reads what pending work writes")
        return ctypes.string_at(address, nbytes)

    def assert_empty(self) -> None:
        """Everything was given back."""
        for what in ("allocated", "mapped", "reserved", "registered"):
            assert not list(getattr(self, what)), f"something is still {what}"

    def _ordered(self, work: Work, other: Work) -> bool:
        return work is other or work.precedes(other.clock) or other.precedes(work.clock)

    def charge(self, nbytes: int) -> None:
        if self.used_bytes + nbytes > self.memory_bytes:
            raise OutOfMemory(f"{self.memory_bytes - self.used_bytes} bytes are left, not {nbytes}")

    def _place(self, nbytes: int, align: int) -> int:
        """The lowest address with room and a gap on both sides."""
        address = self._base
        for start, size in [*sorted(chain(self.allocated, self.reserved)), (self._base + SPACE_BYTES, 0)]:
            found = -(-(address + GAP) // align) * align
            if found + nbytes + GAP <= start:
                return found
            address = start + size
        raise OutOfMemory("no addresses are left")

    def _check(self, copy: Copy) -> None:
        ends = [self._owner(address, copy.nbytes) for address in (copy.to, copy.source)]
        if "device" not in ends:
            raise Fault("a copy between two places in host memory")

    def _owner(self, address: int, nbytes: int) -> str:
        if self.allocated.holder(address, nbytes) is not None or self._is_mapped(address, nbytes):
            return "device"
        if self.registered.holder(address, nbytes) is not None:
            return "host"
        raise Fault(f"{nbytes} bytes at {address:#x} are not live device memory nor registered host memory")

    def _is_mapped(self, address: int, nbytes: int) -> bool:
        """In one or several mapped parts of one reservation."""
        parts = self.mapped.touched(address, nbytes)
        inside = sum(
            min(start + (self.mapped.size(start) or 0), address + nbytes) - max(start, address)
            for start in parts
        )
        return inside == nbytes and self.reserved.holder(address, nbytes) is not None

    def idle(self, verb: str, address: int, nbytes: int) -> None:
        """Raises Fault if work that the host does not know to be done touches this memory."""
        for work in self._open:
            if any(_overlap((address, nbytes), span) for span in chain(work.reads, work.writes)):
                raise Fault(f"the program {verb} memory that pending work touches")

    def _move(self, copy: Copy) -> None:
        ctypes.memmove(copy.to, copy.source, copy.nbytes)


def _join(clock: Clock, other: Clock) -> None:
    for stream in clock:
        clock[stream] = max(clock[stream], other[stream])


def _can_run(work: Work) -> bool:
    return work.after is None or work.after.done


def _overlap(a: Span, b: Span) -> bool:
    return a[0] < b[0] + b[1] and b[0] < a[0] + a[1]


def _check_race(earlier: Work, later: Work) -> None:
    pairs = chain(
        ((a, b) for a in earlier.writes for b in chain(later.reads, later.writes)),
        ((a, b) for a in earlier.reads for b in later.writes),
    )
    if any(_overlap(a, b) for a, b in pairs):
        raise Fault(f"work on {later.stream.value} touches what {earlier.stream.value} still uses")


def _without(span: Span, taken: Iterable[Span]) -> list[Span]:
    """The parts of a span that are in none of the others."""
    start, nbytes = span
    parts = []
    for other, size in sorted(other for other in taken if _overlap(span, other)):
        if other > start:
            parts.append((start, other - start))
        start = max(start, other + size)
    if start < span[0] + nbytes:
        parts.append((start, span[0] + nbytes - start))
    return parts


def _poison(address: int, nbytes: int) -> None:
    ctypes.memset(address, POISON, nbytes)
