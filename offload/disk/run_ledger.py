"""Bookkeeping of runs on disk: by key and by place, and in which state each is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spilld.offload.disk.files.extent import RunKey, RunPlace
from spilld.offload.disk.files.segment import Range
from spilld.offload.disk.index.index_row import Contents
from spilld.offload.errors import ExtentMissing


@dataclass(eq=False)
class StoredRun:
    """A run in a place: stored, still to be written, or deleted.

    Attributes:
        place: Where it lies.
        contents: What it is found by.
        committed: The index names it.
        deleted: It must not be found any more; its space is free once no lease is left.
        row_remains: It is deleted, but its row could not be removed: its space stays taken, for that row may
            come back.
        holds: Leases of the place.
    """

    place: RunPlace
    contents: Contents
    committed: bool = False
    deleted: bool = False
    row_remains: bool = False
    holds: int = 0

    @property
    def present(self) -> bool:
        """Whether it can be found."""
        return self.committed and not self.deleted

    @property
    def unused(self) -> bool:
        """Whether its space may be given back."""
        return self.deleted and not self.holds and not self.row_remains


class RunLedger:
    """Runs by key, and all places by range.

    By key, a run that is being moved is in the place that its row names. By range there are also the places
    that runs are being moved to, and those of moved runs that are still leased.
    """

    def __init__(self) -> None:
        self._runs: dict[RunKey, StoredRun] = {}
        self._places: dict[Range, StoredRun] = {}

    def __contains__(self, run: RunKey) -> bool:
        """Whether the run is committed and not deleted."""
        stored = self._runs.get(run)
        return stored is not None and stored.present

    def __iter__(self) -> Iterator[StoredRun]:
        """Everything that has a place."""
        return iter(self._places.values())

    def knows(self, run: RunKey) -> bool:
        """Return whether there is a run of this key, in whichever state."""
        return run in self._runs

    def add(self, stored: StoredRun) -> None:
        """Add a run under its key, in its place: its first place, or the one that it has moved to."""
        self._runs[stored.place.run] = stored
        self._places[stored.place.range] = stored

    def add_target(self, stored: StoredRun) -> None:
        """Add the place that a run is being moved to."""
        self._places[stored.place.range] = stored

    def remove(self, stored: StoredRun) -> None:
        """Remove a place that is no longer used."""
        del self._places[stored.place.range]
        if self._runs.get(stored.place.run) is stored:
            del self._runs[stored.place.run]

    def present(self, run: RunKey) -> StoredRun:
        """Return the committed run of this key.

        Raises:
            ExtentMissing: There is none.
        """
        stored = self._runs.get(run)
        if stored is None or not stored.present:
            raise ExtentMissing(f"run {run.hex()} is not in the disk tier")
        return stored

    def at(self, place: RunPlace) -> StoredRun | None:
        """Return the run that lies in a place, or is to lie there; None if there is none."""
        stored = self._places.get(place.range)
        return stored if stored is not None and stored.place.run == place.run else None

    def waiting(self, place: RunPlace) -> StoredRun:
        """Return the run that is reserved in a place and neither committed nor abandoned.

        Raises:
            ValueError: There is none.
        """
        stored = self.at(place)
        if stored is None or stored.committed or stored.deleted:
            raise ValueError(f"run {place.run.hex()} is not waiting to be committed")
        return stored

    def movable(self, place: Range) -> StoredRun | None:
        """Return the committed run in a range, if it is not being moved already."""
        stored = self._places[place]
        return stored if stored.present and self._runs.get(stored.place.run) is stored else None

    def places(self) -> dict[RunKey, RunPlace]:
        """Return where the committed runs lie."""
        return {run: stored.place for run, stored in self._runs.items() if stored.present}

    def check_integrity(self) -> None:
        """Raise AssertionError if the bookkeeping is inconsistent."""
        for place, stored in self._places.items():
            assert stored.place.range == place, "a run is kept under another place"
            assert stored.holds >= 0, "a run is released more often than held"
            assert not stored.unused, "a deleted run keeps its space"
        for run, stored in self._runs.items():
            assert self._places.get(stored.place.range) is stored, f"run {run.hex()} has no place"
