"""Hot blocks in device memory: a pool of slots, each of which holds a record."""

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
    """Fewer slots are free than were asked for. Nothing was taken."""


class RecordPool:
    """A fixed number of slots in one allocation, and the only ledger of their bytes.

    Slots may be given back and taken again while work still uses them: what is written to a slot waits, on
    the device, for the last reader of what was there before. Owned by one thread.
    """

    def __init__(self, device: Device[Any], budget_bytes: int, record_bytes: int) -> None:
        """Raises ValueError when not even one record fits, and OutOfMemory."""
        self.budget_bytes, self.record_bytes = budget_bytes, record_bytes
        self.capacity = budget_bytes // record_bytes
        if self.capacity < 1:
            raise ValueError(f"a budget of {budget_bytes} bytes holds no record of {record_bytes} bytes")
        self._device = device
        self._base = device.allocate(self.capacity * record_bytes)
        self._fences = Fences(device)
        self._free = deque(range(self.capacity))  # what was given back first is taken first
        self._filled: dict[int, bool] = {}  # of taken slots: whether a record is there, or on its way

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used_bytes(self) -> int:
        return len(self._filled) * self.record_bytes

    def address(self, slot: int) -> int:
        return self._base + slot * self.record_bytes

    def take(self, n: int) -> list[int]:
        """Slots that are now the caller's, and hold nothing. Raises PoolFull."""
        if n > len(self._free):
            raise PoolFull(f"{n} slots asked of the device, {len(self._free)} are free")
        slots = [self._free.popleft() for _ in range(n)]
        self._filled |= dict.fromkeys(slots, False)
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        """Raises ValueError, changing nothing, if one is not taken, is named twice or is in use."""
        if len(set(slots)) != len(slots) or any(
            slot not in self._filled or self._fences.open(slot) for slot in slots
        ):
            raise ValueError("a slot is given back twice, within its use, or was never taken")
        for slot in slots:
            del self._filled[slot]
        self._free.extend(slots)

    def fill(self, slots: Sequence[int], sources: Sequence[int]) -> DeviceEvent:
        """Copy records in from these addresses of registered host memory, which must stay until the event.

        Raises OutOfMemory; the slots then hold nothing, or what they held.
        """
        pairs = zip(slots, sources, strict=True)
        copies = [Copy(self.address(slot), source, self.record_bytes) for slot, source in pairs]
        with self.use(Stream.COPY_IN, writes=slots) as landed:
            self._device.copy(Stream.COPY_IN, copies)
        return landed

    def drain(self, slots: Sequence[int], targets: Sequence[int]) -> DeviceEvent:
        """Copy records out to these addresses of registered host memory, which are theirs until the event.

        Raises OutOfMemory; nothing is copied then.
        """
        pairs = zip(slots, targets, strict=True)
        copies = [Copy(target, self.address(slot), self.record_bytes) for slot, target in pairs]
        with self.use(Stream.COPY_OUT, reads=slots) as landed:
            self._device.copy(Stream.COPY_OUT, copies)
        return landed

    @contextmanager
    def use(
        self, stream: Stream, *, reads: Iterable[int] = (), writes: Iterable[int] = ()
    ) -> Iterator[DeviceEvent]:
        """Work given to the stream in this scope reads these slots, and overwrites those.

        Yields the event behind that work, which means something once the scope is left.
        An error in the scope leaves those that it writes with nothing. Raises OutOfMemory before the scope is
        entered, and ValueError if a slot is not taken or what is read holds nothing.
        """
        reads, writes = tuple(reads), tuple(writes)
        if not all(map(self._filled.get, reads)) or not self._filled.keys() >= set(writes):
            raise ValueError("a slot is not taken, or is read before it was written")
        with self._fences.use(stream, reads=reads, writes=writes) as event:
            self._filled |= dict.fromkeys(writes, False)
            yield event
            self._filled |= dict.fromkeys(writes, True)

    def settle(self) -> None:
        """Block until nothing pending uses a slot. Raises OutOfMemory."""
        self._fences.settle(range(self.capacity))

    def close(self) -> None:
        """Wait for all work on slots and free them. Raises OutOfMemory, and may be called again then."""
        if self._base:
            self.settle()
            self._device.free(self._base)
            self._base = 0

    def check_integrity(self) -> None:
        """Free and taken slots partition the pool. AssertionError says otherwise."""
        assert sorted([*self._free, *self._filled]) == list(range(self.capacity)), (
            "a slot is lost, or twice there"
        )
        assert self.capacity * self.record_bytes <= self.budget_bytes, "the pool is larger than its budget"
