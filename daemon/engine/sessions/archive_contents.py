"""Contents of a session's archive: which blocks and tokens, from and into which runs of the store.

Nothing here touches a disk. Positions are those of the visibility rule.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from spilld.errors import CorruptArchive
from spilld.fields import (
    Blob,
    ListOf,
    Maybe,
    Real,
    Struct,
    Text,
    read,
)
from spilld.kv.attention_span import (
    BLOCKS_PER_CELL,
    CELL,
    SINKS,
    boundary,
    sealed_by,
)
from spilld.kv.checkpoint import ResumePoint, state_blocks, window_blocks
from spilld.kv.recurrent_state import StateShape
from spilld.models.model import Model
from spilld.offload.archive.exported_runs import ExportedRuns
from spilld.offload.archive.file import ArchivedRun, Manifest
from spilld.offload.archive.imported_runs import ImportedRun
from spilld.offload.block_table import RunRef
from spilld.offload.disk.files.extent import RunKey
from spilld.offload.disk.index.index_row import Contents
from spilld.offload.errors import ReadFailed
from spilld.offload.prefix_cache.block_hash import chain
from spilld.offload.record import BLOCK
from spilld.offload.store.store import Store
from spilld.offload.system import Bytes
from spilld.protocol.messages import Message
from spilld.sessions.store import Session

AGAIN = "export the session again and copy the file whole"


@dataclass(frozen=True, kw_only=True)
class SessionContents:
    """What an archive holds of a session beside its tokens: the manifest's `about`."""

    model: Annotated[str, Text()]
    identity: Annotated[bytes, Blob(16)] = b""
    """The model's identity (Model.identity)."""
    messages: Annotated[tuple[Message, ...] | None, Maybe(ListOf(Struct(Message)))]
    ttl_s: Annotated[float | None, Maybe(Real(0, above=True))]


class Unreadable(Exception):
    """A run of the store could not be read; the cause says why."""

    def __init__(self, run: RunKey) -> None:
        super().__init__(run.hex())
        self.run = run


# Exports.


def manifest_of(
    session: Session, resume: ResumePoint | None, store: Store, model: Model
) -> tuple[Manifest, dict[RunKey, RunRef]]:
    """Return the manifest of a session's archive, and where each of its runs comes from."""
    messages = None if session.messages is None else [vars(message) for message in session.messages]
    ttl_s = session.ttl_s if session.listed else None
    sources = {} if resume is None else _sources(resume, checkpoint_state_blocks(store, model))
    manifest = Manifest(
        store.layouts,
        model.fingerprint,
        session.tokens,
        0 if resume is None else resume.position,
        tuple(sources),
        {"model": model.name, "identity": session.identity, "messages": messages, "ttl_s": ttl_s},
    )
    return manifest, {run.run: ref for run, ref in sources.items()}


def _sources(resume: ResumePoint, of_state: int) -> dict[ArchivedRun, RunRef]:
    found = {
        ArchivedRun(RunKey(uuid.uuid4().bytes), ref.first, ref.count, ref.blocks.stop): ref
        for ref in resume.refs
    }
    first, count = _checkpoint_blocks(resume.position, of_state)
    checkpoint = ArchivedRun(
        RunKey(uuid.uuid4().bytes), first, count, _anchor(resume.position), checkpoint=True
    )
    return {**found, checkpoint: RunRef(resume.checkpoint, first, first, count)}


def copy_records(
    departure: ExportedRuns | None,
    position: int,
    sources: dict[RunKey, RunRef],
    run: ArchivedRun,
    layer: int,
    into: Bytes,
) -> None:
    """Copy records of the store for an archive: the session's blocks of a run, or the tokens of a checkpoint.

    Called on an I/O thread.

    Raises:
        Unreadable: The run cannot be read.
    """
    assert departure is not None, "an archive without KV has no runs"
    ref = sources[run.run]
    try:
        records = departure.read(ref.run, layer)
    except ReadFailed as error:
        raise Unreadable(ref.run) from error
    at = ref.first - ref.base
    into[:] = records[at : at + ref.count]
    if run.checkpoint:
        width = into.shape[1] // BLOCK
        window = into[: window_blocks(position)].reshape(-1)
        window[_checkpoint_tokens(position) * width :] = 0


