"""A small SQLite database that survives kill -9: WAL, one connection, errors of two kinds."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from spilld.offload.errors import IndexDamaged

log = logging.getLogger(__name__)

_SYSTEM = (
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM),
    *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM),
)
"""Codes of SQLite that say nothing about the file's content."""


_TABLES = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name"


def _tables(create: str) -> list[tuple[Any, ...]]:
    """Return what _TABLES finds in a new database."""
    db = sqlite3.connect(":memory:")
    try:
        db.executescript(create)
        return db.execute(_TABLES).fetchall()
    finally:
        db.close()


def _size(file: Path) -> int:
    """Bytes of a file; 0 if there is none, or if it cannot be seen now."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def put_aside(path: Path, why: IndexDamaged) -> None:
    """Rename a damaged file, to the suffix .damaged, and remove its log."""
    aside = path.with_suffix(".damaged")
    log.error("%s; it is kept as %s and a new one begun", why, aside.name)
    path.replace(aside)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


class Database:
    """One file of mode 0600. One thread at a time calls everything, though not always the same.

    Every method raises IndexDamaged where SQLite finds the file broken, and OSError where the system refuses;
    the transaction in question has then not happened. A commit survives the process at once and a power cut
    from some later moment on, never in part.
    """

    def __init__(self, path: Path, schema: int, create: str) -> None:
        """Open the database, or make it.

        Args:
            path: The file.
            schema: The version of the tables, which is kept as PRAGMA user_version.
            create: Statements that make the tables.
        """
        self.path = path
        self._nbytes: int | None = None
        """Bytes of the files; None where they have to be measured again."""
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self.run("PRAGMA journal_mode = WAL")
            self.run("PRAGMA synchronous = NORMAL")
            ((word,),) = self.rows("PRAGMA integrity_check(1)")
            if word != "ok":
                raise IndexDamaged(f"{path}: {word}")
            ((found,),) = self.rows("PRAGMA user_version")
            if found == 0:
                with self._errors():
                    self._db.executescript(f"BEGIN; {create} PRAGMA user_version = {schema}; COMMIT;")
                found = schema
            if found != schema or self.rows(_TABLES) != _tables(create):
                raise IndexDamaged(f"{path} does not have the tables of schema {schema}")
            with self.transaction() as db:  # a damaged header may mark the file as read-only
                db.execute(f"PRAGMA user_version = {schema}")
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: Path, schema: int, create: str) -> Self:
        """Open the database; a damaged file is put aside (suffix .damaged) and a new one made."""
        try:
            return cls(path, schema, create)
        except IndexDamaged as error:
            put_aside(path, error)
            return cls(path, schema, create)

    def rows(self, statement: str, values: Iterable[object] = ()) -> list[tuple[Any, ...]]:
        """Return what a SELECT finds."""
        with self._errors():
            return self._db.execute(statement, tuple(values)).fetchall()

    def run(self, statement: str, values: Iterable[object] = ()) -> int:
        """Execute one statement as a transaction of its own and return how many rows it changed."""
        self._nbytes = None
        with self._errors():
            return self._db.execute(statement, tuple(values)).rowcount

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Return a scope: what is executed in it happens as a whole or not at all."""
        self._nbytes = None
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @property
    def log(self) -> Path:
        """The file with commits that are not in the database file yet."""
        return self.path.with_name(self.path.name + "-wal")

    @property
    def nbytes(self) -> int:
        """Bytes on disk, including the log."""
        if self._nbytes is None:
            files = (self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal", "-shm"))
            self._nbytes = sum(map(_size, files))
        return self._nbytes

    def check_integrity(self) -> None:
        """Raise AssertionError if SQLite's own check fails."""
        ((word,),) = self.rows("PRAGMA integrity_check(1)")
        assert word == "ok", f"{self.path}: {word}"

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_READONLY and os.access(self.path, os.W_OK):
                code = sqlite3.SQLITE_CORRUPT  # the file can be written: its header is damaged
            kind = OSError if code in _SYSTEM else IndexDamaged
            raise kind(f"{self.path}: {error}") from error
