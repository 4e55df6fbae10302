"""Journal of requests and their events, so that they outlive their connection and their process.

It is in the database of the sessions: the end of a request and what it leaves of its session are one
transaction. Ended requests stay for a while, for clients that lost their connection just then.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spilld.errors import SpilldError
from spilld.offload.disk.index.database import Database
from spilld.offload.errors import IndexDamaged
from spilld.protocol.messages import (
    MAGIC,
    Done,
    Event,
    Generate,
    Reply,
    Request,
    is_last,
)
from spilld.protocol.wire import decode, encode

log = logging.getLogger(__name__)

HEADER_BYTES = len(MAGIC) + 1
"""First frame of a message; it is stored as its two frames in one piece."""

JOURNAL_TABLES = """
CREATE TABLE requests (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, message BLOB NOT NULL, prompt BLOB, handle TEXT,
    fingerprint BLOB NOT NULL, arrived REAL NOT NULL, ended REAL, lives INTEGER NOT NULL,
    reached INTEGER NOT NULL
);
CREATE INDEX requests_by_end ON requests (ended);
CREATE TABLE events (
    request INTEGER, seq INTEGER, message BLOB NOT NULL, PRIMARY KEY (request, seq)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, kw_only=True)
class JournalEntry:
    """All that a request's answer depends on, except the session that it continues.

    Attributes:
        request: With its seed.
        prompt: Token ids; none where it is messages that continue a session.
        handle: Of the context that it leaves behind, None if it leaves none.
        fingerprint: Of the model.
        arrived: Seconds since 1970.
    """

    request: Generate
    prompt: tuple[int, ...]
    handle: str | None
    fingerprint: bytes
    arrived: float


@dataclass(frozen=True)
class Unfinished:
    """A request that the last process left.

    Attributes:
        number: Its row.
        entry: The request as it was noted.
        events: Its noted events, without a gap.
        lives: Processes in a row that began with no more events of it, since one ended in order.
    """

    number: int
    entry: JournalEntry
    events: list[Event]
    lives: int


