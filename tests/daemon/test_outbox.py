"""What leaves the engine: events, durable first, in one transaction a step; and stats for other threads."""

from __future__ import annotations

import dataclasses
import math
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from spilld.errors import Cancelled
from spilld.models.model import Model
from spilld.offload.store.store import Store
from spilld.protocol.messages import Done, Token
from spilld.requests.request_state import NO_CLIENT
from spilld.requests.requests import Requests
from spilld.runner.sequence_manager import SequenceManager

from .harness import Harness, engine, said, shared, some_tokens, window_bytes
from .test_service import desk

NAMES = [f"r{number}" for number in range(8)]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@contextmanager
def decoding(model: Model, state: Path, **fields: Any) -> Iterator[Harness]:
    """Eight requests that have said three tokens each, and no tick to come."""
    with engine(model, state, device_budget=8 * window_bytes(model)) as harness:
        for seed, name in enumerate(NAMES):
            harness.add(name, some_tokens(seed, 40), ignore_eos=True, **{"session": name, **fields})
        while min(said(harness, name) for name in NAMES) < 3:
            assert harness.engine.turn()
        harness.engine._upkeep._ticked = math.inf
        yield harness


def statements_of_a_turn(harness: Harness) -> list[str]:
    """What SQLite is told in one turn, by its first word."""
    told: list[str] = []
    connection = harness.engine._journal._db._db
    connection.set_trace_callback(told.append)
    assert harness.engine.turn()
    connection.set_trace_callback(None)
    return [statement.split()[0] for statement in told]


def test_a_step_of_eight_requests_is_one_transaction(model: Model, tmp_path: Path) -> None:
    with decoding(model, tmp_path, max_tokens=30) as harness:
        before = [said(harness, name) for name in NAMES]
        assert statements_of_a_turn(harness) == ["BEGIN", *["INSERT"] * 8, "COMMIT"]
        assert [said(harness, name) for name in NAMES] == [count + 1 for count in before]


def test_eight_that_end_in_a_step_leave_their_sessions_in_one_transaction(
    model: Model, tmp_path: Path
) -> None:
    with decoding(model, tmp_path, max_tokens=4) as harness:
        words = statements_of_a_turn(harness)
        assert (words[0], words[-1]) == ("BEGIN", "COMMIT")
        assert (words.count("BEGIN"), words.count("COMMIT"), words.count("UPDATE")) == (1, 1, 8)
        assert words.count("INSERT") == 8 * 3, "a token, an end and a session each"
        assert all(harness.done(name).saved for name in NAMES)


def test_an_event_is_durable_before_it_is_sent(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another process would find it: with its last event, what the session is."""
    with decoding(model, tmp_path, max_tokens=6) as harness:
        seen = 0

        def durable(client: bytes, event: Any) -> None:
            nonlocal seen
            with closing(sqlite3.connect(tmp_path / "sessions.sqlite")) as db:
                found = db.execute(
                    "SELECT count(*) FROM events JOIN requests ON request = number WHERE id = ? AND seq = ?",
                    (event.request_id, event.seq),
                ).fetchone()
                sessions = {name for (name,) in db.execute("SELECT name FROM sessions")}
            assert found == (1,)
            assert event.request_id in sessions or not isinstance(event, Done)
            seen += 1
            harness._post(client, event)

        monkeypatch.setattr(harness.engine._outbox, "_post", durable)
        harness.run()
        assert seen == 8 * 4


def test_one_request_that_cannot_be_noted_is_no_others_loss(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with decoding(model, tmp_path, max_tokens=4) as harness:
        journal = harness.engine._journal
        note = journal.note

        def breaks(number: int, event: Any) -> None:
            if event.request_id == "r3":
                raise OSError(28, "no space left on device")
            note(number, event)

        monkeypatch.setattr(journal, "note", breaks)
        harness.run()
        assert [harness.done(name).saved for name in NAMES] == [name != "r3" for name in NAMES]
        monkeypatch.undo()
        names = {session.name for session in harness.engine.sessions.store.of("")}
        assert names == set(NAMES), "its session is in memory"
        harness.engine._upkeep._ticked = 0.0
        harness.run()
        with closing(sqlite3.connect(tmp_path / "sessions.sqlite")) as db:
            assert {name for (name,) in db.execute("SELECT name FROM sessions")} == set(NAMES)
            assert db.execute("SELECT count(*) FROM requests WHERE ended IS NULL").fetchone() == (0,)


def test_other_threads_read_what_was_published(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no container of the engine, the store or the scheduler."""
    readers: set[str] = set()

    def noted(kind: type, name: str) -> None:
        real = getattr(kind, name)

        def look(*given: Any, **named: Any) -> Any:
            readers.add(threading.current_thread().name)
            return real(*given, **named)

        monkeypatch.setattr(kind, name, look)

    for kind, name in (
        (Requests, "__iter__"),
        (Requests, "find"),
        (Store, "stats"),
        (SequenceManager, "stats"),
    ):
        noted(kind, name)
    capacity = Store.__dict__["capacity"]

    def looked_up(store: Store) -> Any:
        readers.add(threading.current_thread().name)
        return capacity.fget(store)

    monkeypatch.setattr(Store, "capacity", property(looked_up))
    with desk(model, tmp_path) as opened:
        readers.clear()
        opened.submit("r", tuple(some_tokens(1, 300)), max_tokens=40)
        opened.wait("r", Token)
        assert opened.service.stats()["requests_running"] == 1
        assert opened.service.longest == opened.engine.published.longest > 300
        opened.end("r")
        assert opened.service.stats()["requests_running"] == 0, "who has heard of an end finds it"
        assert readers == {"spilld-engine"}
        with pytest.raises(dataclasses.FrozenInstanceError):
            opened.engine.published.longest = 0  # type: ignore[misc]
        with pytest.raises(TypeError):
            opened.engine.published.counters["preemptions"] = 1  # type: ignore[index]


def test_an_end_amid_a_tick_is_durable_with_its_session(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tick writes the sessions that wait in memory, of which this one has not had its turn."""
    with decoding(model, tmp_path, max_tokens=300) as harness:
        state = harness.engine.requests.find("r0")
        assert state is not None
        state.listen(NO_CLIENT)
        harness.engine._upkeep.retention_s = 0.0
        harness.engine._upkeep._ticked = 0.0
        harness.engine.turn()
        assert "will not outlive" not in caplog.text
        assert harness.engine.requests.find("r0") is None
        with closing(sqlite3.connect(tmp_path / "sessions.sqlite")) as db:
            assert db.execute("SELECT name FROM sessions").fetchall() == [("r0",)]
            assert db.execute("SELECT id FROM requests WHERE ended IS NULL ORDER BY id").fetchall() == [
                (name,) for name in NAMES[1:]
            ]
        harness.engine.fail_all(Cancelled("enough"))
