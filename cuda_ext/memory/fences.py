"""Ordering of uses of device memory: what must have ended before a place is used again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from spilld.cuda_ext.device.base import Device, DeviceEvent, Stream
from spilld.cuda_ext.errors import OutOfMemory


class Mark:
    """An event behind some work; if it cannot be recorded for want of memory, it is when it is needed.

    An event that is recorded late passes late, but never too early.
    """

    def __init__(self, device: Device[Any], stream: Stream) -> None:
        self._device, self._stream = device, stream
        self._event: DeviceEvent | None = None
        self._behind = {stream}  # streams whose later work comes after it

    def record(self) -> None:
        """Record the event now, if there is memory for it."""
        with contextlib.suppress(OutOfMemory):
            self._recorded()

    def before(self, stream: Stream) -> None:
        """See DeviceEvent.before."""
        if stream not in self._behind:
            self._recorded().before(stream)
            self._behind.add(stream)

    def passed(self) -> bool:
        """See DeviceEvent.passed."""
        return self._recorded().passed()

    def synchronise(self) -> None:
        """See DeviceEvent.synchronise."""
        self._recorded().synchronise()

    def _recorded(self) -> DeviceEvent:
        if self._event is None:
            self._event = self._device.record(self._stream)
        return self._event


class Fences:
    """Orders uses of numbered places on several streams; the host does not wait for them."""

    def __init__(self, device: Device[Any]) -> None:
        self._device = device
        self._written: dict[int, Mark] = {}
        self._read: dict[Stream, dict[int, Mark]] = {stream: {} for stream in Stream}
        self._open: list[set[int]] = []

    @contextmanager
    def use(
        self, stream: Stream, *, reads: Iterable[int] = (), writes: Iterable[int] = ()
    ) -> Iterator[DeviceEvent]:
        """Return a scope: work that is given to the stream in it uses these places.

        The work begins after the last write of what it reads, and after every use of what it writes. An error
        in the scope counts as work that was given.

        Args:
            stream: The stream that the work in the scope is given to.
            reads: Places that the work reads.
            writes: Places that it writes.

        Yields:
            The event behind that work, which is meaningful once the scope is left.

        Raises:
            OutOfMemory: Before the scope is entered.
        """
        reads, writes = tuple(reads), tuple(writes)
        for before in self._before(reads, writes):
            before.before(stream)
        mark = Mark(self._device, stream)
        places = {*reads, *writes}
        self._open.append(places)
        try:
            yield mark
        finally:
            self._open.remove(places)
            self._note(mark, stream, reads, writes)
            mark.record()

    def open(self, place: int) -> bool:
        """Return whether a scope that uses the place is not left yet."""
        return any(place in places for places in self._open)

    def settled(self, places: Iterable[int]) -> bool:
        """Return whether no pending work uses these places; never blocks.

        Raises:
            OutOfMemory: An event could not be recorded.
        """
        return all(self._settled(place) for place in places)

    def settle(self, places: Iterable[int]) -> None:
        """Block until no pending work uses these places.

        Raises:
            OutOfMemory: An event could not be recorded.
        """
        for mark in self._before((), tuple(places)):
            mark.synchronise()

    def _before(self, reads: tuple[int, ...], writes: tuple[int, ...]) -> Iterable[Mark]:
        """What must have ended before these uses; each once, in a fixed order."""
        marks = [*map(self._written.get, (*reads, *writes))]
        for read in self._read.values():
            marks += map(read.get, writes)
        return dict.fromkeys(filter(None, marks))

    def _note(self, mark: Mark, stream: Stream, reads: tuple[int, ...], writes: tuple[int, ...]) -> None:
        self._read[stream].update(dict.fromkeys(reads, mark))
        self._written.update(dict.fromkeys(writes, mark))
        for place in writes:
            self._forget_readers(place)  # they are before this write

    def _settled(self, place: int) -> bool:
        if not all(mark.passed() for mark in self._before((), (place,))):
            return False
        self._written.pop(place, None)
        self._forget_readers(place)
        return True

    def _forget_readers(self, place: int) -> None:
        for read in self._read.values():
            read.pop(place, None)
