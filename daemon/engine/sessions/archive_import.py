"""Imports: an archive that a client uploaded becomes a session, its KV part of the disk tier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from spilld.errors import CorruptArchive, ForeignArchive, PromptTooLong
from spilld.models.model import Model
from spilld.offload.archive.file import Archive, ArchivedRun, Manifest
from spilld.offload.archive.imported_runs import ImportedRuns
from spilld.offload.errors import TierFull, WriteFailed
from spilld.offload.store.store import Store
from spilld.protocol.messages import Imported, ImportSession
from spilld.sessions.idle_contexts import Key
from spilld.sessions.store import Session
from spilld.sessions.transfers import Transfers

from .archive_contents import (
    AGAIN,
    check_runs,
    checkpoint_state_blocks,
    contents_of,
    incoming_runs,
    split_runs,
)
from .archive_tasks import (
    Answer,
    ArchiveTask,
    ArchiveTasks,
    raise_typed,
)
from .manager import SessionManager


@dataclass(eq=False)
class ImportTask(ArchiveTask):
    """One import: the transfer that it reads, and the disk space that it has reserved.

    Attributes:
        note: Why the KV is not imported; empty if it is.
    """

    request: ImportSession
    claimed: bool = False
    archive: Archive | None = None
    arrival: ImportedRuns | None = None
    note: str = ""

    def release(self, transfers: Transfers) -> None:
        """See ArchiveTask.release."""
        if self.arrival is not None:
            self.arrival.abandon()
        if self.claimed:
            transfers.end(self.request.transfer)


class Importer:
    """Verifies archives and imports them, whole or not at all."""

    def __init__(
        self,
        tasks: ArchiveTasks,
        transfers: Transfers,
        sessions: SessionManager,
        store: Store,
        model: Model,
        refuse_if_busy: Callable[[Key], None],
        longest: Callable[[], int],
    ) -> None:
        self._tasks = tasks
        self._transfers = transfers
        self._sessions = sessions
        self._store = store
        self._model = model
        self._refuse_if_busy = refuse_if_busy
        self._longest = longest

    def begin(self, request: ImportSession, answer: Answer) -> None:
        """Begin an import."""
        task = ImportTask(request, answer)
        self._tasks.add(task)
        self._tasks.step(task, self._unpack, task)

    def _unpack(self, task: ImportTask) -> None:
        file = self._transfers.claim(task.request.transfer)
        task.claimed = True
        self._refuse_taken(task)

        def verify() -> None:
            task.archive = Archive(file)
            task.archive.verify(self._tasks.check)

        self._tasks.build(task, verify, partial(self._verified, task))

    def _refuse_foreign(self, manifest: Manifest) -> None:
        contents = contents_of(manifest)
        foreign = contents.identity not in (b"", self._model.identity)
        if foreign or manifest.fingerprint != self._model.fingerprint:
            raise ForeignArchive(
                f"the archive is of model {contents.model} in {manifest.layouts.element}, here is "
                f"{self._model.name} in {self._store.layouts.element}, or its weights or its tokenizer "
                "differ: import it where its model is served"
            )
        check_runs(manifest, checkpoint_state_blocks(self._store, self._model))
        if not manifest.tokens or max(manifest.tokens) >= self._model.geometry.vocab:
            raise CorruptArchive(f"the archive holds tokens that the model does not know; {AGAIN}")
        if len(manifest.tokens) > (longest := self._longest()):
            raise PromptTooLong(
                f"the archive holds {len(manifest.tokens)} tokens, a session here at most {longest}: raise "
                "max_context, or the host and disk budgets, as far as the model allows"
            )

    def _refuse_taken(self, task: ImportTask) -> None:
        tenant, name = task.request.tenant, task.request.session
        self._refuse_if_busy((tenant, name))
        self._sessions.store.refuse_taken(tenant, name)

    def _verified(self, task: ImportTask, failure: Exception | None) -> None:
        raise_typed(failure)
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
        self._tasks.build(task, work, partial(self._imported, task))

    def _no_room(self, manifest: Manifest) -> str:
        """Return why the KV cannot be imported; empty if it can."""
        here, there = self._store.layouts, manifest.layouts
        if manifest.runs and here != there:
            return (
                f"the archive holds KV as {there.format}, here it is {here.format}: it will be computed again"
            )
        if manifest.runs and self._store.disk is None:
            return "there is no disk tier: the KV will be computed again"
        return ""

    def _is_here(self, task: ImportTask) -> bool:
        assert task.archive is not None
        manifest = task.archive.manifest
        found = self._sessions.find(task.request.tenant, manifest.tokens)
        return found is not None and found.position >= manifest.position

    def _move(self, archive: Archive, arrival: ImportedRuns, sources: Sequence[ArchivedRun]) -> None:
        """Copy the KV from the archive to the disk tier, on the archive thread."""
        for place, source in zip(arrival.places, sources, strict=True):
            at = place.identity.first - source.first
            for layer in range(len(archive.manifest.layouts)):
                records = archive.read(source, layer)
                arrival.write(place, layer, records[at : at + place.identity.count])
                self._tasks.check()
        arrival.sync()

    def _imported(self, task: ImportTask, failure: Exception | None) -> None:
        if isinstance(failure, WriteFailed):
            task.note = f"the KV cannot be written, it will be computed again: {failure}"
        else:
            raise_typed(failure)
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
        self._tasks.drop(task)
        task.answer(
            Imported(
                request_id=request.request_id,
                session=self._sessions.info(session, (None, False)),
                cached_tokens=resume.position if resume is not None else 0,
                note=task.note,
            )
        )

    def _commit(self, task: ImportTask) -> None:
        """Make the KV findable; without it the session is correct, only slower."""
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
