"""Restart without loss: a process ends at any moment, the next one goes on with every request that ran."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from spilld.errors import InvalidRequest, RequestNotFound, StorageFailed
from spilld.models.model import Model
from spilld.protocol.messages import (
    Accepted,
    Done,
    Event,
    Failed,
    Generate,
    Message,
    Progress,
    Resume,
    Sampling,
    Token,
)

from .harness import Harness, engine, shared, smallest_host_budget, some_tokens

PROMPT = some_tokens(5, 1200)
FIELDS: dict[str, Any] = {"max_tokens": 150, "ignore_eos": True}
"""The prompt ends 80 tokens before a cell does: of an answer the first half is not on the grid."""
SAMPLED = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@contextmanager
def life(model: Model, state: Path, **settings: Any) -> Iterator[Harness]:
    """One process: what it leaves behind of a state folder is what a kill would."""
    chosen = {"host_budget": smallest_host_budget(model), "disk_budget": "64MiB", **settings}
    with engine(model, state, keep_state=True, **chosen) as harness:
        for left in harness.engine.left_behind():
            harness.engine.restore(left)
        yield harness


def killed(state: Path) -> Path:
    """The state folder as kill -9 would leave it now."""
    copy = state.with_name(f"{state.name}'")
    shutil.copytree(state, copy)
    return copy


def resumed(harness: Harness, request_id: str = "r", next_seq: int = 0) -> list[Event]:
    """What a client is told that has missed everything from next_seq on."""
    harness.resume(request_id, next_seq)
    harness.run()
    return harness.events[request_id]


def whole(model: Model, state: Path, prompt: Any, **fields: Any) -> list[Event]:
    """All events of a request that nothing interrupts."""
    with life(model, state) as harness:
        harness.add("r", prompt, **fields)
        harness.run()
        return harness.events["r"]


def answer(events: list[Event]) -> list[tuple[int, str, float | None]]:
    return [(e.token, e.text, e.logprob) for e in events if isinstance(e, Token)]


def assert_same(found: list[Event], wanted: list[Event]) -> None:
    """Gapless, each token once, the same end; a prefill may tell its progress again."""
    assert [event.seq for event in found] == list(range(len(found)))
    told = [(t, text) for t, text, _ in answer(found)]
    assert told == [(t, text) for t, text, _ in answer(wanted)]
    for (_, _, left), (_, _, right) in zip(answer(found), answer(wanted), strict=True):
        assert left == (None if right is None else pytest.approx(right, abs=1e-4))
    mine, theirs = found[-1], wanted[-1]
    assert isinstance(mine, Done)
    assert isinstance(theirs, Done)
    assert (mine.reason, mine.text) == (theirs.reason, theirs.text)
    assert sum(isinstance(event, Accepted) for event in found) == 1


@pytest.mark.parametrize(
    ("events", "sampling"),
    [(events, Sampling()) for events in (0, 1, 2, 3, 4, 70, 100, 153)]
    + [(events, SAMPLED) for events in (0, 4, 100)],
)
def test_it_goes_on_after(model: Model, sampling: Sampling, events: int, tmp_path: Path) -> None:
    """The seed that the request did not name is kept, too."""
    fields = FIELDS | {"sampling": sampling, "logprobs": 0}
    with life(model, tmp_path / "s") as harness:
        harness.add("r", PROMPT, **fields)
        while len(harness.events.get("r", [])) < events:
            harness.engine.turn()
        said = list(harness.events.get("r", []))
        copy = killed(tmp_path / "s")
        harness.run()
        wanted = harness.events["r"]
    with life(model, copy) as harness:
        found = resumed(harness, next_seq=len(said))
        assert_same(said + found, wanted)
        if events > 90:
            done = found[-1]
            assert isinstance(done, Done)
            assert not any(isinstance(event, Progress) for event in found)


def test_a_cell_is_lost_at_most(model: Model, tmp_path: Path) -> None:
    """What is computed again is what came after the last cell of the answer."""
    with life(model, tmp_path / "s") as harness:
        harness.add("r", PROMPT, **FIELDS)
        while sum(isinstance(e, Token) for e in harness.events.get("r", [])) < 120:
            harness.engine.turn()
        copy = killed(tmp_path / "s")
    with life(model, copy) as harness:
        harness.engine.turn()
        (state,) = harness.engine.requests
        assert state.sequence is not None
        assert state.sequence.computed >= 1280


def test_checkpoints_amid_an_answer_do_not_pile_up(model: Model, tmp_path: Path) -> None:
    """One at the end of the prompt, one at the end of the answer, and one of those between at a time."""
    with life(model, tmp_path / "s") as harness:
        harness.add("r", PROMPT, max_tokens=700, ignore_eos=True)
        most = 0
        while harness.engine.turn():
            most = max(most, checkpoints(tmp_path / "s"))
        while harness.engine.writing:
            harness.engine.rest()
        assert most <= 3
        assert checkpoints(tmp_path / "s") == 2


def checkpoints(state: Path) -> int:
    with closing(sqlite3.connect(state / "kv" / "index.sqlite")) as db:
        ((count,),) = db.execute("SELECT count(*) FROM checkpoints")
    return int(count)


def test_twice(model: Model, tmp_path: Path) -> None:
    wanted = whole(model, tmp_path / "w", PROMPT, **FIELDS)
    with life(model, tmp_path / "s") as harness:
        harness.add("r", PROMPT, **FIELDS)
        while len(harness.events.get("r", [])) < 50:
            harness.engine.turn()
        copy = killed(tmp_path / "s")
    with life(model, copy) as harness:
        harness.resume("r")
        while len(harness.events["r"]) < 120:
            harness.engine.turn()
        again = killed(copy)
    with life(model, again) as harness:
        assert_same(resumed(harness), wanted)


def test_stops_and_halves_of_characters(model: Model, tmp_path: Path) -> None:
    """What was held back, for a stop string or the rest of a character, is held back again."""
    text = [e.text for e in whole(model, tmp_path / "w", PROMPT, **FIELDS) if isinstance(e, Token)]
    stop = "".join(text[20:24])[1:]
    fields = FIELDS | {"stop": (stop,)}
    wanted = whole(model, tmp_path / "v", PROMPT, **fields)
    for cut in range(1, len(wanted), 2):
        with life(model, tmp_path / "s") as harness:
            harness.add("r", PROMPT, **fields)
            while len(harness.events.get("r", [])) < cut:
                harness.engine.turn()
        with life(model, tmp_path / "s") as harness:
            assert_same(resumed(harness), wanted)
        shutil.rmtree(tmp_path / "s")


def test_a_token_is_not_sampled_again_when_its_end_was_not_told(model: Model, tmp_path: Path) -> None:
    """The process dies between the last token and Done."""
    wanted = whole(model, tmp_path / "s", PROMPT, max_tokens=5, ignore_eos=True)
    with sqlite3.connect(tmp_path / "s" / "sessions.sqlite") as db:
        db.execute("DELETE FROM events WHERE seq = ?", (wanted[-1].seq,))
        db.execute("UPDATE requests SET ended = NULL")
    db.close()
    with life(model, tmp_path / "s") as harness:
        assert_same(resumed(harness), wanted)


def test_the_end_of_a_text_is_told_once(model: Model, tmp_path: Path) -> None:
    """The end token was committed, Done was not; the session goes on before it."""
    first = whole(model, tmp_path / "w", PROMPT, **FIELDS)
    eos = answer(first)[9][0]
    ended = next(i for i, (token, _, _) in enumerate(answer(first)) if token == eos)
    model.geometry.__dict__["eos"], before = frozenset({eos}), model.geometry.eos
    try:
        wanted = whole(model, tmp_path / "s", PROMPT, session="s", max_tokens=300)
        assert len(answer(wanted)) == ended + 1
        with sqlite3.connect(tmp_path / "s" / "sessions.sqlite") as db:
            db.execute("DELETE FROM events WHERE seq = ?", (wanted[-1].seq,))
            db.execute("UPDATE requests SET ended = NULL")
            db.execute("DELETE FROM sessions")
        db.close()
        with life(model, tmp_path / "s") as harness:
            assert_same(resumed(harness), wanted)
            session = harness.engine.sessions.store.get("", "s")
            assert list(session.tokens) == [*PROMPT, *(token for token, _, _ in answer(wanted)[:-1])]
    finally:
        model.geometry.__dict__["eos"] = before


def test_two_requests_on_one_session(model: Model, tmp_path: Path) -> None:
    more = some_tokens(6, 300)
    with life(model, tmp_path / "w") as harness:
        harness.add("a", PROMPT, session="s", **FIELDS)
        harness.add("b", more, session="s", **FIELDS)
        harness.run()
        wanted = [answer(harness.events[name]) for name in "ab"]
    with life(model, tmp_path / "s") as harness:
        harness.add("a", PROMPT, session="s", **FIELDS)
        harness.add("b", more, session="s", **FIELDS)
        for _ in range(20):
            harness.engine.turn()
    with life(model, tmp_path / "s") as harness:
        for name in "ab":
            harness.resume(name)
        harness.run()
        assert [answer(harness.events[name]) for name in "ab"] == wanted


def test_a_chat_that_is_cut_holds_its_messages_once(model: Model, tmp_path: Path) -> None:
    prompt = (Message(role="user", content="hello"),)

    def ask(harness: Harness, request_id: str) -> None:
        request = Generate(request_id=request_id, prompt=prompt, session="c", max_tokens=20, ignore_eos=True)
        harness.engine.add(b"test", request, [])

    with life(model, tmp_path / "s") as harness:
        ask(harness, "1")
        harness.run()
        ask(harness, "2")
        for _ in range(10):
            harness.engine.turn()
    with life(model, tmp_path / "s") as harness:
        found = resumed(harness, "2")
        assert len(answer(found)) == 20
        session = harness.engine.sessions.store.get("", "c")
        assert session.messages is not None
        assert [message.role for message in session.messages] == ["user", "assistant"] * 2


def test_a_kept_context_has_the_handle_it_had(model: Model, tmp_path: Path) -> None:
    with life(model, tmp_path / "s") as harness:
        harness.add("r", PROMPT, keep=True, **FIELDS)
        for _ in range(30):
            harness.engine.turn()
        copy = killed(tmp_path / "s")
        harness.run()
        handle = harness.done().context
    with life(model, copy) as harness:
        done = resumed(harness)[-1]
        assert isinstance(done, Done)
        assert done.context == handle
        assert harness.ask(PROMPT[:50], "more", context=handle, **FIELDS)


@pytest.mark.parametrize("events", [2, 60])
def test_log_probabilities_of_the_prompt(model: Model, events: int, tmp_path: Path) -> None:
    fields = FIELDS | {"prompt_logprobs": 2, "logprobs": 2, "max_tokens": 100}
    wanted = whole(model, tmp_path / "w", PROMPT[:400], **fields)
    with life(model, tmp_path / "s") as harness:
        harness.add("r", PROMPT[:400], **fields)
        while len(harness.events.get("r", [])) < events:
            harness.engine.turn()
    with life(model, tmp_path / "s") as harness:
        found = resumed(harness)
    assert_same(found, wanted)
    mine, theirs = found[-1], wanted[-1]
    assert isinstance(mine, Done)
    assert isinstance(theirs, Done)
    assert mine.prompt_logprobs is not None
    assert theirs.prompt_logprobs is not None
    assert [entry.token for entry in mine.prompt_logprobs] == PROMPT[:400]
    for left, right in zip(mine.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
        assert left.logprob == pytest.approx(right.logprob, abs=1e-4)


def test_suspend_saves_what_runs(model: Model, tmp_path: Path) -> None:
    with life(model, tmp_path / "s") as harness:
        harness.add("r", PROMPT, **FIELDS)
        harness.add("waits", PROMPT, session="s", **FIELDS)
        while len(harness.events.get("r", [])) < 60:
            harness.engine.turn()
        assert harness.engine.suspend() == {"r", "waits"}
        said = len(harness.events["r"])
    with life(model, tmp_path / "s") as harness:
        harness.engine.turn()
        state = next(iter(harness.engine.requests))
        assert state.sequence is not None
        assert len(state.sequence.tokens) - state.sequence.computed <= 2, "nothing is computed again"
        assert len(resumed(harness, next_seq=said)) > 0


def test_a_deadline_counts_from_the_first_arrival(model: Model, tmp_path: Path) -> None:
    with life(model, tmp_path / "s") as harness:
        harness.add("r", PROMPT, deadline_s=1000.0, **FIELDS)
        harness.engine.turn()
    with sqlite3.connect(tmp_path / "s" / "sessions.sqlite") as db:
        db.execute("UPDATE requests SET arrived = arrived - 1001")
    db.close()
    with life(model, tmp_path / "s") as harness:
        last = resumed(harness)[-1]
        assert isinstance(last, Failed)
        assert last.code == "deadline_exceeded"


def test_retention(model: Model, tmp_path: Path) -> None:
    """A request that nobody listens to ends, and is forgotten."""
    with life(model, tmp_path / "s") as harness:
        harness.add("r", PROMPT, **FIELDS)
        harness.engine.turn()
        harness.engine.subscriptions.leave(b"test", "r")
        harness.engine.turn()
        assert harness.engine.stats()["requests_running"] == 1
        harness.resume("r")
        harness.engine._upkeep.retention_s = 0.0
        harness.engine.turn()
        assert harness.engine.stats()["requests_running"] == 1, "it has a client again"
        harness.engine.subscriptions.leave(b"test", "r")
        harness.engine.turn()
        assert harness.engine.stats()["requests_running"] == 0
        harness.engine._upkeep._ticked = 0.0
        harness.engine.turn()
        with pytest.raises(RequestNotFound):
            harness.engine.subscriptions.resume(b"test", Resume(request_id="r"))


def test_another_tenant_and_a_running_id(model: Model, tmp_path: Path) -> None:
    with life(model, tmp_path / "s") as harness:
        harness.add("r", PROMPT, tenant="mine", **FIELDS)
        with pytest.raises(RequestNotFound):
            harness.engine.subscriptions.resume(b"test", Resume(request_id="r", tenant="theirs"))
        with pytest.raises(InvalidRequest, match="in flight"):
            harness.add("r", PROMPT, **FIELDS)
        harness.engine.cancel("r")
        with pytest.raises(InvalidRequest, match="another's"):
            harness.add("r", PROMPT, **FIELDS)
        harness.resume("r", tenant="mine")
        assert isinstance(harness.events["r"][-1], Failed), "whoever else knows its id, its end is there"
        assert harness.ask(PROMPT[:300], "r", tenant="mine", **FIELDS), "an id that has ended is free"


def test_another_model(model: Model, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with life(model, tmp_path / "s") as harness:
        harness.add("r", PROMPT, **FIELDS)
        harness.engine.turn()
    other = shared(tmp_path_factory, "qwen2")
    with life(other, tmp_path / "s") as harness:
        (*_, failed) = resumed(harness)
        assert isinstance(failed, Failed)
        assert (failed.code, failed.seq) == ("storage_failed", len(harness.events["r"]) - 1)
    with life(other, tmp_path / "s") as harness:
        assert harness.engine.left_behind() == [], "it has ended"


def test_events_that_could_not_be_written(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The running client misses nothing; one that must ask for them is told that they are lost."""
    with life(model, tmp_path / "s") as harness:
        harness.add("r", PROMPT, **FIELDS)
        for _ in range(5):
            harness.engine.turn()

        def full(*_: object) -> None:
            raise OSError(28, "no space left on device")

        monkeypatch.setattr(harness.engine._journal, "note", full)
        for _ in range(5):
            harness.engine.turn()
        with pytest.raises(StorageFailed, match="lost"):
            harness.engine.subscriptions.resume(b"test", Resume(request_id="r"))
        monkeypatch.undo()
        harness.run()
        assert len(harness.tokens()) == FIELDS["max_tokens"]
        copy = killed(tmp_path / "s")
        wanted = harness.events["r"]
    with sqlite3.connect(copy / "sessions.sqlite") as db:
        db.execute("UPDATE requests SET ended = NULL")
    db.close()
    with life(model, copy) as harness:
        assert_same(resumed(harness), wanted)
