"""Reads everything that a store has on disk, while no daemon uses it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from spilld.offload.disk.files.extent import verify
from spilld.offload.disk.files.folder import StoreFolder
from spilld.offload.disk.index.index import Index
from spilld.offload.disk.index.index_row import IndexRow, consistent
from spilld.offload.errors import ExtentCorrupt, FolderUnusable, IndexDamaged
from spilld.offload.system import SystemCalls, page_aligned, read_fully


@dataclass
class Report:
    """Results of a check. Bytes are those of segment files; orphans lie in them and belong to no run."""

    runs: int = 0
    extents: int = 0
    run_bytes: int = 0
    orphan_bytes: int = 0
    lost: list[str] = field(default_factory=list)
    """Keys of runs that are not in the files, in hexadecimal."""
    damaged: list[str] = field(default_factory=list)
    """For each run that is not what was written, what is wrong with it."""
    index: str = ""
    """What is wrong with the index."""

    @property
    def clean(self) -> bool:
        """Whether nothing is lost. Orphans are no damage: a daemon that was killed leaves some."""
        return not (self.lost or self.damaged or self.index)


def check(
    folder: Path,
    *,
    repair: bool,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
    system: SystemCalls | None = None,
) -> Report:
    """Verify every extent of a disk tier's folder.

    Args:
        folder: The folder.
        repair: Whether to forget the runs that cannot be served, so that they are computed again.
        progress: Called with (bytes read, bytes in all) after each run.
        system: The calls to the kernel.

    Raises:
        FolderInUse: A daemon uses the folder.
        FolderUnusable: There is none, or it cannot be read.
    """
    if not folder.is_dir():
        raise FolderUnusable(f"{folder}: there is no store")
    calls = system or SystemCalls()
    place = StoreFolder(folder, calls)
    try:
        return _check(place, calls, repair, progress)
    except OSError as error:
        raise FolderUnusable(f"{folder}: {error}") from error
    finally:
        place.close()


def _check(
    place: StoreFolder, system: SystemCalls, repair: bool, progress: Callable[[int, int], None]
) -> Report:
    report = Report()
    sizes = {number: path.stat().st_size for number, path in place.segments().items()}
    try:
        index = Index(place.index, anew=False)
        entries = index.entries()
        index.check_integrity()
    except (IndexDamaged, AssertionError) as error:
        report.index, report.orphan_bytes = str(error), sum(sizes.values())
        if repair:
            Index(place.index).close()
        return report
    found, lost = consistent(entries, sizes)
    report.runs, report.run_bytes = len(entries), sum(entry.range.nbytes for entry in found)
    report.orphan_bytes = sum(sizes.values()) - report.run_bytes
    report.lost = [entry.identity.run.hex() for entry in lost]
    wrong = [*lost, *_damaged(place, system, found, report, progress)]
    if repair:
        index.remove(entry.identity.run for entry in wrong)
    index.close()
    return report


def _damaged(
    place: StoreFolder,
    system: SystemCalls,
    entries: list[IndexRow],
    report: Report,
    progress: Callable[[int, int], None],
) -> list[IndexRow]:
    wrong = []
    done = 0
    for entry in entries:
        file = system.open(place.segment(entry.range.segment), os.O_RDONLY | place.flags)
        try:
            for layer in range(entry.identity.layers):
                _verify(system, file, entry, layer)
                report.extents += 1
        except (ExtentCorrupt, OSError) as error:
            report.damaged.append(str(error))
            wrong.append(entry)
        finally:
            system.close(file)
        done += entry.range.nbytes
        progress(done, report.run_bytes)
    return wrong


def _verify(system: SystemCalls, file: int, entry: IndexRow, layer: int) -> None:
    identity = entry.identity
    buffer = page_aligned(identity.extent_bytes(layer))
    if read_fully(system, file, buffer, entry.range.offset + identity.offset(layer)) < len(buffer):
        raise ExtentCorrupt(f"layer {layer} of run {identity.run.hex()}: the file ends within it")
    verify(buffer, identity, layer)
