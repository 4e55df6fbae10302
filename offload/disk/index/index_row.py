"""Rows of the index: what the disk tier knows of a run without reading it."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spilld.offload.disk.files.extent import ExtentIdentity, RunKey
from spilld.offload.disk.files.segment import Range
from spilld.offload.record import Element, Format
from spilld.offload.store_layout import StoreLayout

_TYPES = [bytes, int, int, int, str, str, bytes, bytes, int, int, bytes, bytes, int]
"""Types of the columns of `runs`."""


@dataclass(frozen=True)
class Contents:
    """What a run is found by.

    Attributes:
        parent: The chain hash that its first block continues.
        blocks: The chain hash of each of its blocks; none for a checkpoint.
        tokens: Of a checkpoint, the tokens that follow `parent`.
    """

    parent: bytes
    blocks: tuple[bytes, ...] = ()
    tokens: tuple[int, ...] | None = None

    @property
    def name(self) -> bytes:
        """Chain hash of the run's beginning: up to the end of its first block, or up to a checkpoint."""
        return self.blocks[0] if self.blocks else self.parent


@dataclass(frozen=True)
class IndexRow:
    """One run: the contents of its extents' headers, and where they lie. used: seconds since 1970."""

    identity: ExtentIdentity
    range: Range
    contents: Contents = field(compare=False)
    used: int = 0


def parse(row: tuple[Any, ...]) -> IndexRow | None:
    """Parse a row of `runs`, with the hash of the run's first block; None if it is invalid."""
    if [type(value) for value in row[:-1]] != _TYPES:
        return None
    run, segment, offset, nbytes, form, element, shapes, *rest, name = row
    fingerprint, first, count, chain, parent, used = rest
    try:
        layouts = StoreLayout.unpack(Format(form), Element(element), shapes)
        identity = ExtentIdentity(layouts, fingerprint, run, chain, first, count)
    except ValueError:
        return None
    blocks = (name,) if isinstance(name, bytes) else ()
    return IndexRow(identity, Range(segment, offset, nbytes), Contents(parent, blocks), used)


def consistent(
    entries: Sequence[IndexRow], sizes: Mapping[int, int]
) -> tuple[list[IndexRow], list[IndexRow]]:
    """Divide rows, keeping their order, by whether their bytes are there.

    Returns:
        Rows whose bytes are there, and rows whose bytes are not, or overlap another's.
    """
    by_segment: dict[int, list[IndexRow]] = defaultdict(list)
    for entry in entries:
        by_segment[entry.range.segment].append(entry)
    wrong: set[RunKey] = set()
    for number, group in by_segment.items():
        group.sort(key=lambda entry: entry.range.offset)
        whole = Counter(entry.identity.run_bytes for entry in group)
        unit = whole.most_common(1)[0][0]
        for entry in group:
            size = entry.identity.run_bytes
            aligned = entry.range.offset >= 0 and not entry.range.offset % unit
            if not (
                size == entry.range.nbytes == unit and aligned and entry.range.end <= sizes.get(number, 0)
            ):
                wrong.add(entry.identity.run)
        for entry, following in itertools.pairwise(group):
            if entry.range.end > following.range.offset:
                wrong |= {entry.identity.run, following.identity.run}
    return (
        [entry for entry in entries if entry.identity.run not in wrong],
        [entry for entry in entries if entry.identity.run in wrong],
    )
