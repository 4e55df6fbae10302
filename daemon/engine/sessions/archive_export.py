"""Exports: a session and its KV become an archive that a client downloads."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial

from spilld.kv.attention_span import CELL
from spilld.models.model import Model
from spilld.offload.archive.exported_runs import ExportedRuns
from spilld.offload.archive.file import Manifest, archive_bytes, write
from spilld.offload.errors import ExtentCorrupt
from spilld.offload.store.store import Store
from spilld.protocol.messages import Exported, ExportSession
from spilld.sessions.transfers import Transfers

from .archive_contents import Unreadable, copy_records, manifest_of
from .archive_tasks import (
    Answer,
    ArchiveTask,
    ArchiveTasks,
    raise_typed,
)
from .manager import SessionManager

log = logging.getLogger(__name__)

SETTLE_S = 10.0
"""Seconds that an export waits for writes to disk to end."""


@dataclass(eq=False)
class ExportTask(ArchiveTask):
    """One export: the transfer that it fills, and the runs that it keeps from being deleted."""

    request: ExportSession
    transfer: str = ""
    departure: ExportedRuns | None = None

    def release(self, transfers: Transfers) -> None:
        """See ArchiveTask.release."""
        if self.departure is not None:
            self.departure.end()
        if self.transfer:
            transfers.end(self.transfer)


class Exporter:
    """Writes archives of sessions, once their computed KV is on disk."""

    def __init__(
        self,
        tasks: ArchiveTasks,
        transfers: Transfers,
        sessions: SessionManager,
        store: Store,
        model: Model,
    ) -> None:
        self._tasks = tasks
        self._transfers = transfers
        self._sessions = sessions
        self._store = store
        self._model = model
        self._waiting: list[tuple[ExportTask, float]] = []

    def begin(self, request: ExportSession, answer: Answer) -> None:
        """Queue an export until the session's KV is on disk."""
        export = ExportTask(request, answer)
        self._tasks.add(export)
        self._waiting.append((export, time.monotonic()))

    def tend(self) -> None:
        """Begin the exports that need not wait any longer."""
        for export, began in list(self._waiting):
            if not self._store.writing or time.monotonic() - began > SETTLE_S:
                self._waiting.remove((export, began))
                self._tasks.step(export, self._pack, export)

    def _pack(self, export: ExportTask, *, bare: bool = False) -> None:
        """Begin to write the archive; `bare`: without KV, as that cannot be read."""
        session = self._sessions.store.get(export.request.tenant, export.request.session)
        self._sessions.refuse_foreign(session)
        resume = self._sessions.stored(session)
        if bare or resume is None or resume.position < CELL:
            resume = None
        manifest, sources = manifest_of(session, resume, self._store, self._model)
        if resume is not None:
            export.departure = ExportedRuns(self._store, resume.runs)
        export.transfer = self._transfers.open(archive_bytes(manifest), busy=True)
        file = self._transfers.file(export.transfer)
        records = partial(copy_records, export.departure, manifest.position, sources)
        work = partial(write, file, manifest, records, self._tasks.check)
        self._tasks.build(export, work, partial(self._packed, export, manifest))

    def _packed(self, export: ExportTask, manifest: Manifest, failure: Exception | None) -> None:
        damaged = failure.run if isinstance(failure, Unreadable) else None
        corrupt = isinstance(failure, Unreadable) and isinstance(failure.__cause__, ExtentCorrupt)
        if export.departure is not None:
            export.departure.end(damaged if corrupt else None)
            export.departure = None
        if isinstance(failure, Unreadable):
            log.warning("session %s: %s", export.request.session[:8], failure.__cause__)
            self._transfers.end(export.transfer)
            export.transfer = ""
            self._pack(export, bare=not corrupt)
            return
        raise_typed(failure)
        self._transfers.free(export.transfer)
        self._tasks.done(export)
        export.answer(
            Exported(
                request_id=export.request.request_id,
                transfer=export.transfer,
                nbytes=archive_bytes(manifest),
                tokens=len(manifest.tokens),
                cached_tokens=manifest.position,
            )
        )
