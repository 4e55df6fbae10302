"""Exports sessions to archives and imports them, while the engine goes on.

The engine's thread looks up, pins, reserves and commits; one thread reads and writes archives; another serves
the pieces that clients fetch and send. What a thread finds out comes back by `tend`.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from spilld.errors import (
    CorruptArchive,
    Draining,
    ForeignArchive,
    InternalError,
    InvalidRequest,
    PromptTooLong,
    SpilldError,
    StorageFailed,
)
from spilld.kv.checkpoint import find_resume_point
from spilld.kv.visibility import CELL
from spilld.models.model import Model
from spilld.offload.archive.exported_runs import ExportedRuns
from spilld.offload.archive.file import (
    Archive,
    ArchivedRun,
    Manifest,
    archive_bytes,
    write,
)
from spilld.offload.archive.imported_runs import ImportedRuns
from spilld.offload.errors import (
    ArchiveDamaged,
    ArchiveUnknown,
    ExtentCorrupt,
    OffloadError,
    TierFull,
    WriteFailed,
)
from spilld.offload.store.store import Store
from spilld.protocol.messages import (
    CloseTransfer,
    Exported,
    ExportSession,
    Failed,
    Imported,
    ImportSession,
    OpenTransfer,
    Piece,
    ReadTransfer,
    Reply,
    Transfer,
    TransferRequest,
    WriteTransfer,
)
from spilld.sessions.idle_contexts import Key
from spilld.sessions.store import Session
from spilld.sessions.transfers import Transfers

from .archive_contents import (
    AGAIN,
    Unreadable,
    contents_of,
    copy_records,
    incoming_runs,
    manifest_of,
    split_runs,
)
from .manager import SessionManager

log = logging.getLogger(__name__)

SETTLE_S = 10.0
"""How long an export waits for what is on its way to disk."""

LOOK_S = 1.0
"""How often transfers that are over are looked for."""

Answer = Callable[[Reply], None]


class _Stopped(Exception):
    """The daemon stops."""


@dataclass(eq=False)
class _Export:
    request: ExportSession
    answer: Answer
    began: float
    session: Session | None = None
    transfer: str = ""
    departure: ExportedRuns | None = None


@dataclass(eq=False)
class _Import:
    request: ImportSession
    answer: Answer
    claimed: bool = False
    archive: Archive | None = None
    arrival: ImportedRuns | None = None
    note: str = ""


_Task = _Export | _Import


class ArchiveTransfers:
    """`serve` may be called from any thread, all else from the engine's. Each request gets one reply."""

    def __init__(
        self,
        transfers: Transfers,
        sessions: SessionManager,
        store: Store,
        model: Model,
        refuse_if_busy: Callable[[Key], None],
        longest: Callable[[], int],
    ) -> None:
        """refuse_if_busy raises InvalidRequest if a request runs on a session. longest: tokens that one may
        have."""
        self._transfers = transfers
        self._sessions = sessions
        self._store = store
        self._model = model
        self._refuse_if_busy = refuse_if_busy
        self._longest = longest
        self._waiting: list[_Export] = []
        self._tasks: set[_Task] = set()
        self._ended: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._builder = ThreadPoolExecutor(1, "spilld-archive")
        self._pieces = ThreadPoolExecutor(1, "spilld-transfer")
        self._stopping = False
        self._looked = 0.0

    @property
    def busy(self) -> bool:
        """`tend` is to be called soon."""
        return bool(self._tasks)

    def tend(self) -> None:
        """Go on with what has got further, and end transfers that nobody wants."""
        while not self._ended.empty():
            self._ended.get()()
        for export in list(self._waiting):
            if not self._store.writing or time.monotonic() - export.began > SETTLE_S:
                self._waiting.remove(export)
                self._step(export, self._pack, export)
        if len(self._transfers) and time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            self._pieces.submit(self._transfers.expire)

    def begin(self, request: ExportSession | ImportSession, answer: Answer) -> None:
        if isinstance(request, ExportSession):
            export = _Export(request, answer, time.monotonic())
            self._tasks.add(export)
            self._waiting.append(export)
        else:
            task = _Import(request, answer)
            self._tasks.add(task)
            self._step(task, self._unpack, task)

    def serve(self, request: TransferRequest, answer: Answer) -> None:
        """Answer what needs the file only."""
        self._pieces.submit(self._serve, request, answer)

    def close(self) -> None:
        """End everything, and remove all transfers."""
        self._stopping = True
        self._pieces.shutdown(cancel_futures=True)
        self._builder.shutdown(cancel_futures=True)
        for task in list(self._tasks):
            self._fail(task, Draining("the daemon has stopped"))
        self._transfers.close_all()

    # The thread of pieces.

    def _serve(self, request: TransferRequest, answer: Answer) -> None:
        try:
            answer(self._piece(request))
        except SpilldError as error:
            answer(Failed.because(error, request.request_id))
        except Exception as error:
            log.exception("a transfer failed")
            answer(Failed.because(InternalError(f"a bug in spilld: {error!r}"), request.request_id))

    def _piece(self, request: TransferRequest) -> Reply:
        name = request.request_id
        match request:
            case OpenTransfer(nbytes=nbytes):
                return Transfer(request_id=name, transfer=self._transfers.open(nbytes), nbytes=0)
            case ReadTransfer(transfer=transfer, offset=offset):
                return Piece(request_id=name, data=self._transfers.read(transfer, offset))
            case WriteTransfer(transfer=transfer, offset=offset, data=data):
                received = self._transfers.write(transfer, offset, data)
                return Transfer(request_id=name, transfer=transfer, nbytes=received)
            case CloseTransfer(transfer=transfer):
                return Transfer(request_id=name, transfer=transfer, nbytes=self._transfers.close(transfer))
        raise InvalidRequest(f"{type(request).__name__} is about no transfer")

    # Steps on the engine's thread, with work for the builder between them.

    def _step(self, task: _Task, step: Callable[..., None], *given: object) -> None:
        """Whatever goes wrong ends the task, with a typed error."""
        if task not in self._tasks:
            return
        try:
            step(*given)
        except SpilldError as error:
            self._fail(task, error)
        except (OSError, OffloadError) as error:
            self._fail(task, StorageFailed(f"the session cannot be moved: {error}"))
        except Exception as error:
            log.exception("an archive failed")
            self._fail(task, InternalError(f"a bug in spilld: {error!r}"))

    def _build(self, task: _Task, work: Callable[[], None], then: Callable[[Exception | None], None]) -> None:
        """Let the builder work, then go on with what it ended with."""

        def run() -> None:
            failure: Exception | None = None
            try:
                work()
            except Exception as error:  # noqa: BLE001 (it goes on to the engine's thread)
                failure = error
            self._ended.put(partial(self._step, task, then, failure))

        self._builder.submit(run)

    def _fail(self, task: _Task, error: SpilldError) -> None:
        self._drop(task)
        task.answer(Failed.because(error, task.request.request_id))

    def _drop(self, task: _Task) -> None:
        """Give back what a task holds."""
        self._tasks.discard(task)
        if isinstance(task, _Export):
            if task in self._waiting:
                self._waiting.remove(task)
            if task.departure is not None:
                task.departure.end()
            if task.transfer:
                self._transfers.end(task.transfer)
        else:
            if task.arrival is not None:
                task.arrival.abandon()
            if task.claimed:
                self._transfers.end(task.request.transfer)

    def _go_on(self, _done: int, _all: int) -> None:
        if self._stopping:
            raise _Stopped

    # Export.

    def _pack(self, export: _Export, *, bare: bool = False) -> None:
        """bare: without KV, which cannot be read."""
        session = export.session = self._sessions.store.get(export.request.tenant, export.request.session)
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
        work = partial(write, file, manifest, records, self._go_on)
        self._build(export, work, partial(self._packed, export, manifest))

    def _packed(self, export: _Export, manifest: Manifest, failure: Exception | None) -> None:
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
        _raise(failure)
        self._transfers.free(export.transfer)
        self._tasks.discard(export)
        export.answer(
            Exported(
                request_id=export.request.request_id,
                transfer=export.transfer,
                nbytes=archive_bytes(manifest),
                tokens=len(manifest.tokens),
                cached_tokens=manifest.position,
            )
        )

    # Import.

    def _unpack(self, task: _Import) -> None:
        file = self._transfers.claim(task.request.transfer)
        task.claimed = True
        self._refuse_taken(task)

        def verify() -> None:
            task.archive = Archive(file)
            task.archive.verify(self._go_on)

        self._build(task, verify, partial(self._verified, task))

    def _refuse_foreign(self, manifest: Manifest) -> None:
        contents = contents_of(manifest)
        foreign = contents.identity not in (b"", self._model.identity)
        if foreign or manifest.fingerprint != self._model.fingerprint:
            raise ForeignArchive(
                f"the archive is of model {contents.model} in {manifest.layouts.element}, here is "
                f"{self._model.name} in {self._store.layout.element}, or its weights or its tokenizer "
                "differ: import it where its model is served"
            )
        if not manifest.tokens or max(manifest.tokens) >= self._model.geometry.vocab:
            raise CorruptArchive(f"the archive holds tokens that the model does not know; {AGAIN}")
        if len(manifest.tokens) > (longest := self._longest()):
            raise PromptTooLong(
                f"the archive holds {len(manifest.tokens)} tokens, a session here at most {longest}: raise "
                "max_context, or the host and disk budgets, as far as the model allows"
            )

    def _refuse_taken(self, task: _Import) -> None:
        tenant, name = task.request.tenant, task.request.session
        self._refuse_if_busy((tenant, name))
        self._sessions.store.refuse_taken(tenant, name)

    def _verified(self, task: _Import, failure: Exception | None) -> None:
        _raise(failure)
        assert task.archive is not None
        manifest = task.archive.manifest
        self._refuse_foreign(manifest)
        sources = split_runs(manifest, self._store.run_blocks)
        task.note = self._no_room(manifest)
        wanted = bool(manifest.runs) and not task.note and not self._is_here(task)
        if wanted:
            first = self._sessions.root(task.request.tenant)
            parts = incoming_runs(manifest, [span for span, _ in sources], first, self._store)
            try:
                task.arrival = ImportedRuns(self._store, parts)
            except (TierFull, WriteFailed) as error:
                task.note = f"the disk tier has no room for the KV, it will be computed again: {error}"
        if task.arrival is None:
            self._imported(task, None)
            return
        work = partial(self._move, task.archive, task.arrival, [source for _, source in sources])
        self._build(task, work, partial(self._imported, task))

    def _no_room(self, manifest: Manifest) -> str:
        """Why the KV cannot be taken over, if so."""
        here, there = self._store.layouts, manifest.layouts
        if manifest.runs and here != there:
            return (
                f"the archive holds KV as {there.format}, here it is {here.format}: it will be computed again"
            )
        if manifest.runs and self._store.disk is None:
            return "there is no disk tier: the KV will be computed again"
        return ""

    def _is_here(self, task: _Import) -> bool:
        assert task.archive is not None
        manifest = task.archive.manifest
        found = find_resume_point(self._store, self._sessions.root(task.request.tenant), manifest.tokens)
        return found is not None and found.position >= manifest.position

    def _move(self, archive: Archive, arrival: ImportedRuns, sources: Sequence[ArchivedRun]) -> None:
        """On the builder's thread: from the file to the disk tier."""
        for place, source in zip(arrival.places, sources, strict=True):
            at = place.identity.first - source.first
            for layer in range(len(archive.manifest.layouts)):
                records = archive.read(source, layer)
                arrival.write(place, layer, records[at : at + place.identity.count])
                self._go_on(0, 0)
        arrival.sync()

    def _imported(self, task: _Import, failure: Exception | None) -> None:
        if isinstance(failure, WriteFailed):
            task.note = f"the KV cannot be written, it will be computed again: {failure}"
        else:
            _raise(failure)
        self._refuse_taken(task)
        self._commit(task)
        assert task.archive is not None
        manifest, request = task.archive.manifest, task.request
        contents = contents_of(manifest)
        new = Session(
            tenant=request.tenant,
            name=request.session,
            tokens=manifest.tokens,
            messages=contents.messages,
            ttl_s=contents.ttl_s,
            model=self._model.name,
            identity=self._model.identity,
        )
        self._sessions.put(new)
        session = self._sessions.store.get(*new.key)
        resume = self._sessions.stored(session)
        self._drop(task)
        task.answer(
            Imported(
                request_id=request.request_id,
                session=self._sessions.info(session, (None, False)),
                cached_tokens=resume.position if resume is not None else 0,
                note=task.note,
            )
        )

    def _commit(self, task: _Import) -> None:
        """Make the KV findable; without it the session is as right, and slower."""
        arrival, task.arrival = task.arrival, None
        if arrival is None:
            return
        if task.note:
            arrival.abandon()
            return
        try:
            arrival.commit()
        except WriteFailed as error:
            task.note = f"the KV cannot be written, it will be computed again: {error}"


def _raise(failure: Exception | None) -> None:
    """What the builder ended with, as an error that says what to do."""
    match failure:
        case None:
            return
        case ArchiveDamaged():
            raise CorruptArchive(f"the file is no whole archive of a session: {failure}; {AGAIN}")
        case ArchiveUnknown():
            raise ForeignArchive(f"the archive cannot be read: {failure}; install the version that wrote it")
        case _Stopped():
            raise Draining("the daemon has stopped; do it again when it is back")
    raise failure
