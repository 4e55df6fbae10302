"""The disk tier: runs of extents in segment files, their index, and a byte budget that is never exceeded."""

from __future__ import annotations

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from spilld.offload.disk.files.extent import (
    ExtentIdentity,
    RunKey,
    RunMove,
    RunPlace,
    run_bytes,
)
from spilld.offload.disk.files.extent_io import ExtentIO, write_error
from spilld.offload.disk.files.folder import StoreFolder
from spilld.offload.disk.files.segment import SEGMENT_BYTES, SegmentSpace
from spilld.offload.disk.files.segment_files import SegmentFiles
from spilld.offload.disk.index.index import Index
from spilld.offload.disk.index.index_row import Contents, IndexRow, consistent
from spilld.offload.errors import (
    BudgetTooSmall,
    ExtentMissing,
    FolderUnusable,
    IndexDamaged,
    WriteFailed,
)
from spilld.offload.size import size
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import SystemCalls

from .run_ledger import RunLedger, StoredRun

log = logging.getLogger(__name__)

NAMELESS = Contents(parent=b"")
"""Contents of a run that cannot be found again."""


class DiskTier:
    """Runs on disk. One owner thread calls everything; `io` is for I/O threads, on places that it holds.

    A run exists from commit until delete, also when the process ends in between; its bytes are not used again
    while a lease on it is held. used_bytes is what the segment files measure, at most budget_bytes.

    At start the index is compared with the length of the files; the contents of extents are verified when
    they are read. Bytes that no row names are freed. Runs of other models are kept: they only take room.
    """

    def __init__(
        self,
        folder: Path,
        budget_bytes: int,
        layouts: StoreLayout,
        fingerprint: bytes,
        system: SystemCalls | None = None,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        floor_bytes: int = 0,
    ) -> None:
        """Make the folder (0700) if its parent exists, lock it, and probe for O_DIRECT.

        A damaged index is put aside, and what it named is lost.

        Args:
            folder: Where the files lie.
            budget_bytes: The most that the segment files may measure together.
            layouts: Of the records that are written unless others are named.
            fingerprint: 32 bytes, of the model that may read what is written.
            system: The calls to the kernel.
            segment_bytes: How long a segment file may grow.
            floor_bytes: What the file system must have left after each growth of a file.

        Raises:
            BudgetTooSmall: A run of one block does not fit.
            FolderInUse: Another daemon holds the folder.
            FolderUnusable: It cannot be made or written.
        """
        smallest = run_bytes(layouts, 1)
        if budget_bytes < smallest:
            raise BudgetTooSmall(
                f"a run of one block takes {size(smallest, least=True)} of disk, not {size(budget_bytes)}"
            )
        self.budget_bytes = budget_bytes
        self.layouts = layouts
        self.fingerprint = fingerprint
        self.system = system or SystemCalls()
        self._ledger = RunLedger()
        self._folder = StoreFolder(folder, self.system)
        self._files = SegmentFiles(
            self._folder, self.system, SegmentSpace(budget_bytes, segment_bytes), floor_bytes
        )
        self._closed = False
        try:
            self.index = Index(self._folder.index)
        except (OSError, IndexDamaged) as error:
            self._folder.close()
            raise FolderUnusable(f"{folder}: {error}") from error
        self.io = ExtentIO(self.system, folder, self.index.log)
        try:
            self._recover()
        except (OSError, IndexDamaged) as error:
            self.close()
            raise FolderUnusable(f"{folder}: {error}") from error

    def _recover(self) -> None:
        """Take over the runs that the index names and the files contain; free all other bytes."""
        files = self._folder.segments()
        sizes = {number: path.stat().st_size for number, path in files.items()}
        found, lost = consistent(self.index.entries(), sizes)
        by_segment: dict[int, list[IndexRow]] = defaultdict(list)
        for row in found:
            by_segment[row.range.segment].append(row)
        for number, path in files.items():
            self._files.adopt(number, path, [row.range for row in by_segment[number]])
            for row in by_segment[number]:
                place = RunPlace(row.identity, row.range, self._files[number].descriptor, fresh=False)
                self._ledger.add(StoredRun(place, row.contents, committed=True))
        if lost:
            log.warning("%s: %d runs are lost, their bytes are missing", self._folder.path, len(lost))
            self.index.remove(row.identity.run for row in lost)
        if self.used_bytes > self.budget_bytes:
            log.warning(
                "%s: %s of KV is stored, and disk_budget is %s: what was not used for longest goes now, and "
                "is computed again when it is needed",
                *(self._folder.path, size(self.used_bytes), size(self.budget_bytes)),
            )
        self._shrink(found)

    def _shrink(self, rows: Sequence[IndexRow]) -> None:
        """Delete runs, in this order, until the files fit the budget."""
        at = 0
        while (excess := self.used_bytes - self.budget_bytes) > 0 and at < len(rows):
            sums = itertools.accumulate(row.range.nbytes for row in rows[at:])
            count = next((i for i, total in enumerate(sums, 1) if total >= excess), len(rows) - at)
            self.delete(*(row.identity.run for row in rows[at : at + count]))
            at += count

    @property
    def direct(self) -> bool:
        """Whether reads and writes bypass the page cache."""
        return self._folder.direct

    @property
    def used_bytes(self) -> int:
        """Length of all segment files: runs, and holes between them."""
        return self._files.space.used_bytes

    @property
    def hole_bytes(self) -> int:
        """Bytes of the segment files in which no run lies."""
        return self._files.space.hole_bytes

    def __contains__(self, run: RunKey) -> bool:
        """Whether the run is committed and not deleted."""
        return run in self._ledger

    def run_bytes(self, count: int, layouts: StoreLayout | None = None) -> int:
        """Return the bytes on disk of a run of count blocks, all layers."""
        return run_bytes(layouts or self.layouts, count)

    def runs(self) -> list[RunPlace]:
        """Return every committed run, of any model, the least recently used first."""
        places = self._ledger.places()
        keys = [row.identity.run for row in self.index.entries()]
        return [places[key] for key in keys if key in places]

    def contents(self, run: RunKey) -> Contents:
        """Return what a committed run is found by.

        Raises:
            ExtentMissing: There is no such run.
        """
        return self._ledger.present(run).contents

    def touch(self, runs: Iterable[RunKey]) -> None:
        """Note that runs were used now."""
        self.index.touch(runs, int(time.time()))

    def write_notes(self) -> None:
        """Write what the index has noted; if that fails, it is logged and forgotten."""
        try:
            self.index.write_notes()
        except (OSError, IndexDamaged) as error:
            log.warning("the use of runs is not noted: %s", error)
            self.index.forget_notes()

    def reserve(
        self,
        run: RunKey,
        *,
        first: int,
        count: int,
        chain_hash: bytes,
        contents: Contents = NAMELESS,
        layouts: StoreLayout | None = None,
    ) -> RunPlace:
        """Reserve space for a run of count blocks; to be followed by commit or abandon.

        On an error nothing has changed.

        Args:
            run: The run's key, which is new.
            first: Its first block, as a number of its sequence.
            count: How many blocks it has.
            chain_hash: Of its last block.
            contents: What the index finds it by once it is committed.
            layouts: Of its records, if they are not those of the tier.

        Raises:
            TierFull: There is no room.
            WriteFailed: The file cannot be made or grown.
            ValueError: The run is already there.
        """
        if self._ledger.knows(run):
            raise ValueError(f"run {run.hex()} is already there")
        identity = ExtentIdentity(layouts or self.layouts, self.fingerprint, run, chain_hash, first, count)
        try:
            found, file = self._files.allocate(identity.run_bytes)
        except OSError as error:
            raise write_error(f"no room for run {run.hex()}", error) from error
        place = RunPlace(identity, found, file.descriptor, fresh=not file.durable_name)
        self._ledger.add(StoredRun(place, contents))
        return place

    def commit(self, *places: RunPlace) -> None:
        """Make runs exist; every layer of each has been written, then synced.

        Raises:
            WriteFailed: The index does not take their rows; all of them still wait, to be abandoned.
        """
        waiting = [self._ledger.waiting(place) for place in places]
        now = int(time.time())
        try:
            self.index.add(*(IndexRow(s.place.identity, s.place.range, s.contents, now) for s in waiting))
        except (OSError, IndexDamaged) as error:
            runs = ", ".join(place.run.hex() for place in places)
            raise WriteFailed(f"run {runs} is in no index: {error}") from error
        for stored in waiting:
            stored.committed = True
            self._files[stored.place.range.segment].durable_name = True

    def awaits(self, place: RunPlace) -> bool:
        """Return whether the place is reserved and neither committed nor abandoned."""
        stored = self._ledger.at(place)
        return stored is not None and not stored.committed and not stored.deleted

    def abandon(self, place: RunPlace) -> None:
        """Give up a reserved run; its space is free once no lease is left. After commit, use delete."""
        stored = self._ledger.waiting(place)
        stored.deleted = True
        self._reclaim(stored)

    def delete(self, *runs: RunKey) -> None:
        """Forget runs; the space of each is free once no lease on it is left.

        If their rows cannot be removed, their space stays taken: a row must not come to name other bytes.

        Raises:
            ExtentMissing: One of them is not there; none is forgotten then.
        """
        gone = [self._ledger.present(run) for run in runs]
        try:
            self.index.remove(runs)
        except (OSError, IndexDamaged) as error:
            for run in runs:
                log.warning("run %s keeps its space until the next start: %s", run.hex(), error)
            for stored in gone:
                stored.row_remains = True
        for stored in gone:
            stored.deleted = True
            self._reclaim(stored)

    def relocate(self, extent_bytes: int) -> RunMove | None:
        """Reserve space elsewhere for a run whose move would shorten a file; None if there is no such run.

        Hold both places, and follow with moved, or with abandon of the target.

        Args:
            extent_bytes: Bytes of the largest extent that can be copied.
        """
        space = self._files.space
        for number, hole in space.moves():
            stored = self._ledger.movable(space.last(number))
            if stored is not None and stored.place.identity.largest_extent <= extent_bytes:
                space.take(hole)
                file = self._files[hole.segment]
                target = RunPlace(stored.place.identity, hole, file.descriptor, fresh=not file.durable_name)
                self._ledger.add_target(StoredRun(target, stored.contents))
                return RunMove(stored.place, target)
        return None

    def moved(self, move: RunMove) -> None:
        """Let a run lie in its new place; every layer has been copied, then synced.

        Its old bytes are free once no lease on them is left. On an error the target waits to be abandoned.

        Raises:
            ExtentMissing: The run was deleted or moved meanwhile.
            WriteFailed: The index does not take the change.
        """
        target, source = self._ledger.waiting(move.target), self._ledger.present(move.run)
        if source.place != move.source:
            raise ExtentMissing(f"run {move.run.hex()} is no longer where it was copied from")
        try:
            self.index.move(move.run, move.target.range)
        except (OSError, IndexDamaged) as error:
            raise WriteFailed(f"run {move.run.hex()} stays where it is: {error}") from error
        target.committed, source.deleted = True, True
        self._files[move.target.range.segment].durable_name = True
        self._ledger.add(target)
        self._reclaim(source)

    def locate(self, run: RunKey) -> RunPlace:
        """Return where a committed run lies; hold it before reading.

        Raises:
            ExtentMissing: There is no such run.
        """
        return self._ledger.present(run).place

    def hold(self, place: RunPlace) -> None:
        """Lease a place: the run's bytes stay as they are until the matching release.

        Raises:
            ExtentMissing: The run is not there, or was deleted.
        """
        stored = self._ledger.at(place)
        if stored is None or stored.deleted:
            raise ExtentMissing(f"run {place.run.hex()} is not in the disk tier")
        stored.holds += 1
        self._files[place.range.segment].holds += 1

    def release(self, place: RunPlace) -> None:
        """End a lease; the last one of a deleted place frees its space.

        Raises:
            ValueError: There is no lease to end.
        """
        stored = self._ledger.at(place)
        if stored is None or stored.holds < 1:
            raise ValueError(f"run {place.run.hex()} is released more often than held")
        stored.holds -= 1
        file = self._files[place.range.segment]
        file.holds -= 1
        if not self._closed:
            self._reclaim(stored)
        elif not file.holds:
            self._files.close_file(place.range.segment)
            if not len(self._files):
                self._folder.close()

    def check_integrity(self) -> None:
        """Check that ranges partition the segments, file lengths fit, and the index knows the runs."""
        self._files.check_integrity([stored.place.range for stored in self._ledger])
        self._ledger.check_integrity()
        self.index.check_integrity()
        rows = {row.identity.run: (row.identity, row.range) for row in self.index.entries()}
        known = {run: (place.identity, place.range) for run, place in self._ledger.places().items()}
        assert rows == known, "the index and the tier know different runs"

    def close(self) -> None:
        """Close the segments and the index, and unlock the folder. Runs that wait for a commit are lost.

        Files of runs still held stay open until their release: an I/O thread may be stuck in one, and its
        descriptor must not come to mean another file. The folder stays locked as long: what such a thread
        writes must not end up in a file of the next daemon.
        """
        still_open = self._files.close()
        self._closed = True
        if still_open:
            log.warning(
                "%s: closed while %d segment files are being read or written", self._folder.path, still_open
            )
        self.write_notes()
        self.index.close()
        if not still_open:
            self._folder.close()

    def _reclaim(self, stored: StoredRun) -> None:
        """Free the space of a deleted run, or of one that was moved away, once no lease on it is left."""
        if stored.unused and not self._closed:
            self._ledger.remove(stored)
            self._files.free(stored.place.range)
