"""A pool of slots in device memory, each of which holds a record that is cached on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from spilld.cuda_ext.device.base import (
    Copy,
    Device,
    DeviceEvent,
    Stream,
)

from .fences import Fences


class PoolFull(Exception):
    """Fewer slots are free than were asked for. None was taken."""


class RecordPool:
    """A fixed number of slots in one allocation, and the only place where their bytes are counted.

    Slots may be given back and taken again while work still uses them: what is written to a slot waits, on
    the device, for the last reader of what was there before. Owned by one thread.
    """

    def __init__(self, device: Device[Any], budget_bytes: int, record_bytes: int) -> None:
        """Allocate the pool.

        Raises:
            ValueError: Not even one record fits the budget.
            OutOfMemory: The device has not enough memory.
        """
        self.budget_bytes, self.record_bytes = budget_bytes, record_bytes
        self.capacity = budget_bytes // record_bytes
        if self.capacity < 1:
            raise ValueError(f"a budget of {budget_bytes} bytes holds no record of {record_bytes} bytes")
        self._device = device
        self._base = device.allocate(self.capacity * record_bytes)
        self._fences = Fences(device)
        self._free = deque(range(self.capacity))  # what was given back first is taken first
        self._filled: dict[int, bool] = {}  # of taken slots: whether a record is there, or being copied there

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots that are taken."""
        return len(self._filled) * self.record_bytes

    def address(self, slot: int) -> int:
        """Return the address of a slot."""
        return self._base + slot * self.record_bytes

    def take(self, n: int) -> list[int]:
        """Return n slots that are now the caller's, and empty.

        Raises:
            PoolFull: Fewer are free.
        """
        if n > len(self._free):
            raise PoolFull(f"the device has no {n} free slots, but {len(self._free)}")
        slots = [self._free.popleft() for _ in range(n)]
        self._filled |= dict.fromkeys(slots, False)
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        """Give slots back; pending work may still use them.

        Raises:
            ValueError: A slot is not taken, is named twice or is within a scope of `use`; nothing changes.
        """
        if len(set(slots)) != len(slots) or any(
            slot not in self._filled or self._fences.open(slot) for slot in slots
        ):
            raise ValueError("a slot is given back twice, within its use, or was never taken")
        for slot in slots:
            del self._filled[slot]
        self._free.extend(slots)

    def fill(self, slots: Sequence[int], sources: Sequence[int]) -> DeviceEvent:
        """Copy records into slots and return the event behind the copies.

        Args:
            slots: Where they go.
            sources: Addresses in registered host memory, which must stay as it is until the event.

        Raises:
            OutOfMemory: The slots are then empty, or hold what they held.
        """
        pairs = zip(slots, sources, strict=True)
        copies = [Copy(self.address(slot), source, self.record_bytes) for slot, source in pairs]
        with self.use(Stream.COPY_IN, writes=slots) as copied:
            self._device.copy(Stream.COPY_IN, copies)
        return copied

    def drain(self, slots: Sequence[int], targets: Sequence[int]) -> DeviceEvent:
        """Copy records out of slots and return the event behind the copies.

        Args:
            slots: Where they are.
            targets: Addresses in registered host memory, which must not be used until the event.

        Raises:
            OutOfMemory: Nothing is copied then.
        """
        pairs = zip(slots, targets, strict=True)
        copies = [Copy(target, self.address(slot), self.record_bytes) for slot, target in pairs]
        with self.use(Stream.COPY_OUT, reads=slots) as copied:
            self._device.copy(Stream.COPY_OUT, copies)
        return copied

    @contextmanager
    def use(
        self, stream: Stream, *, reads: Iterable[int] = (), writes: Iterable[int] = ()
    ) -> Iterator[DeviceEvent]:
        """Return a scope: work given to the stream in it reads and overwrites slots.

        An error in the scope leaves the slots that it writes empty.

        Args:
            stream: The stream that the work in the scope is given to.
            reads: Slots that the work reads.
            writes: Slots that it overwrites.

        Yields:
            The event behind that work, which is meaningful once the scope is left.

        Raises:
            OutOfMemory: Before the scope is entered.
            ValueError: A slot is not taken, or one that is read is empty.
        """
        reads, writes = tuple(reads), tuple(writes)
        if not all(map(self._filled.get, reads)) or not self._filled.keys() >= set(writes):
            raise ValueError("a slot is not taken, or is read before it was written")
        with self._fences.use(stream, reads=reads, writes=writes) as event:
            self._filled |= dict.fromkeys(writes, False)
            yield event
            self._filled |= dict.fromkeys(writes, True)

    def settle(self) -> None:
        """Block until no pending work uses a slot.

        Raises:
            OutOfMemory: An event could not be recorded.
        """
        self._fences.settle(range(self.capacity))

    def close(self) -> None:
        """Wait for all work on slots and free them.

        Raises:
            OutOfMemory: It may be called again then.
        """
        if self._base:
            self.settle()
            self._device.free(self._base)
            self._base = 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless free and taken slots partition the pool."""
        assert sorted([*self._free, *self._filled]) == list(range(self.capacity)), (
            "a slot is lost, or twice there"
        )
        assert self.capacity * self.record_bytes <= self.budget_bytes, "the pool is larger than its budget"
