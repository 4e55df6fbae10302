"""What the disk tier holds, in SQLite beside the segments: one row a run, one a block, one a checkpoint.

A row is written only after the run that it names is durable. It need not be durable itself: a run whose row
a power cut takes is an orphan, whose space is freed at the next start; a deleted row that such a cut brings
back names an extent that is verified when it is read. FORMAT.md has the schema.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Connection

import numpy as np
import xxhash

from spilld.offload.block_table import RunRef
from spilld.offload.disk.files.extent import RunKey
from spilld.offload.disk.files.segment import Range
from spilld.offload.errors import IndexDamaged

from .database import Database, put_aside
from .index_row import IndexRow, parse

log = logging.getLogger(__name__)

SCHEMA = 3
"""PRAGMA user_version of the database."""

_CREATE = """
CREATE TABLE runs (
    run BLOB PRIMARY KEY, segment INTEGER NOT NULL, offset INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    format TEXT NOT NULL, element TEXT NOT NULL, shapes BLOB NOT NULL, fingerprint BLOB NOT NULL,
    first INTEGER NOT NULL, count INTEGER NOT NULL,
    chain BLOB NOT NULL, parent BLOB NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE blocks (
    hash BLOB, run BLOB, block INTEGER NOT NULL, seal BLOB NOT NULL, PRIMARY KEY (hash, run)
) WITHOUT ROWID;
CREATE TABLE checkpoints (
    anchor BLOB, run BLOB, tokens BLOB NOT NULL, seal BLOB NOT NULL, PRIMARY KEY (anchor, run)
) WITHOUT ROWID;
CREATE INDEX blocks_by_run ON blocks (run, block);
CREATE INDEX checkpoints_by_run ON checkpoints (run);
CREATE TABLE wear (
    id INTEGER PRIMARY KEY, spent INTEGER NOT NULL, at INTEGER NOT NULL, seal BLOB NOT NULL
);
"""

_RUNS = """
SELECT runs.*, hash FROM runs LEFT JOIN blocks ON blocks.run = runs.run AND blocks.block = runs.first
ORDER BY used
"""


class Index:
    """Rows of one folder's runs. Errors are those of Database."""

    def __init__(self, path: Path, *, anew: bool = True) -> None:
        """Open the index of a folder, or make it.

        Args:
            path: The file.
            anew: Whether to put a damaged file aside and begin another.

        Raises:
            IndexDamaged: The file is damaged, unless `anew`.
            OSError: The system refuses.
        """
        try:
            self._db = self._open(path)
        except IndexDamaged as error:
            if not anew:
                raise
            put_aside(path, error)
            self._db = self._open(path)
        self._used: dict[RunKey, int] = {}
        self._spent: tuple[int, int] | None = None

    @staticmethod
    def _open(path: Path) -> Database:
        """Open the database and remove rows that name no run; raises IndexDamaged if it cannot be queried."""
        db = Database(path, SCHEMA, _CREATE)
        try:
            db.rows(_RUNS)
            for table in ("blocks", "checkpoints"):
                db.run(f"DELETE FROM {table} WHERE run NOT IN (SELECT run FROM runs)")
        except BaseException:
            db.close()
            raise
        return db

    def entries(self) -> list[IndexRow]:
        """Return every run with a valid row, the least recently used first, and remove invalid rows.

        Of a run's contents, only the first block is given.
        """
        self.write_notes()
        rows = self._db.rows(_RUNS)
        invalid = [row[0] for row in rows if parse(row) is None]
        if invalid:
            log.warning("%d rows of the index are invalid and removed", len(invalid))
            self.remove(invalid)
        return [entry for row in rows if (entry := parse(row)) is not None]

    def add(self, *entries: IndexRow) -> None:
        """Add runs that are durable, each with its blocks or as a checkpoint: all of them or none."""
        with self._transaction() as db:
            for entry in entries:
                self._insert(db, entry)

    @staticmethod
    def _insert(db: Connection, entry: IndexRow) -> None:
        identity, place, contents = entry.identity, entry.range, entry.contents
        layouts = identity.layouts
        row: tuple[object, ...] = (
            *(identity.run, place.segment, place.offset, place.nbytes),
            *(layouts.format, layouts.element, layouts.pack(), identity.fingerprint),
            *(identity.first, identity.count, identity.chain_hash),
            *(contents.parent, entry.used),
        )
        blocks = [
            (name, identity.run, block, _seal(name, identity.run, block))
            for block, name in enumerate(contents.blocks, identity.first)
        ]
        db.execute(f"INSERT INTO runs VALUES ({', '.join('?' * len(row))})", row)
        db.executemany("INSERT INTO blocks VALUES (?, ?, ?, ?)", blocks)
        if contents.tokens is not None:
            tokens = np.asarray(contents.tokens, "<u4").tobytes()
            seal = _seal(contents.parent, identity.run, tokens)
            found_by = contents.parent, identity.run, tokens, seal
            db.execute("INSERT INTO checkpoints VALUES (?, ?, ?, ?)", found_by)

    def remove(self, runs: Iterable[RunKey]) -> None:
        """Forget runs; unknown ones are ignored."""
        keys = [(run,) for run in runs]
        if not keys:
            return
        with self._transaction() as db:
            for table in ("runs", "blocks", "checkpoints"):
                db.executemany(f"DELETE FROM {table} WHERE run = ?", keys)

    def move(self, run: RunKey, place: Range) -> None:
        """Change where the extents of a run lie.

        Raises:
            IndexDamaged: The run has no row.
        """
        with self._transaction() as db:
            found = db.execute(
                "UPDATE runs SET segment = ?, offset = ? WHERE run = ?", (place.segment, place.offset, run)
            )
            if found.rowcount != 1:
                raise IndexDamaged(f"run {run.hex()} has no row")

    def touch(self, runs: Iterable[RunKey], now: int) -> None:
        """Note that the runs were used at `now`."""
        self._used.update(dict.fromkeys(runs, now))

    def chain(self, hashes: Sequence[bytes], first: int) -> list[RunRef]:
        """Return the longest stored chain of blocks first, first + 1, ... with these hashes.

        It is in as few runs as can be seen from the front: a run is followed as far as it goes.
        """
        found: list[RunRef] = []
        for block, name in enumerate(hashes, first):
            holders = self._holders_at(name, block)
            if found and found[-1].run in holders:
                last = found[-1]
                found[-1] = RunRef(last.run, last.base, last.first, last.count + 1)
            elif holders:
                run = max(holders, key=lambda run: holders[run])
                found.append(RunRef(run, holders[run][1], block, 1))
            else:
                break
        return found

    def _holders_at(self, name: bytes, block: int) -> dict[RunKey, tuple[int, int]]:
        """Return (end, first block) of the runs that hold a block, unless their rows are damaged."""
        rows = self._db.rows(
            "SELECT run, seal, first + count, first FROM blocks JOIN runs USING (run)"
            " WHERE hash = ? AND block = ? AND block BETWEEN first AND first + count - 1",
            (name, block),
        )
        return {run: (stop, first) for run, seal, stop, first in rows if seal == _seal(name, run, block)}

    def checkpoints(self, anchor: bytes) -> list[tuple[RunKey, list[int]]]:
        """Return (run, tokens) of checkpoints whose tokens follow the block `anchor`, the newest first."""
        self.write_notes()
        rows = self._db.rows(
            "SELECT run, tokens, seal FROM checkpoints JOIN runs USING (run) WHERE anchor = ?"
            " ORDER BY used DESC",
            [anchor],
        )
        return [
            (run, np.frombuffer(tokens, "<u4").tolist())
            for run, tokens, seal in rows
            if seal == _seal(anchor, run, tokens)
        ]

    def holders(self, name: bytes) -> list[RunKey]:
        """Return the runs that hold the block of this chain hash."""
        return [run for (run,) in self._db.rows("SELECT run FROM blocks WHERE hash = ?", [name])]

    def note_spent(self, spent: int, at: int) -> None:
        """Note that so many bytes of the write budget were spent at `at`, seconds since 1970."""
        self._spent = spent, at

    def write_notes(self) -> None:
        """Write what was noted, unless a transaction has written it since."""
        if self._used or self._spent is not None:
            with self._transaction():
                pass

    def forget_notes(self) -> None:
        """Forget what was noted and not written."""
        self._used, self._spent = {}, None

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """Return a scope as Database.transaction does, which also writes what was noted."""
        with self._db.transaction() as db:
            used = [(now, run) for run, now in self._used.items()]
            db.executemany("UPDATE runs SET used = ? WHERE run = ?", used)
            if self._spent is not None:
                row = *self._spent, _seal(*self._spent)
                db.execute("INSERT OR REPLACE INTO wear VALUES (0, ?, ?, ?)", row)
            yield db
        self.forget_notes()

    def spent(self) -> tuple[int, int]:
        """Return what note_spent noted last; (0, 0) if nothing was noted, or if the row is damaged."""
        self.write_notes()
        for spent, at, seal in self._db.rows("SELECT spent, at, seal FROM wear WHERE id = 0"):
            if type(spent) is type(at) is int and seal == _seal(spent, at):
                return spent, at
        return 0, 0

    @property
    def log(self) -> Path:
        """The file that must be durable for what was last committed to be durable."""
        return self._db.log

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self._db.nbytes

    def check_integrity(self) -> None:
        """Run SQLite's own check, and check that every row names a run that is there."""
        self._db.check_integrity()
        for table in ("blocks", "checkpoints"):
            ((lost,),) = self._db.rows(
                f"SELECT count(*) FROM {table} WHERE run NOT IN (SELECT run FROM runs)"
            )
            assert lost == 0, f"{lost} {table} of runs that are missing"

    def close(self) -> None:
        """Close the database."""
        self._db.close()


def _seal(*parts: bytes | int) -> bytes:
    """Return xxh3_64 of a row: SQLite notices no flipped bits, and a wrong row would name foreign KV."""
    words = [part if isinstance(part, bytes) else part.to_bytes(8, "little", signed=True) for part in parts]
    return xxhash.xxh3_64_digest(b"".join(words))