def _checkpoint_tokens(position: int) -> int:
    """Return the number of tokens of a checkpoint: the sinks, and what is exact before `position`."""
    return SINKS + position - boundary(position - 1)


def checkpoint_state_blocks(store: Store, model: Model) -> int:
    """Return how many blocks of a checkpoint hold the state of the model's layers that have one."""
    return state_blocks(StateShape.of(model.geometry, model.module.dtype), store.layouts.raw)


def _checkpoint_blocks(position: int, of_state: int) -> tuple[int, int]:
    """Return (first, count) of a checkpoint's blocks."""
    return boundary(position - 1) // BLOCK, window_blocks(position) + of_state


def _anchor(position: int) -> int:
    """Return the number of blocks before the tokens of a checkpoint."""
    return (position - 1) // CELL * BLOCKS_PER_CELL


# Imports.


def contents_of(manifest: Manifest) -> SessionContents:
    """Return what an archive holds of its session.

    Raises:
        CorruptArchive: Its fields are invalid.
    """
    try:
        return read(SessionContents, manifest.about)
    except ValueError as error:
        raise CorruptArchive(f"the archive makes no sense: {error}; {AGAIN}") from error


def check_runs(manifest: Manifest, of_state: int) -> None:
    """Check that the runs are sealed blocks from 1 on, then a checkpoint that follows them.

    Args:
        manifest: The archive's.
        of_state: Blocks of a checkpoint that hold the state of its model.

    Raises:
        CorruptArchive: They are not.
    """
    try:
        _check_runs(manifest, of_state)
    except ValueError as error:
        raise CorruptArchive(f"the archive makes no sense: {error}; {AGAIN}") from error


def _check_runs(manifest: Manifest, of_state: int) -> None:
    if not manifest.runs:
        return
    *blocks, last = manifest.runs
    position, stop = manifest.position, 1
    for run in blocks:
        if run.checkpoint or run.first != stop or run.upto != run.first + run.count:
            raise ValueError(f"blocks {run.first}.. come where block {stop} was due")
        stop = run.upto
    sealed = max(1, sealed_by((position - 1) // CELL * CELL))
    whole = (last.first, last.count) == _checkpoint_blocks(position, of_state) and last.upto == _anchor(
        position
    )
    if not last.checkpoint or stop != sealed or not whole or not CELL <= position < len(manifest.tokens):
        raise ValueError(f"{len(blocks)} runs and a checkpoint do not serve {position} tokens")


def split_runs(manifest: Manifest, most: int) -> list[tuple[ArchivedRun, ArchivedRun]]:
    """Return runs of at most `most` blocks, each with the run of the archive that it is part of."""
    found = []
    for run in manifest.runs:
        if run.checkpoint:
            found.append((run, run))
            continue
        for first in range(run.first, run.upto, most):
            stop = min(run.upto, first + most)
            found.append((ArchivedRun(run.run, first, stop - first, stop), run))
    return found


def incoming_runs(
    manifest: Manifest, spans: Sequence[ArchivedRun], root: bytes, store: Store
) -> list[ImportedRun]:
    """Return the runs to write, in the chain that begins with `root`: that of the importing tenant."""
    tokens = manifest.tokens
    hashes = [root, *chain(root, tokens, len(tokens) // BLOCK)]
    found = []
    for span in spans:
        contents = (
            Contents(hashes[span.upto], tokens=tokens[span.upto * BLOCK : manifest.position])
            if span.checkpoint
            else Contents(hashes[span.first], tuple(hashes[span.first + 1 : span.upto + 1]))
        )
        layouts = store.layouts.raw if span.checkpoint else store.layouts
        found.append(ImportedRun(span.first, span.count, hashes[span.upto], contents, layouts))
    return found
