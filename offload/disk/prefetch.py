"""Reads ahead of need: extents go from disk into a ring of staging buffers while the engine computes."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from spilld.offload.disk.files.extent import HEADER_BYTES, RunPlace
from spilld.offload.errors import (
    BudgetTooSmall,
    ExtentCorrupt,
    ExtentMissing,
    ReadCancelled,
    ReadError,
    ReadFailed,
    ReadTimeout,
)
from spilld.offload.record import round_up
from spilld.offload.system import PAGE, Bytes, page_aligned

from .read_ticket import (
    ExtentRead,
    PrefetchStats,
    ReadState,
    Ticket,
)
from .tier import DiskTier

log = logging.getLogger(__name__)

CLOSE_S = 5.0
"""Seconds that close waits for reads that the kernel still has."""


@dataclass(frozen=True)
class _ReadJob:
    ticket: Ticket
    place: RunPlace
    buffer: int


@dataclass(frozen=True)
class _ReadOutcome:
    job: _ReadJob
    result: Bytes | ReadFailed
    seconds: float


class Prefetcher:
    """A ring of `buffers` staging buffers, filled in submission order by I/O threads.

    One owner thread calls every method. Each submitted read ends loaded, failed or cancelled; a read
    that was issued ends by its deadline whether or not it is waited for. Each ticket ends in
    release or cancel.

    The rule of the ring: wait in submission order, and release (or cancel) before waiting for the
    ticket `buffers` places later. A wait that only the caller's own release could end raises RuntimeError.

    The run is held from submit until no thread reads it any more. A buffer whose read timed out or was
    cancelled is out of the ring until its thread returns.
    """

    def __init__(
        self,
        disk: DiskTier,
        buffers: int,
        extent_bytes: int,
        threads: int = 2,
        deadline_s: float = 30.0,
        on_read: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        """Allocate the buffers and start the threads.

        staging_bytes = buffers * extent_bytes, rounded up to 4096 a buffer, is all the memory there is.

        Args:
            disk: The disk tier.
            buffers: Number of staging buffers.
            extent_bytes: Bytes of the largest extent that is read.
            threads: Number of I/O threads.
            deadline_s: Seconds after which a read has failed.
            on_read: Called by the owner's thread with the seconds of each read that succeeded.

        Raises:
            BudgetTooSmall: There is no buffer, or no thread.
        """
        size = round_up(extent_bytes, PAGE)
        if buffers < 1 or threads < 1:
            raise BudgetTooSmall(f"{buffers} staging buffers and {threads} threads cannot read")
        self._disk = disk
        self.deadline_s = deadline_s
        self._on_read = on_read
        self.buffers = buffers
        self.staging_bytes = buffers * size
        self.stats = PrefetchStats()
        self.memory = page_aligned(self.staging_bytes, huge=True)
        self._buffers = self.memory.reshape(buffers, size)
        self._free = deque(range(buffers))
        self._queued: deque[Ticket] = deque()
        self._issued: dict[Ticket, None] = {}  # the oldest first
        self._abandoned: set[int] = set()
        self._loaded: set[int] = set()
        self._ended: dict[Ticket, None] = {}
        self._jobs: queue.SimpleQueue[_ReadJob | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[_ReadOutcome] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"spilld-read-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, reads: Sequence[ExtentRead]) -> list[Ticket]:
        """Queue reads behind those submitted before; never blocks. A missing run is a failed ticket."""
        tickets = [Ticket(read) for read in reads]
        for ticket in tickets:
            try:
                ticket.place = self._disk.locate(ticket.read.run)
            except ExtentMissing as error:
                self._fail(ticket, error)
            else:
                self._check(ticket.read, ticket.place)
        for ticket in tickets:
            if ticket.place is not None:
                self._disk.hold(ticket.place)
                self._queued.append(ticket)
        self._advance()
        return tickets

    def finished(self) -> list[Ticket]:
        """Return tickets that were loaded or failed and were not reported, waited for or released yet."""
        self._advance()
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def wait(self, ticket: Ticket) -> Bytes:
        """Block until the read ends.

        Returns:
            Its verified records, `[count, record_bytes] uint8`, valid until release.

        Raises:
            ReadFailed: The error that the read ended with. It is ReadTimeout when deadline_s has passed since
                the read was issued, or since this wait began if it was not issued by then.
            RuntimeError: Every buffer that the read could get is held by the caller.
            ValueError: The ticket was released before.
        """
        self._advance()
        if ticket.state in (ReadState.QUEUED, ReadState.ISSUED):
            began = time.monotonic()
            try:
                self._await_end(ticket, began)
            finally:
                ticket.stalled = True
                self.stats.stalls += 1
                self.stats.stall_seconds += time.monotonic() - began
        elif ticket.state is ReadState.LOADED:
            self.stats.hits += 1
        self._ended.pop(ticket, None)
        if ticket.error is not None:
            raise ticket.error
        if ticket.records is None:
            raise ValueError("the ticket was released before")
        return ticket.records

    def offset(self, ticket: Ticket) -> int:
        """Return where in `memory`, the whole ring as bytes, the first record of a loaded ticket lies."""
        if ticket.state is not ReadState.LOADED:
            raise ValueError(f"a ticket that {ticket.state.value} has no records")
        return ticket.buffer * self._buffers.shape[1] + HEADER_BYTES

    def release(self, ticket: Ticket) -> None:
        """Let the buffer of a ticket take the next read; its records must not be used any more."""
        if ticket.state in (ReadState.QUEUED, ReadState.ISSUED, ReadState.RELEASED):
            raise ValueError(f"cannot release a ticket that {ticket.state.value}")
        self._ended.pop(ticket, None)
        if ticket.state is ReadState.LOADED:
            self._drop(ticket, ReadState.RELEASED)
        self._advance()

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """Forget reads in any state: queued ones never start, issued ones are dropped when they return."""
        for ticket in tickets:
            self._ended.pop(ticket, None)
            if ticket.state is ReadState.LOADED:
                self._drop(ticket, ReadState.CANCELLED)
            elif ticket.state in (ReadState.QUEUED, ReadState.ISSUED):
                self._abandon(ticket, ReadState.CANCELLED, ReadCancelled("cancelled by its owner"))
        self._queued = deque(ticket for ticket in self._queued if ticket.state is ReadState.QUEUED)
        self._advance()

    def close(self) -> None:
        """Cancel everything and stop the threads; one stuck in the kernel is abandoned after CLOSE_S."""
        self.cancel([*self._queued, *self._issued, *self._ended])
        for _ in self._threads:
            self._jobs.put(None)
        until = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._collect()
        if self._abandoned:
            log.warning("closed while %d reads are stuck in the kernel", len(self._abandoned))

    def check_integrity(self) -> None:
        """Check that every buffer is free, being read into, left to an abandoned read, or holds records."""
        issued = [ticket.buffer for ticket in self._issued]
        everything = sorted([*self._free, *issued, *self._abandoned, *self._loaded])
        assert everything == list(range(len(self._buffers))), "a buffer has two users, or none"
        assert all(ticket.state is ReadState.QUEUED for ticket in self._queued), (
            "an ended read waits to be issued"
        )
        assert not (self._queued and self._free), "a read waits although a buffer is free"

    def _check(self, read: ExtentRead, place: RunPlace) -> None:
        nbytes = place.identity.extent_bytes(read.layer)
        if nbytes > self._buffers.shape[1]:
            raise ValueError(f"an extent of {nbytes} bytes does not fit a staging buffer")

    def _await_end(self, ticket: Ticket, began: float) -> None:
        while ticket.state in (ReadState.QUEUED, ReadState.ISSUED):
            since = min(began, ticket.issued) if ticket.state is ReadState.ISSUED else began
            left = since + self.deadline_s - time.monotonic()
            if left <= 0:
                self._time_out(ticket)
                return
            if ticket.state is ReadState.QUEUED and ticket not in islice(self._queued, len(self._abandoned)):
                raise RuntimeError("every staging buffer this read could get is held by the caller who waits")
            try:
                outcome = self._outcomes.get(timeout=left)
            except queue.Empty:
                continue
            self._settle(outcome)
            self._advance()

    def _advance(self) -> None:
        """Take in reads that ended, end those that are overdue, issue queued ones."""
        self._collect()
        now = time.monotonic()
        while self._issued:
            oldest = next(iter(self._issued))
            if oldest.issued + self.deadline_s > now:
                break
            self._time_out(oldest)
        while self._queued and self._free:
            ticket = self._queued.popleft()
            assert ticket.place is not None
            ticket.buffer = self._free.popleft()
            ticket.issued = now
            ticket.state = ReadState.ISSUED
            self._issued[ticket] = None
            self._jobs.put(_ReadJob(ticket, ticket.place, ticket.buffer))

    def _collect(self) -> None:
        while not self._outcomes.empty():  # only the owner takes from it
            self._settle(self._outcomes.get_nowait())

    def _settle(self, outcome: _ReadOutcome) -> None:
        """Take back the buffer and the place that a thread has finished with."""
        ticket = outcome.job.ticket
        self._disk.release(outcome.job.place)
        self.stats.read_seconds += outcome.seconds
        if not isinstance(outcome.result, ReadFailed):
            self.stats.reads += 1
            self.stats.bytes_read += outcome.job.place.identity.extent_bytes(ticket.read.layer)
            self._on_read(outcome.seconds)
        if outcome.job.buffer in self._abandoned:
            self._abandoned.remove(outcome.job.buffer)
            self._free.append(outcome.job.buffer)
            return
        del self._issued[ticket]
        if isinstance(outcome.result, ReadFailed):
            self._free.append(outcome.job.buffer)
            self._fail(ticket, outcome.result)
        else:
            ticket.state = ReadState.LOADED
            ticket.records = outcome.result
            self._loaded.add(ticket.buffer)
            self._ended[ticket] = None

    def _time_out(self, ticket: Ticket) -> None:
        error = ReadTimeout(
            f"layer {ticket.read.layer} of run {ticket.read.run.hex()} was not read in {self.deadline_s} s"
        )
        if ticket.state is ReadState.QUEUED:
            self._queued.remove(ticket)
        self._abandon(ticket, ReadState.FAILED, error)
        self._fail(ticket, error)

    def _abandon(self, ticket: Ticket, state: ReadState, error: ReadFailed) -> None:
        """End a ticket before its read: a queued one frees its place now, else the thread's return does."""
        assert ticket.place is not None
        if ticket.state is ReadState.QUEUED:
            self._disk.release(ticket.place)
        else:
            del self._issued[ticket]
            self._abandoned.add(ticket.buffer)
        ticket.state, ticket.error, ticket.wanted = state, error, False

    def _fail(self, ticket: Ticket, error: ReadFailed) -> None:
        log.warning("read failed: %s", error)
        self.stats.failures += 1
        self.stats.corrupt += isinstance(error, ExtentCorrupt)
        ticket.state, ticket.error = ReadState.FAILED, error
        self._ended[ticket] = None

    def _drop(self, ticket: Ticket, state: ReadState) -> None:
        """Take a loaded buffer back."""
        self._loaded.remove(ticket.buffer)
        self._free.append(ticket.buffer)
        ticket.state, ticket.records = state, None
        if state is ReadState.CANCELLED:
            ticket.error = ReadCancelled("cancelled by its owner")

    def _work(self) -> None:
        """Run an I/O thread; any error in a read becomes its result, and the thread goes on."""
        while (job := self._jobs.get()) is not None:
            began = time.monotonic()
            self._outcomes.put(_ReadOutcome(job, self._read(job), time.monotonic() - began))

    def _read(self, job: _ReadJob) -> Bytes | ReadFailed:
        if not job.ticket.wanted:
            return ReadCancelled("cancelled by its owner")
        try:
            return self._disk.io.read_extent(job.place, job.ticket.read.layer, self._buffers[job.buffer])
        except ReadFailed as error:
            return error
        except Exception as error:
            log.exception("unexpected error in a read")
            failed = ReadError(f"unexpected: {error!r}")
            failed.__cause__ = error
            return failed
