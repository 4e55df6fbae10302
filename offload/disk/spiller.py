"""Writes in the background: runs go from host memory to disk on an I/O thread."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spilld.offload.disk.files.extent import RunKey, RunPlace
from spilld.offload.errors import WriteFailed
from spilld.offload.record import round_up
from spilld.offload.system import PAGE, Bytes, Rows, page_aligned

from .tier import DiskTier

log = logging.getLogger(__name__)

CLOSE_S = 30.0
"""Seconds that close waits for a write that the kernel still has."""


@dataclass(frozen=True)
class Spilled:
    """The end of a write: the run is on disk, or `error` says why it is not."""

    run: RunKey
    error: WriteFailed | None

    @property
    def ok(self) -> bool:
        """Whether the run is on disk."""
        return self.error is None


@dataclass(frozen=True)
class _SpillJob:
    place: RunPlace
    records: Sequence[Bytes]
    rows: Rows


@dataclass(frozen=True)
class _SpillOutcome:
    job: _SpillJob
    error: WriteFailed | None
    seconds: float


class Spiller:
    """Writes reserved runs in submission order on one I/O thread, with one scratch buffer of scratch_bytes.

    One owner thread calls every method. A run that was submitted is reported exactly once by finished
    or wait, by then committed in the disk tier or, with an error, absent from it.
    """

    def __init__(
        self, disk: DiskTier, extent_bytes: int, on_write: Callable[[float], object] = lambda seconds: None
    ) -> None:
        """Start the I/O thread.

        Args:
            disk: The disk tier.
            extent_bytes: Bytes of the largest extent that will be written.
            on_write: Called by the owner's thread with the seconds of each run that was written.
        """
        self._disk = disk
        self._on_write = on_write
        self._scratch = page_aligned(round_up(extent_bytes, PAGE), huge=True)
        self.scratch_bytes = len(self._scratch)
        self.write_seconds = 0.0
        self.bytes_written = 0
        self.failures = 0
        self.pending = 0
        self._stopping = False
        self._jobs: queue.SimpleQueue[_SpillJob | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[_SpillOutcome] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="spilld-write", daemon=True)
        self._thread.start()

    def submit(self, place: RunPlace, records: Sequence[Bytes], rows: Rows) -> None:
        """Write records[layer][rows[layer]] for every layer; never blocks.

        The rows must keep their records until the run is reported. The owner may abandon the place
        meanwhile: the run is then reported as failed.

        Args:
            place: Where the run is to lie, reserved.
            records: Of each layer `[any, record_bytes] uint8`.
            rows: `[layers, count] int64`, of the records.

        Raises:
            ValueError: The rows are not those of such a run, or an extent does not fit the scratch buffer.
        """
        if rows.shape != (len(records), place.identity.count) or len(records) != place.identity.layers:
            raise ValueError(
                f"rows of shape {rows.shape} for {place.identity.layers} x {place.identity.count}"
            )
        if place.identity.largest_extent > self.scratch_bytes:
            raise ValueError(
                f"an extent of {place.identity.largest_extent} bytes does not fit the scratch buffer"
            )
        self._disk.hold(place)
        self.pending += 1
        self._jobs.put(_SpillJob(place, records, rows.copy()))

    def finished(self) -> list[Spilled]:
        """Return runs that ended since the last call, committed or absent; never blocks."""
        return self._settle(self._ended())

    def wait(self, timeout_s: float) -> list[Spilled]:
        """Return runs that ended, blocking until there is one, none is pending, or the time is over."""
        if not self.pending:
            return []
        try:
            first = self._outcomes.get(timeout=timeout_s)
        except queue.Empty:
            return []
        return self._settle([first, *self._ended()])

    def close(self) -> None:
        """Stop: runs not written yet fail, the one being written is finished unless it takes over CLOSE_S."""
        self._stopping = True
        self._jobs.put(None)
        self._thread.join(CLOSE_S)
        self.finished()
        if self.pending:
            log.warning("closed while %d runs are stuck in the kernel", self.pending)

    def _ended(self) -> list[_SpillOutcome]:
        found: list[_SpillOutcome] = []
        while not self._outcomes.empty():  # only the owner takes from it
            found.append(self._outcomes.get_nowait())
        return found

    def _settle(self, outcomes: Sequence[_SpillOutcome]) -> list[Spilled]:
        """Commit what was written in one transaction, and report all outcomes."""
        written = [o.job.place for o in outcomes if o.error is None and self._disk.awaits(o.job.place)]
        refused = self._commit(written)
        return [self._report(outcome, refused) for outcome in outcomes]

    def _commit(self, places: Sequence[RunPlace]) -> WriteFailed | None:
        try:
            if places:
                self._disk.commit(*places)
        except WriteFailed as error:
            return error
        return None

    def _report(self, outcome: _SpillOutcome, refused: WriteFailed | None) -> Spilled:
        place, error = outcome.job.place, outcome.error
        self.pending -= 1
        self.write_seconds += outcome.seconds
        if error is None and place.run not in self._disk:
            error = (
                refused if self._disk.awaits(place) else WriteFailed(f"run {place.run.hex()} was abandoned")
            )
        if error is None:
            self.bytes_written += place.range.nbytes
            self._on_write(outcome.seconds)
        else:
            log.warning("write failed: %s", error)
            self.failures += 1
            if self._disk.awaits(place):
                self._disk.abandon(place)
        self._disk.release(place)
        return Spilled(place.run, error)

    def _work(self) -> None:
        """Run the I/O thread; any error in a run becomes its result, and the thread goes on."""
        while (job := self._jobs.get()) is not None:
            began = time.monotonic()
            error = self._write(job)
            self._outcomes.put(_SpillOutcome(job, error, time.monotonic() - began))

    def _write(self, job: _SpillJob) -> WriteFailed | None:
        try:
            for layer in range(job.place.identity.layers):
                if self._stopping:
                    return WriteFailed("the disk tier is being closed")
                self._disk.io.write_extent(
                    job.place, layer, job.records[layer], job.rows[layer], self._scratch
                )
            self._disk.io.sync(job.place)
        except WriteFailed as error:
            return error
        except Exception as error:
            log.exception("unexpected error in a write")
            failed = WriteFailed(f"unexpected: {error!r}")
            failed.__cause__ = error
            return failed
        return None