class Journal:
    """Notes requests and their events in the database. Not thread-safe.

    A request that cannot be noted is logged, and ends with the process.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._owed: list[tuple[int, Event]] = []

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write what is written within the context, sessions too, as a whole or not at all.

        The last events that could not be noted before are written with it.

        Raises:
            OSError: The database cannot be written.
            IndexDamaged: The database is damaged.
        """
        with self._db.transaction():
            for number, event in self._owed:
                self.note(number, event)
            yield
        self._owed.clear()

    def owe(self, number: int, event: Event) -> None:
        """Note a last event with the next transaction.

        A request that has ended must not be taken up again after its session has continued.
        """
        if number:
            self._owed.append((number, event))

    def close(self) -> None:
        """Close the database, which the sessions share."""
        self._db.close()

    def begin(self, entry: JournalEntry) -> int:
        """Note a request, in place of an ended one of the same id and tenant.

        Returns:
            Its number; 0 if it could not be noted.
        """
        request = entry.request
        prompt = np.asarray(entry.prompt, "<u4").tobytes()
        try:
            message = _pack(request)
            values = (request.request_id, message, prompt, entry.handle, entry.fingerprint, entry.arrived)
            with self._db.transaction() as db:
                self._delete("id = ?", request.request_id)
                db.execute("INSERT INTO requests VALUES (NULL, ?, ?, ?, ?, ?, ?, NULL, 0, 0)", values)
                ((number,),) = self._db.rows("SELECT last_insert_rowid()")
        except (OSError, IndexDamaged, SpilldError) as error:
            log.error("request %s will not outlive this process: %s", request.request_id, error)
            return 0
        return int(number)

    def note(self, number: int, event: Event) -> None:
        """Note an event.

        Raises:
            OSError: The database cannot be written.
            IndexDamaged: The database is damaged.
        """
        if not number:
            return
        try:
            self._db.run("INSERT OR REPLACE INTO events VALUES (?, ?, ?)", (number, event.seq, _pack(event)))
        except SpilldError as error:
            log.error("event %d of request %s is not kept: %s", event.seq, event.request_id, error)
        if is_last(event):
            self._db.run("UPDATE requests SET ended = ? WHERE number = ?", (time.time(), number))

    def find(self, tenant: str, request_id: str) -> int | None:
        """Return the number of a request of this id and tenant, None if there is none."""
        for number, message in self._db.rows(
            "SELECT number, message FROM requests WHERE id = ?", (request_id,)
        ):
            request = _unpack(message)
            if isinstance(request, Generate) and request.tenant == tenant:
                return int(number)
        return None

    def is_of_another_tenant(self, tenant: str, request_id: str) -> bool:
        """Return whether a request of another tenant has this id, and may still be asked for."""
        with self._noting("what ended of another tenant's may be forgotten"):
            known = self._db.rows("SELECT 1 FROM requests WHERE id = ?", (request_id,))
            return bool(known) and self.find(tenant, request_id) is None
        return False

    def events(self, number: int, start: int = 0) -> list[Event]:
        """Return the events of a request from sequence number `start` on, up to the first that is missing."""
        rows = self._db.rows(
            "SELECT seq, message FROM events WHERE request = ? AND seq >= ? ORDER BY seq", (number, start)
        )
        whole = itertools.takewhile(lambda row: row[1][0] == row[0], enumerate(rows, start))
        found = [_unpack(message) for _, (_, message) in whole]
        events = [event for event in found if isinstance(event, Event)]
        owed = (_unsaved(event) for owing, event in self._owed if owing == number)
        return [*events, *(event for event in owed if event.seq == start + len(events))]

    def unfinished(self) -> list[Unfinished]:
        """Return the requests that the last process left, in order of arrival; delete unreadable ones.

        To be called once, at start: the retention of ended requests starts again, as their clients may have
        waited for this start.
        """
        with self._noting("ended requests may be forgotten too early"):
            self._db.run("UPDATE requests SET ended = ? WHERE ended IS NOT NULL", (time.time(),))
        rows: list[tuple[Any, ...]] = []
        with self._noting("requests of the last process are not taken up"):
            rows = self._db.rows(
                "SELECT number, message, prompt, handle, fingerprint, arrived, lives, reached FROM requests"
                " WHERE ended IS NULL ORDER BY number"
            )
        found = []
        for number, *row in rows:
            try:
                found.append(self._left(number, *row))
            except Exception as error:  # noqa: BLE001 (a start must not end here, now and ever again)
                log.error("request %d cannot be read and is forgotten: %r", number, error)
                with self._noting("a request is not forgotten"):
                    self._delete("number = ?", number)
        return found

    def end_life(self) -> None:
        """Note that the process ends in order: no request that it leaves is to blame."""
        with self._noting("requests may be set aside too early"):
            self._db.run("UPDATE requests SET lives = 0 WHERE ended IS NULL")

    def _left(
        self,
        number: int,
        message: bytes,
        prompt: bytes | None,
        handle: str | None,
        fingerprint: bytes,
        arrived: float,
        lives: int,
        reached: int,
    ) -> Unfinished:
        request, events = _unpack(message), self.events(number)
        if not isinstance(request, Generate):
            raise TypeError(f"a {type(request).__name__} is in the journal")
        entry = JournalEntry(
            request=request,
            prompt=tuple(np.frombuffer(prompt or b"", "<u4").tolist()),
            handle=handle,
            fingerprint=fingerprint,
            arrived=arrived,
        )
        lives = lives + 1 if len(events) == reached else 1
        with self._noting("a request may be taken up too often"), self._db.transaction() as db:
            db.execute("DELETE FROM events WHERE request = ? AND seq >= ?", (number, len(events)))
            note = "UPDATE requests SET lives = ?, reached = ? WHERE number = ?"
            db.execute(note, (lives, len(events), number))
        return Unfinished(number, entry, events, lives)

    @contextmanager
    def _noting(self, otherwise: str) -> Iterator[None]:
        try:
            yield
        except (OSError, IndexDamaged) as error:
            log.error("%s: %s", otherwise, error)

    def sweep(self, retention_s: float) -> None:
        """Delete requests that ended more than `retention_s` seconds ago."""
        try:
            with self.transaction():
                self._delete("ended < ?", time.time() - retention_s)
        except (OSError, IndexDamaged) as error:
            log.warning("ended requests stay in the journal: %s", error)

    def _delete(self, condition: str, value: object) -> None:
        self._db.run(
            f"DELETE FROM events WHERE request IN (SELECT number FROM requests WHERE {condition})", (value,)
        )
        self._db.run(f"DELETE FROM requests WHERE {condition}", (value,))


def _unsaved(event: Event) -> Event:
    """Return the event as it is sent while it is not on disk."""
    return replace(event, saved=False) if isinstance(event, Done) and event.context is not None else event


def _pack(message: Generate | Event) -> bytes:
    return b"".join(encode(message))


def _unpack(message: bytes) -> Request | Reply:
    """Decode a message; raise SpilldError if the version of the protocol has changed meanwhile."""
    return decode([message[:HEADER_BYTES], message[HEADER_BYTES:]])
