"""The SQLite file: transactions are whole, errors are of two kinds, damage prevents no start."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spilld.offload.disk.index.database import Database
from spilld.offload.errors import IndexDamaged

SCHEMA = 3
CREATE = (
    "CREATE TABLE words (word TEXT PRIMARY KEY, size INTEGER NOT NULL); CREATE INDEX sizes ON words (size);"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "words.sqlite"


@pytest.fixture
def db(path: Path) -> Iterator[Database]:
    db = Database.open(path, SCHEMA, CREATE)
    yield db
    db.check_integrity()
    db.close()


def add(db: Database, *words: str) -> None:
    with db.transaction() as transaction:
        transaction.executemany("INSERT INTO words VALUES (?, ?)", [(word, len(word)) for word in words])


def words(db: Database) -> list[str]:
    return [word for (word,) in db.rows("SELECT word FROM words ORDER BY word")]


def names(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir()}


def reopened(path: Path) -> list[str]:
    db = Database.open(path, SCHEMA, CREATE)
    try:
        db.check_integrity()
        return words(db)
    finally:
        db.close()


class TestKeeping:
    def test_what_was_committed_is_there_after_a_close(self, path: Path) -> None:
        db = Database.open(path, SCHEMA, CREATE)
        add(db, "a", "bc")
        assert db.run("DELETE FROM words WHERE word = ?", ["a"]) == 1
        assert db.run("DELETE FROM words WHERE word = ?", ["a"]) == 0
        db.close()
        assert names(path) == {"words.sqlite"}
        assert reopened(path) == ["bc"]

    def test_values_are_values(self, db: Database) -> None:
        add(db, "'; DROP TABLE words; --")
        assert db.rows("SELECT size FROM words WHERE word = ?", ["'; DROP TABLE words; --"]) == [(23,)]

    def test_a_transaction_that_breaks_has_not_happened(self, db: Database) -> None:
        add(db, "a")
        with pytest.raises(ZeroDivisionError), db.transaction() as transaction:  # noqa: PT012
            transaction.execute("INSERT INTO words VALUES ('b', 1)")
            raise ZeroDivisionError
        with pytest.raises(IndexDamaged, match="UNIQUE"):
            add(db, "c", "a")
        assert words(db) == ["a"]
        add(db, "b")
        assert words(db) == ["a", "b"]

    def test_a_commit_survives_the_process_at_once(self, path: Path) -> None:
        """And what was not committed does not."""
        program = (
            "import os, signal, sys; from pathlib import Path\n"
            "from spilld.offload.disk.index.database import Database\n"
            f"db = Database.open(Path(sys.argv[1]), {SCHEMA}, {CREATE!r})\n"
            "for word in ('a', 'b'):\n"
            "    with db.transaction() as transaction:\n"
            "        transaction.execute('INSERT INTO words VALUES (?, 1)', (word,))\n"
            "with db.transaction() as transaction:\n"
            "    transaction.execute('INSERT INTO words VALUES (?, 1)', ('c',))\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == -9
        assert reopened(path) == ["a", "b"]

    def test_it_is_private_with_its_log(self, path: Path, db: Database) -> None:
        add(db, "a")
        assert names(path) == {"words.sqlite", "words.sqlite-wal", "words.sqlite-shm"}
        assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}

    def test_it_says_what_it_takes_on_disk(self, path: Path, db: Database) -> None:
        add(db, *map(str, range(5000)))
        assert db.nbytes == sum(file.stat().st_size for file in path.parent.iterdir()) > 5000 * 8

    def test_a_link_is_not_followed(self, path: Path, tmp_path: Path) -> None:
        (tmp_path / "target").write_text("")
        path.symlink_to(tmp_path / "target")
        with pytest.raises(OSError, match="symbolic"):
            Database.open(path, SCHEMA, CREATE)
        assert (tmp_path / "target").read_text() == ""


class TestRefusal:
    def test_a_full_disk_is_an_os_error_and_takes_nothing(self, db: Database) -> None:
        add(db, "a")
        ((pages,),) = db.rows("PRAGMA page_count")
        db.run(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(OSError, match="full"):
            add(db, *map(str, range(10_000)))
        assert words(db) == ["a"]
        add(db, "b")
        db.run("PRAGMA max_page_count = 1000000")
        add(db, *map(str, range(10_000)))
        assert len(words(db)) == 10_002

    def test_a_lock_of_another_is_an_os_error(self, path: Path, db: Database) -> None:
        add(db, "a")
        db.run("PRAGMA busy_timeout = 0")
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match="locked"):
            add(db, "b")
        other.close()
        assert words(db) == ["a"]

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            Database.open(tmp_path / "no" / "words.sqlite", SCHEMA, CREATE)


def damaged_open(path: Path, before: list[str]) -> bool:
    """Open it and use it; whether what it held is still there, else it is there no more at all."""
    bytes_before = path.read_bytes()
    db = Database.open(path, SCHEMA, CREATE)
    try:
        found = words(db)
        assert found in (before, [])
        if found:
            db.check_integrity()
        elif len(bytes_before) >= 512:  # less than a page is an empty file to SQLite
            assert path.with_suffix(".damaged").read_bytes()[:4096] == bytes_before[:4096]
        add(db, "new")
        assert words(db) == sorted([*found, "new"])
    finally:
        db.close()
    return bool(found)


class TestDamage:
    @pytest.fixture
    def whole(self, path: Path) -> bytes:
        """A file of several tables' pages, all of them full."""
        db = Database.open(path, SCHEMA, CREATE)
        add(db, *(f"{n:05}" for n in range(2000)))
        db.close()
        return path.read_bytes()

    @pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"not a database" * 1000, b"SQLite format 3\0"])
    def test_what_is_no_database_is_put_aside(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        path.with_name("words.sqlite-wal").write_bytes(b"old" * 1000)
        assert reopened(path) == []
        add_one = Database.open(path, SCHEMA, CREATE)
        add(add_one, "a")
        add_one.close()
        assert reopened(path) == ["a"]
        if content not in (b"", b"\0" * 4096):
            assert path.with_suffix(".damaged").read_bytes() == content

    def test_another_schema_is_put_aside(self, path: Path, whole: bytes) -> None:
        db = Database.open(path, SCHEMA + 1, CREATE)
        assert words(db) == []
        db.close()
        assert path.with_suffix(".damaged").read_bytes() == whole
        assert reopened(path) == []

    def test_the_second_damaged_file_replaces_the_first(self, path: Path) -> None:
        for content in (b"first" * 1000, b"second" * 1000):
            path.write_bytes(content)
            assert reopened(path) == []
            assert path.with_suffix(".damaged").read_bytes() == content
        assert names(path) == {"words.sqlite", "words.damaged"}

    def test_a_flipped_bit_of_the_header(self, path: Path, whole: bytes) -> None:
        before = reopened(path)
        lost = 0
        for bit in range(100 * 8):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            lost += not damaged_open(path, before)
        assert 100 < lost < 700

    def test_a_truncated_file(self, path: Path, whole: bytes) -> None:
        before = reopened(path)
        for left in {1, 99, 100, 512, *range(0, len(whole), 4096), *range(3000, len(whole), 9999)} - {0}:
            path.write_bytes(whole[:left])
            assert not damaged_open(path, before)

    def test_noise_where_a_page_was(self, path: Path, whole: bytes) -> None:
        before = reopened(path)
        for page in range(len(whole) // 4096):
            noise = random.Random(page).randbytes(4096)
            path.write_bytes(whole[: page * 4096] + noise + whole[(page + 1) * 4096 :])
            assert not damaged_open(path, before)

    @pytest.mark.parametrize("seed", range(4))
    def test_a_damaged_log_ends_where_the_damage_begins(self, path: Path, seed: int) -> None:
        """Whole transactions, the first ones."""
        program = (
            "import os, sys; from pathlib import Path\n"
            "from spilld.offload.disk.index.database import Database\n"
            f"db = Database.open(Path(sys.argv[1]), {SCHEMA}, {CREATE!r})\n"
            "for n in range(40):\n"
            "    with db.transaction() as transaction:\n"
            "        for m in range(2):\n"
            "            transaction.execute('INSERT INTO words VALUES (?, 1)', (f'{n:03} {m}',))\n"
            "os._exit(0)\n"
        )
        subprocess.run([sys.executable, "-c", program, str(path)], check=True)
        log = path.with_name("words.sqlite-wal")
        files = {file: file.read_bytes() for file in (path, log)}
        choose, whole = random.Random(seed), files[log]
        short = 0
        for _ in range(25):
            content = bytearray(whole)
            if choose.random() < 0.3:
                del content[choose.randrange(len(content)) :]
            else:
                content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
            path.write_bytes(files[path])
            log.write_bytes(content)
            log.with_name("words.sqlite-shm").unlink(missing_ok=True)
            found = reopened(path)
            assert found == [f"{n:03} {m}" for n in range(40) for m in range(2)][: len(found)]
            assert len(found) % 2 == 0
            short += len(found) < 80
        assert short > 10

    def test_damage_under_way_is_told(self, path: Path) -> None:
        """The file breaks while the daemon runs: an error of ours, whatever SQLite says."""
        db = Database.open(path, SCHEMA, CREATE)
        add(db, *(f"{n:05}" for n in range(20_000)))
        db.run("PRAGMA wal_checkpoint(TRUNCATE)")
        db.run("PRAGMA cache_size = 10")
        size = path.stat().st_size
        with path.open("r+b") as file:
            for page in range(2, size // 4096):
                os.pwrite(file.fileno(), b"\xff" * 4096, page * 4096)
        with pytest.raises(IndexDamaged):
            words(db)
        with pytest.raises((IndexDamaged, OSError)):
            add(db, *(f"x{n}" for n in range(5000)))
        db.close()
        assert reopened(path) == []


def test_a_file_that_cannot_be_seen_counts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine publishes statistics between a commit and what it sends: they must not fail."""
    db = Database.open(tmp_path / "db", SCHEMA, CREATE)

    def refused(_path: Path, **_options: object) -> object:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(Path, "stat", refused)
    assert db.nbytes == 0
    db.close()
