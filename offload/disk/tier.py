"""The disk tier: runs of extents in segment files, their index, and a byte budget that is never exceeded."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spilld.offload.disk.files.extent import (
    ExtentIdentity,
    Move,
    RunKey,
    RunPlace,
    extent_bytes,
)
from spilld.offload.disk.files.folder import Folder
from spilld.offload.disk.files.segment import SEGMENT_BYTES, Range, SegmentSpace
from spilld.offload.disk.index.index import (
    Contents,
    Entry,
    Index,
    consistent,
)
from spilld.offload.errors import (
    BudgetTooSmall,
    ExtentCorrupt,
    ExtentMissing,
    FolderUnusable,
    IndexDamaged,
    ReadError,
    TierFull,
    WriteFailed,
    WriteRefused,
)
from spilld.offload.host.slab import Rows
from spilld.offload.record import Layout
from spilld.offload.size import size
from spilld.offload.system import (
    Bytes,
    SystemCalls,
    page_aligned,
    read_fully,
    write_fully,
)

from .files import extent

log = logging.getLogger(__name__)

PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR}
"""Errors that say nothing of the disk: what it would take comes back."""

NAMELESS = Contents(parent=b"")
"""Of a run that nobody will look for."""


@dataclass
class _Run:
    place: RunPlace
    contents: Contents
    committed: bool = False
    doomed: bool = False
    named: bool = False
    """Forgotten, but its row could not be removed: its space stays taken, for that row may come back."""
    holds: int = 0


@dataclass
class _File:
    file: int
    durable_name: bool = False


class DiskTier:
    """Runs on disk. One owner thread calls everything but write_extent, copy_extent, sync, sync_index and
    read_extent.

    Those run on I/O threads, on a place that the owner holds; they touch the place, their buffer
    and the file, and no state of the tier. A run exists from commit until delete, also when the process ends
    in between; its bytes are not used again while anybody holds it. used_bytes is what the segment files
    measure, at most budget_bytes.

    At start the index is held against the length of the files; what the extents contain is looked at when
    they are read. Bytes that no row names are collected. Runs of other models are kept: they only take room.
    """

    def __init__(
        self,
        folder: Path,
        budget_bytes: int,
        layout: Layout,
        layers: int,
        fingerprint: bytes,
        system: SystemCalls | None = None,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        floor_bytes: int = 0,
    ) -> None:
        """Make the folder (0700) if its parent exists, lock it, and probe for O_DIRECT.

        Raises BudgetTooSmall if a run of one block does not fit, FolderInUse if another daemon holds
        the folder, FolderUnusable if it cannot be made or written. A damaged index is put aside, and what
        it named is lost. floor_bytes: what the file system must have left after each growth of a file.
        """
        smallest = layers * extent_bytes(layout, 1)
        if budget_bytes < smallest:
            raise BudgetTooSmall(
                f"a run of one block takes {size(smallest, least=True)} of disk, not {size(budget_bytes)}"
            )
        self.budget_bytes = budget_bytes
        self.floor_bytes = floor_bytes
        self.layout = layout
        self.layers = layers
        self.fingerprint = fingerprint
        self.system = system or SystemCalls()
        self._space = SegmentSpace(budget_bytes, segment_bytes)
        self._files: dict[int, _File] = {}
        self._runs: dict[RunKey, _Run] = {}
        self._aside: dict[Range, _Run] = {}
        """Where runs are being moved to, and where those that were moved are still held."""
        self._folder = Folder(folder, self.system)
        self._closed = False
        try:
            self.index = Index(self._folder.index)
        except (OSError, IndexDamaged) as error:
            self._folder.close()
            raise FolderUnusable(f"{folder}: {error}") from error
        try:
            self._recover()
        except (OSError, IndexDamaged) as error:
            self.close()
            raise FolderUnusable(f"{folder}: {error}") from error

    def _recover(self) -> None:
        """Take over the runs that the index names and whose bytes the files have; collect all other bytes."""
        files = self._folder.segments()
        sizes = {number: path.stat().st_size for number, path in files.items()}
        found, lost = consistent(self.index.entries(), sizes)
        for number, path in files.items():
            self._take_over(number, path, [entry for entry in found if entry.range.segment == number])
        if lost:
            log.warning("%s: %d runs are lost, their bytes are not there", self._folder.path, len(lost))
            self.index.remove(entry.identity.run for entry in lost)
        if self.used_bytes > self.budget_bytes:
            log.warning(
                "%s: %s of KV is stored, and disk_budget is %s: what was not used for longest goes now, and "
                "is computed again when it is needed",
                *(self._folder.path, size(self.used_bytes), size(self.budget_bytes)),
            )
        for entry in found:
            if self.used_bytes <= self.budget_bytes:
                break
            self.delete(entry.identity.run)

    def _take_over(self, number: int, path: Path, entries: Sequence[Entry]) -> None:
        if not entries:
            self.system.unlink(path)
            return
        file = self.system.open(path, os.O_RDWR | self._folder.flags)
        self._files[number] = _File(file, durable_name=True)
        self._space.adopt(number, [entry.range for entry in entries])
        self.system.ftruncate(file, self._space.sizes()[number])
        for entry in entries:
            place = RunPlace(entry.identity, entry.range, file, fresh=False)
            self._runs[place.run] = _Run(place, entry.contents, committed=True)

    @property
    def direct(self) -> bool:
        """Whether reads and writes bypass the page cache."""
        return self._folder.direct

    @property
    def used_bytes(self) -> int:
        """Length of all segment files: runs, and holes between them."""
        return self._space.used_bytes

    @property
    def hole_bytes(self) -> int:
        """Bytes of the segment files in which no run lies."""
        return self._space.hole_bytes

    def __contains__(self, run: RunKey) -> bool:
        """Whether the run is committed and not deleted."""
        entry = self._runs.get(run)
        return entry is not None and entry.committed and not entry.doomed

    def run_bytes(self, count: int, layout: Layout | None = None) -> int:
        """Bytes on disk of a run of count blocks, all layers."""
        return self.layers * extent_bytes(layout or self.layout, count)

    def runs(self) -> list[RunPlace]:
        """Every committed run, of any model, the least recently used first."""
        keys = [entry.identity.run for entry in self.index.entries()]
        return [self._runs[key].place for key in keys if key in self]

    def contents(self, run: RunKey) -> Contents:
        """What a committed run is found by. Raises ExtentMissing."""
        return self._present(run).contents

    def touch(self, runs: Iterable[RunKey]) -> None:
        """Note that runs were used now; a note that cannot be made is logged and forgotten."""
        try:
            self.index.touch(runs, int(time.time()))
        except (OSError, IndexDamaged) as error:
            log.warning("the use of runs is not noted: %s", error)

    def reserve(
        self,
        run: RunKey,
        *,
        first: int,
        count: int,
        chain_hash: bytes,
        contents: Contents = NAMELESS,
        layout: Layout | None = None,
    ) -> RunPlace:
        """Space for a run of count blocks, the first of which is block `first` of its sequence.

        contents: what the index finds it by once it is committed. Follow with commit or abandon. Raises
        TierFull, or WriteFailed if the file cannot be made or grown; either way nothing has changed.
        """
        if run in self._runs:
            raise ValueError(f"run {run.hex()} is already there")
        identity = ExtentIdentity(
            layout or self.layout, self.layers, self.fingerprint, run, chain_hash, first, count
        )
        found = self._space.find(self.layers * identity.nbytes)
        try:
            self._respect_floor(found)
            file = self._grow(found)
        except OSError as error:
            raise _failed(f"no room for run {run.hex()}", error) from error
        self._space.take(found)
        place = RunPlace(identity, found, file.file, fresh=not file.durable_name)
        self._runs[run] = _Run(place, contents)
        return place

    def write_extent(self, place: RunPlace, layer: int, records: Bytes, rows: Rows, scratch: Bytes) -> int:
        """On an I/O thread: write records[rows], uint8[count, record_bytes], as one layer; its checksum.

        scratch is page-aligned memory of at least place.identity.nbytes. Raises WriteFailed.
        """
        identity = place.identity
        if len(rows) != identity.count or rows.min() < 0 or rows.max() >= len(records):
            raise ValueError(f"a run of {identity.count} blocks needs that many rows of the records")
        np.take(records, rows, axis=0, out=extent.payload(scratch, identity), mode="clip")
        checksum = extent.seal(scratch, identity, layer)
        try:
            write_fully(self.system, place.file, scratch[: identity.nbytes], place.offset(layer))
        except OSError as error:
            raise _failed(f"layer {layer} of run {place.run.hex()}", error) from error
        return checksum

    def sync(self, place: RunPlace) -> None:
        """On an I/O thread: make durable what was written to the place. Raises WriteFailed."""
        try:
            self.system.fdatasync(place.file)
            if place.fresh:
                self.system.fsync_folder(self._folder.path)
        except OSError as error:
            raise _failed(f"run {place.run.hex()} may not be durable", error) from error

    def commit(self, place: RunPlace) -> None:
        """The run exists from now on: every layer was written, then synced.

        Raises WriteFailed if the index does not take its row: the run still waits, to be abandoned.
        """
        entry = self._awaiting(place)
        try:
            self.index.add(Entry(place.identity, place.range, entry.contents, int(time.time())))
        except (OSError, IndexDamaged) as error:
            raise WriteFailed(f"run {place.run.hex()} is in no index: {error}") from error
        entry.committed = True
        self._files[place.range.segment].durable_name = True

    def awaits(self, place: RunPlace) -> bool:
        """Whether the place is reserved and neither committed nor abandoned."""
        entry = self._at(place)
        return entry is not None and not entry.committed and not entry.doomed

    def abandon(self, place: RunPlace) -> None:
        """The run will not be there; its space is free once nobody holds it. After commit, use delete."""
        entry = self._awaiting(place)
        entry.doomed = True
        self._reclaim(entry)

    def delete(self, run: RunKey) -> None:
        """Forget a run; its space is free once nobody holds it. Raises ExtentMissing.

        If its row cannot be removed, its space stays taken: the row must not come to name other bytes.
        """
        entry = self._present(run)
        entry.doomed = True
        try:
            self.index.remove([run])
        except (OSError, IndexDamaged) as error:
            log.warning("run %s keeps its space until the next start: %s", run.hex(), error)
            entry.named = True
        self._reclaim(entry)

    def relocate(self, extent_bytes: int) -> Move | None:
        """Space elsewhere for a run whose move would shorten a file; None if there is no such run.

        extent_bytes: the largest extent that can be copied. Hold both places, and follow with moved, or with
        abandon of the target.
        """
        last = {
            entry.place.range.segment: entry
            for run, entry in self._runs.items()
            if run in self and entry.place.range.end == self._space.spare(entry.place.range.segment)
        }
        for number, hole in self._space.moves():
            entry = last.get(number)
            if entry is None or entry.place.range.nbytes != hole.nbytes:
                continue
            identity, file = entry.place.identity, self._files[hole.segment]
            if identity.nbytes <= extent_bytes:
                self._space.take(hole)
                target = RunPlace(identity, hole, file.file, fresh=not file.durable_name)
                self._aside[hole] = _Run(target, entry.contents)
                return Move(entry.place, target)
        return None

    def copy_extent(self, move: Move, layer: int, scratch: Bytes) -> None:
        """On an I/O thread: one layer of a run to where it shall lie, through page-aligned memory of at least
        its identity.nbytes. Raises as read_extent, and then writes nothing; or WriteFailed."""
        self.read_extent(move.source, layer, scratch)
        copy = scratch[: move.source.identity.nbytes]
        try:
            write_fully(self.system, move.target.file, copy, move.target.offset(layer))
        except OSError as error:
            raise WriteFailed(f"layer {layer} of run {move.run.hex()}: {error}") from error

    def moved(self, move: Move) -> None:
        """The run lies in its new place from now on: every layer was copied, then synced. Its old bytes are
        free once nobody holds them.

        Raises ExtentMissing if the run was deleted or moved meanwhile, WriteFailed if the index does not take
        the change: the target still waits, to be abandoned.
        """
        target, source = self._awaiting(move.target), self._present(move.run)
        if source.place != move.source:
            raise ExtentMissing(f"run {move.run.hex()} is no longer where it was copied from")
        try:
            self.index.move(move.run, move.target.range)
        except (OSError, IndexDamaged) as error:
            raise WriteFailed(f"run {move.run.hex()} stays where it is: {error}") from error
        target.committed, source.doomed = True, True
        self._files[move.target.range.segment].durable_name = True
        self._runs[move.run] = self._aside.pop(move.target.range)
        self._aside[move.source.range] = source
        self._reclaim(source)

    def sync_index(self) -> None:
        """On an I/O thread: let what the index has taken outlive a power cut. Raises WriteFailed."""
        try:
            file = self.system.open(self.index.log, os.O_RDONLY)
            try:
                self.system.fdatasync(file)
            finally:
                self.system.close(file)
        except OSError as error:
            raise WriteFailed(f"the index may not be durable: {error}") from error

    def locate(self, run: RunKey) -> RunPlace:
        """Where a committed run lies; hold it before reading. Raises ExtentMissing."""
        return self._present(run).place

    def hold(self, place: RunPlace) -> None:
        """A lease: the run's bytes stay as they are until the matching release."""
        entry = self._at(place)
        if entry is None or entry.doomed:
            raise ExtentMissing(f"run {place.run.hex()} is not in the disk tier")
        entry.holds += 1

    def release(self, place: RunPlace) -> None:
        """The end of a hold; the last one of a forgotten place frees its space."""
        entry = self._at(place)
        if entry is None or entry.holds < 1:
            raise ValueError(f"run {place.run.hex()} is released more often than held")
        entry.holds -= 1
        if self._closed:
            self._let_go(place.range.segment)
        else:
            self._reclaim(entry)

    def read_extent(self, place: RunPlace, layer: int, buffer: Bytes) -> Bytes:
        """On an I/O thread: the records of one layer, a verified view of buffer, uint8[count, record_bytes].

        buffer is page-aligned memory of at least place.identity.nbytes. Raises ReadError if the system
        call fails and ExtentCorrupt if it returns anything but what was written for this run.
        """
        wanted = buffer[: place.identity.nbytes]
        try:
            count = read_fully(self.system, place.file, wanted, place.offset(layer))
        except OSError as error:
            raise ReadError(f"layer {layer} of run {place.run.hex()}: {error}") from error
        if count < len(wanted):
            raise ExtentCorrupt(f"layer {layer} of run {place.run.hex()}: the file ends in it")
        return extent.verify(wanted, place.identity, layer)

    def put(
        self,
        run: RunKey,
        first: int,
        chain_hash: bytes,
        records: Sequence[Bytes],
        contents: Contents = NAMELESS,
    ) -> None:
        """Store a run, uint8[count, record_bytes] for each layer, and wait until it is durable.

        Raises TierFull or WriteFailed; the run is then absent and all earlier runs are intact.
        """
        if len(records) != self.layers:
            raise ValueError(f"a run has {self.layers} layers, got {len(records)}")
        rows = np.arange(len(records[0]), dtype=np.int64)
        place = self.reserve(run, first=first, count=len(rows), chain_hash=chain_hash, contents=contents)
        scratch = page_aligned(place.identity.nbytes)
        try:
            for layer, layer_records in enumerate(records):
                self.write_extent(place, layer, layer_records, rows, scratch)
            self.sync(place)
            self.commit(place)
        except BaseException:
            self.abandon(place)
            raise

    def get(self, run: RunKey, layer: int) -> Bytes:
        """The records of one layer, uint8[count, record_bytes], in memory of their own. Raises ReadFailed."""
        place = self.locate(run)
        return self.read_extent(place, layer, page_aligned(place.identity.nbytes))

    def check_integrity(self) -> None:
        """Ranges partition the segments, and the files in the folder measure what the ledger says."""
        self._space.check_integrity([entry.place.range for entry in self._entries()])
        sizes = {self._folder.segment(number): size for number, size in self._space.sizes().items()}
        found = {path: path.stat().st_size for path in self._folder.segments().values()}
        assert found == sizes, f"the folder holds {found}, the ledger says {sizes}"
        assert self._files.keys() == self._space.sizes().keys(), "a segment has no open file"
        self.index.check_integrity()
        rows = {entry.identity.run: (entry.identity, entry.range) for entry in self.index.entries()}
        known = {run: entry.place for run, entry in self._runs.items() if run in self}
        assert rows == {run: (place.identity, place.range) for run, place in known.items()}, (
            "the index and the tier know different runs"
        )
        for entry in self._entries():
            assert entry.holds >= 0, "a run is released more often than held"
            assert entry.holds > 0 or entry.named or not entry.doomed, "a forgotten run keeps its space"

    def close(self) -> None:
        """Close the segments and the index, and unlock the folder. Runs that wait for a commit are lost.

        Files of runs still held stay open until their release: an I/O thread may be stuck in one, and its
        descriptor must not come to mean another file. The lock stays as long: what such a thread writes must
        not land in a file of the next daemon.
        """
        self._trim()
        self._closed = True
        held = {entry.place.range.segment for entry in self._entries() if entry.holds}
        if held:
            log.warning(
                "%s: closed while %d segment files are being read or written", self._folder.path, len(held)
            )
        for number in list(self._files):
            if number not in held:
                self._close(self._files.pop(number).file)
        self.index.close()
        if not held:
            self._folder.close()

    def _awaiting(self, place: RunPlace) -> _Run:
        if not self.awaits(place):
            raise ValueError(f"run {place.run.hex()} is not waiting to be committed")
        entry = self._at(place)
        assert entry is not None
        return entry

    def _at(self, place: RunPlace) -> _Run | None:
        """What lies in a place, or is to."""
        entry = self._runs.get(place.run)
        if entry is None or entry.place.range != place.range:
            entry = self._aside.get(place.range)
        return entry if entry and entry.place.run == place.run else None

    def _entries(self) -> list[_Run]:
        return [*self._runs.values(), *self._aside.values()]

    def _present(self, run: RunKey) -> _Run:
        entry = self._runs.get(run)
        if entry is None or not entry.committed or entry.doomed:
            raise ExtentMissing(f"run {run.hex()} is not in the disk tier")
        return entry

    def _respect_floor(self, found: Range) -> None:
        """Raises TierFull if the growth that a range needs would leave less than the floor."""
        growth = found.end - self._space.sizes().get(found.segment, 0)
        if growth > 0 and self.floor_bytes:
            left = self.system.free_bytes(self._folder.path) - growth
            if left < self.floor_bytes:
                raise TierFull(
                    f"{growth} bytes more would leave {left} bytes free; {self.floor_bytes} must be"
                )

    def _grow(self, found: Range) -> _File:
        """The file of a range, long enough for it. On OSError file and folder are as before."""
        file = self._files.get(found.segment)
        if file is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | self._folder.flags
            file = _File(self.system.open(self._folder.segment(found.segment), flags))
            try:
                self.system.ftruncate(file.file, found.end)
            except OSError:
                self._close(file.file)
                self._unlink(found.segment)
                raise
            self._files[found.segment] = file
        elif found.end > self._space.sizes()[found.segment]:
            self.system.ftruncate(file.file, found.end)
        return file

    def _reclaim(self, entry: _Run) -> None:
        """Free the space of a forgotten run, or of what a move left, that nobody holds."""
        if entry.holds or entry.named or not entry.doomed or self._closed:
            return
        if self._aside.pop(entry.place.range, None) is None:
            del self._runs[entry.place.run]
        self._space.give_back(entry.place.range)
        self._trim()

    def _trim(self) -> None:
        """Give the file system what it can have: free ends of files, also those it did not take before."""
        for number, length in self._space.sizes().items():
            spare = self._space.spare(number)
            if spare == length:
                continue
            try:
                if spare:
                    self.system.ftruncate(self._files[number].file, spare)
                else:
                    self.system.unlink(self._folder.segment(number))
            except OSError as error:
                log.warning(
                    "%s: cannot shorten segment %d, its space stays counted: %s",
                    self._folder.path,
                    number,
                    error,
                )
                continue
            self._space.cut(number)
            if not spare:
                self._close(self._files.pop(number).file)

    def _let_go(self, number: int) -> None:
        """After close: give up the file once nobody holds a run in it, and the folder with the last."""
        if not any(e.holds for e in self._entries() if e.place.range.segment == number):
            self._close(self._files.pop(number).file)
        if not self._files:
            self._folder.close()

    def _close(self, file: int) -> None:
        """A disk that is gone may say so here; the descriptor is given up all the same."""
        try:
            self.system.close(file)
        except OSError as error:
            log.warning("%s: cannot close a segment: %s", self._folder.path, error)

    def _unlink(self, number: int) -> None:
        try:
            self.system.unlink(self._folder.segment(number))
        except OSError as error:
            log.warning("%s: segment %d stays behind: %s", self._folder.path, number, error)


def _failed(what: str, error: OSError) -> WriteFailed:
    """The error for a system call that did not write."""
    return (WriteRefused if error.errno in PASSING else WriteFailed)(f"{what}: {error}")
