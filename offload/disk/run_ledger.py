"""Which runs lie where on disk: by key and by place, and in which state each is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spilld.offload.disk.files.extent import RunKey, RunPlace
from spilld.offload.disk.files.segment import Range
from spilld.offload.disk.index.index_row import Contents
from spilld.offload.errors import ExtentMissing


@dataclass(eq=False)
class StoredRun:
    """A run in a place: there, still to be written, or on its way out.

    Attributes:
        committed: The index names it.
        deleted: Nobody may find it any more; its space is free once nobody holds it.
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
        """It can be found."""
        return self.committed and not self.deleted

    @property
    def unused(self) -> bool:
        """Its space may be given back."""
        return self.deleted and not self.holds and not self.row_remains


class RunLedger:
    """Runs by key, those of a run that is being moved in the place that its row names; and all by place, also
    where runs are being moved to, and where those that were moved are still held.
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
        """Whether there is a run of this key, in whichever state."""
        return run in self._runs

    def add(self, stored: StoredRun) -> None:
        """A run under its key, in its place: the first, or the one that it has moved to."""
        self._runs[stored.place.run] = stored
        self._places[stored.place.range] = stored

    def add_target(self, stored: StoredRun) -> None:
        """The place that a run is being moved to."""
        self._places[stored.place.range] = stored

    def remove(self, stored: StoredRun) -> None:
        """Nothing lies there any more."""
        del self._places[stored.place.range]
        if self._runs.get(stored.place.run) is stored:
            del self._runs[stored.place.run]

    def present(self, run: RunKey) -> StoredRun:
        """The committed run of this key. Raises ExtentMissing."""
        stored = self._runs.get(run)
        if stored is None or not stored.present:
            raise ExtentMissing(f"run {run.hex()} is not in the disk tier")
        return stored

    def at(self, place: RunPlace) -> StoredRun | None:
        """What lies in a place, or is to."""
        stored = self._places.get(place.range)
        return stored if stored is not None and stored.place.run == place.run else None

    def waiting(self, place: RunPlace) -> StoredRun:
        """What is reserved and neither committed nor abandoned. Raises ValueError."""
        stored = self.at(place)
        if stored is None or stored.committed or stored.deleted:
            raise ValueError(f"run {place.run.hex()} is not waiting to be committed")
        return stored

    def movable(self, place: Range) -> StoredRun | None:
        """The committed run in a range, if it is not being moved already."""
        stored = self._places[place]
        return stored if stored.present and self._runs.get(stored.place.run) is stored else None

    def places(self) -> dict[RunKey, RunPlace]:
        """Where the committed runs lie."""
        return {run: stored.place for run, stored in self._runs.items() if stored.present}

    def check_integrity(self) -> None:
        for place, stored in self._places.items():
            assert stored.place.range == place, "a run is kept under another place"
            assert stored.holds >= 0, "a run is released more often than held"
            assert not stored.unused, "a deleted run keeps its space"
        for run, stored in self._runs.items():
            assert self._places.get(stored.place.range) is stored, f"run {run.hex()} has no place"
