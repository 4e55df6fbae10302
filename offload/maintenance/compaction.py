"""Compaction: runs from the ends of segment files move into holes, so that the files can be shortened.

A hole takes only runs of one size, so runs that were evicted leave a quota full of holes that the next, of
another size, cannot use. Every move makes a file shorter and none longer, so moving comes to an end.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from spilld.offload.disk.files.extent import RunMove
from spilld.offload.disk.spiller import CLOSE_S
from spilld.offload.disk.tier import DiskTier
from spilld.offload.errors import (
    ExtentCorrupt,
    ExtentMissing,
    OffloadError,
    WriteFailed,
)
from spilld.offload.prefix_cache.run_cache import RunCache
from spilld.offload.record import round_up
from spilld.offload.system import PAGE, page_aligned

from .token_bucket import Bucket
from .wear import WriteBudget

log = logging.getLogger(__name__)

WORTH = 8
"""A move is worth it when holes are more than one in so many of the files' bytes."""

LOOK_S = 1.0
"""Seconds until the next search for a run to move, when there was none."""

PAUSE_S = 60.0
"""Seconds without moves after a failed one."""


@dataclass(frozen=True)
class _MoveJob:
    """The I/O thread's work for a move, and what the owner does once that has ended."""

    move: RunMove
    work: Callable[[RunMove], None]
    then: Callable[[RunMove, OffloadError | None], None]


class Compaction:
    """Moves runs one at a time on one I/O thread, with one scratch buffer of scratch_bytes.

    A move: every extent is read, verified and written to the new place, which is synced; the index row is
    changed; the index is synced; the old bytes are given back. Whatever fails, the run is where the index
    says. One whose bytes are not what was written is discarded instead. One owner thread calls every method.
    """

    def __init__(
        self,
        disk: DiskTier,
        cache: RunCache,
        extent_bytes: int,
        rate: int,
        clock: Callable[[], float] = time.monotonic,
        wear: WriteBudget | None = None,
    ) -> None:
        """Start the I/O thread.

        Args:
            disk: The disk tier.
            cache: Forgets runs whose bytes are not what was written.
            extent_bytes: Bytes of the largest extent that is moved.
            rate: Bytes of runs that move in a second, and may move at once. The last move may exceed it, and
                the next waits for that.
            clock: Seconds.
            wear: The budget that moves count against; they wait while it is short.
        """
        self._disk = disk
        self._cache = cache
        self._clock = clock
        self._wear = wear
        self._bucket = Bucket(rate, 1.0, clock)
        self._scratch = page_aligned(round_up(extent_bytes, PAGE), huge=True)
        self.scratch_bytes = len(self._scratch)
        self.bytes_moved = 0
        self.failures = 0
        self.moving = False
        self._not_before = clock()
        self._stopping = False
        self._jobs: queue.SimpleQueue[_MoveJob | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[tuple[_MoveJob, OffloadError | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="spilld-move", daemon=True)
        self._thread.start()

    def step(self, *, begin: bool) -> None:
        """Finish a move that has ended, and begin one if `begin` and one is worth it; never blocks."""
        self._take_in()
        if begin and self._due():
            self._begin()

    def wait(self, timeout_s: float) -> None:
        """Block until a move that is under way has ended, or the time is over."""
        until = time.monotonic() + timeout_s
        while self.moving and (left := until - time.monotonic()) > 0:
            try:
                self._end(*self._outcomes.get(timeout=left))
            except queue.Empty:
                return

    def close(self) -> None:
        """Stop: a move that is not in the index yet is given up; its I/O is abandoned after CLOSE_S."""
        self._stopping = True
        self._jobs.put(None)
        self._thread.join(CLOSE_S)
        self._take_in()
        if self.moving:
            log.warning("closed while a move is stuck in the kernel")

    def _due(self) -> bool:
        return (
            not self.moving
            and WORTH * self._disk.hole_bytes > self._disk.used_bytes
            and self._bucket.left > 0
            and self._clock() >= self._not_before
            and (self._wear is None or self._wear.comfortable)
        )

    def _begin(self) -> None:
        move = self._disk.relocate(self.scratch_bytes)
        if move is None:
            self._not_before = self._clock() + LOOK_S
            return
        self._disk.hold(move.source)
        self._disk.hold(move.target)
        self._bucket.spend(move.nbytes)
        if self._wear is not None:
            self._wear.spend(move.nbytes)
        self.moving = True
        self._jobs.put(_MoveJob(move, self._copy, self._copied))

    def _take_in(self) -> None:
        while True:
            try:
                outcome = self._outcomes.get_nowait()
            except queue.Empty:
                return
            self._end(*outcome)

    def _end(self, job: _MoveJob, error: OffloadError | None) -> None:
        job.then(job.move, error)

    def _copied(self, move: RunMove, error: OffloadError | None) -> None:
        if error is None:
            error = self._commit(move)
        self._disk.release(move.target)
        if error is None:
            self.bytes_moved += move.nbytes
            self._jobs.put(_MoveJob(move, self._make_durable, self._settled))
        else:
            self._disk.abandon(move.target)
            self._settled(move, error)

    def _commit(self, move: RunMove) -> OffloadError | None:
        if self._stopping:
            return WriteFailed("the disk tier is being closed")
        try:
            self._disk.moved(move)
        except OffloadError as error:
            return error
        return None

    def _settled(self, move: RunMove, error: OffloadError | None) -> None:
        """End a move for which nothing is read or written any more."""
        self._disk.release(move.source)
        self.moving = False
        if isinstance(error, ExtentCorrupt):
            log.warning("run %s is discarded: %s", move.run.hex(), error)
            self._cache.discard(move.run)
        elif error is not None and not (self._stopping or isinstance(error, ExtentMissing)):
            log.warning("a move failed: %s", error)
            self.failures += 1
            self._not_before = self._clock() + PAUSE_S

    def _work(self) -> None:
        """Run the I/O thread; any error in a move becomes its result, and the thread goes on."""
        while (job := self._jobs.get()) is not None:
            self._outcomes.put((job, self._try(job)))

    def _try(self, job: _MoveJob) -> OffloadError | None:
        try:
            job.work(job.move)
        except OffloadError as error:
            return error
        except Exception as error:
            log.exception("unexpected error in a move")
            failed = WriteFailed(f"unexpected: {error!r}")
            failed.__cause__ = error
            return failed
        return None

    def _copy(self, move: RunMove) -> None:
        for layer in range(move.source.identity.layers):
            if self._stopping:
                raise WriteFailed("the disk tier is being closed")
            self._disk.io.copy_extent(move, layer, self._scratch)
        self._disk.io.sync(move.target)

    def _make_durable(self, _: RunMove) -> None:
        """Sync the index before the old bytes are used again: a power cut must not bring the old row back."""
        self._disk.io.sync_index()
