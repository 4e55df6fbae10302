"""What goes wrong with one request is its own affair: others finish with the tokens that they have alone."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spilld import Client
from spilld.attention.base import AttentionPlan
from spilld.attention.cpu import CpuAttention
from spilld.engine.arrivals import LIVES
from spilld.engine.sessions.manager import SessionManager
from spilld.errors import InternalError, SpilldError
from spilld.models.model import Model
from spilld.offload.store.store import Store
from spilld.protocol.messages import (
    ChangeSession,
    Done,
    Failed,
    Generate,
    ListSessions,
    Message,
    Resume,
    Sampling,
    Sessions,
    Token,
)
from spilld.requests.request_state import RequestState
from spilld.runner.sampler import Sampler
from spilld.runner.sequence_manager import SequenceManager
from spilld.sessions.journal import Journal
from spilld.sessions.store import SessionStore
from spilld.tokenizer.detokenizer import Detokenizer
from spilld.tokenizer.tokenizer import Tokenizer

from .harness import Harness, daemon, engine, said, shared, some_tokens
from .test_service import CLIENT, Desk, desk

GOOD = some_tokens(1, 700)
BAD = some_tokens(2, 900)
MORE = some_tokens(3, 100)
FIELDS: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}
MARK = Sampling(temperature=0.5, seed=666)
"""By this the sampler knows the bad one."""


class Bug(Exception):
    """Nobody expects it."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@pytest.fixture(scope="session")
def alone(model: Model, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    with engine(model, tmp_path_factory.mktemp("alone")) as harness:
        return harness.ask(GOOD, **FIELDS)


def bad(harness: Harness) -> RequestState | None:
    return harness.engine.requests.find("bad")


def is_bad(harness: Harness, table: object) -> bool:
    state = bad(harness)
    return state is not None and state.sequence is not None and state.sequence.table is table


Guilty = Callable[..., bool]
SEAMS: dict[str, tuple[type, str, Callable[[Harness], Guilty]]] = {
    "sampler": (Sampler, "choose", lambda _: lambda self, *_: self._sampling == MARK),
    "detokenizer": (Detokenizer, "push", lambda h: lambda self, _: _reads(h, self)),
    "detokenizer's end": (Detokenizer, "finish", lambda h: lambda self: _reads(h, self)),
    "what it held": (
        SessionManager,
        "tokens_after",
        lambda _: lambda _self, g: g.request.request_id == "bad",
    ),
    "what its session is": (
        SessionManager,
        "after",
        lambda _: lambda _self, _session, g, *_: g.request.request_id == "bad",
    ),
    "its place in the store": (Store, "grow", lambda h: lambda _self, table, *_: is_bad(h, table)),
    "its reservation": (Store, "reserve", lambda h: lambda _self, table, *_: is_bad(h, table)),
    "what was stored": (SequenceManager, "find", lambda h: lambda _self, s: is_bad(h, s.table)),
    "saving it": (SequenceManager, "save", lambda h: lambda _self, s, *_: is_bad(h, s.table)),
    "its progress": (RequestState, "progress", lambda _: lambda self, *_: self.request.request_id == "bad"),
    "its account": (RequestState, "account", lambda _: lambda self, *_: self.request.request_id == "bad"),
    "attention": (
        CpuAttention,
        "forward",
        lambda h: lambda _self, _layer, _q, _k, _v, plan, _sinks: has_bad(h, plan),
    ),
}


def has_bad(harness: Harness, plan: AttentionPlan) -> bool:
    return any(is_bad(harness, item.sequence.table) for item in plan.batch.items)


def _reads(harness: Harness, detokenizer: Detokenizer) -> bool:
    state = bad(harness)
    return state is not None and state.completion._detokenizer is detokenizer


def breaks(patch: pytest.MonkeyPatch, kind: type, name: str, guilty: Guilty) -> None:
    real = getattr(kind, name)

    def maybe(*given: Any, **named: Any) -> Any:
        if guilty(*given):
            raise Bug(name)
        return real(*given, **named)

    patch.setattr(kind, name, maybe)


@pytest.mark.parametrize("moment", ["together", "later"])
@pytest.mark.parametrize("seam", SEAMS)
def test_a_bug_in_one_request(
    model: Model,
    alone: list[int],
    seam: str,
    moment: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with engine(model, tmp_path) as harness, monkeypatch.context() as patch:
        kind, name, guilty = SEAMS[seam]
        breaks(patch, kind, name, guilty(harness))
        harness.add("good", GOOD, session="good", **FIELDS)
        while moment == "later" and said(harness, "good") < 5:
            harness.engine.turn()
        harness.add("bad", BAD, session="bad", sampling=MARK, **FIELDS)
        harness.run()
        assert harness.tokens("good") == alone
        with pytest.raises(InternalError, match=name):
            harness.tokens("bad")
        patch.undo()
        sessions = harness.engine.manage(ListSessions(request_id="m"))
        assert isinstance(sessions, Sessions)
        assert [info.name for info in sessions.sessions] == ["good"]
        assert len(harness.ask(BAD, "again", session="bad", **FIELDS)) == 40, "its session is free"


def test_a_journal_that_breaks_costs_the_restart_only(
    model: Model, alone: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(model, tmp_path) as harness, monkeypatch.context() as patch:
        breaks(patch, Journal, "note", lambda _self, _number, event: event.request_id == "bad")
        harness.add("good", GOOD, **FIELDS)
        harness.add("bad", BAD, session="s", **FIELDS)
        harness.run()
        assert harness.tokens("good") == alone
        assert len(harness.tokens("bad")) == 40
        assert not harness.done("bad").saved
        patch.undo()
        breaks(patch, Journal, "begin", lambda _self, entry: entry.request.request_id == "bad")
        with pytest.raises(Bug):
            harness.add("bad", BAD, **FIELDS)
        harness.run()
        assert harness.engine.stats()["requests_waiting"] == 0, "one that is refused leaves no trace"


def test_a_step_that_seals_for_others_is_computed_again(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that breaks in its last layer has written over numbers that its first had sealed."""
    prompt = some_tokens(5, 761)
    fields = FIELDS | {"max_tokens": 20, "logprobs": 0}
    with engine(model, tmp_path / "alone", format="exact") as harness:
        harness.ask(prompt, "good", **fields)
        wanted = logprobs(harness)
    with engine(model, tmp_path / "s", format="exact") as harness, monkeypatch.context() as patch:
        harness.add("good", prompt, **fields)
        while said(harness, "good") < 8:  # position 768, the next step's, seals a cell and takes its place
            harness.engine.turn()
        last = len(model.geometry.layers) - 1

        def guilty(
            _self: object, layer: int, _q: object, _k: object, _v: object, plan: AttentionPlan, _sinks: object
        ) -> bool:
            return layer == last and has_bad(harness, plan)

        breaks(patch, CpuAttention, "forward", guilty)
        harness.add("bad", BAD[:300], **fields)
        harness.run()
        assert logprobs(harness) == pytest.approx(wanted, abs=1e-5)
        with pytest.raises(InternalError):
            harness.tokens("bad")


def logprobs(harness: Harness) -> list[float]:
    """Of the good one's tokens: one number that is wrong among many may change no token."""
    harness.tokens("good")
    return [e.logprob for e in harness.events["good"] if isinstance(e, Token) and e.logprob is not None]


@pytest.mark.parametrize(
    ("kind", "name", "guilty"),
    [
        (Detokenizer, "__init__", lambda _self, _tokenizer, prompt: list(prompt) == BAD),
        (SessionManager, "session", lambda _self, request, _handle: request.request_id == "bad"),
        (Tokenizer, "encode", lambda _self, text, **_: text == "bad"),
        (Journal, "begin", lambda _self, entry: entry.request.request_id == "bad"),
    ],
)
def test_a_bug_on_arrival(
    model: Model,
    alone: list[int],
    kind: type,
    name: str,
    guilty: Guilty,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with desk(model, tmp_path) as opened, monkeypatch.context() as patch:
        breaks(patch, kind, name, guilty)
        opened.submit("good", tuple(GOOD), **FIELDS)
        opened.wait("good", Token)
        opened.submit("bad", "bad" if kind is Tokenizer else tuple(BAD), session="s")
        assert opened.code("bad") == "internal"
        assert [e.token for e in ended(opened, "good") if isinstance(e, Token)] == alone
        patch.undo()
        assert idle(opened)


def ended(opened: Desk, request_id: str) -> list[Any]:
    opened.end(request_id)
    return opened.events[request_id]


def idle(opened: Desk) -> bool:
    deadline = time.monotonic() + 10
    while not opened.service.idle() and time.monotonic() < deadline:
        time.sleep(0.01)
    return opened.service.idle()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("manage", ListSessions(request_id="bad")),
        ("manage", ChangeSession(request_id="bad", session="x", action="pin")),
        ("resume", Resume(request_id="bad")),
        ("cancel", "bad"),
        ("leave", "bad"),
        ("acknowledge", "bad"),
        ("adjust", None),
    ],
)
def test_a_bug_in_a_message(
    model: Model, alone: list[int], name: str, message: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the inbox and the step: that message fails, with an answer where it has one."""
    with desk(model, tmp_path) as opened, monkeypatch.context() as patch:
        opened.submit("good", tuple(GOOD), **FIELDS)
        opened.wait("good", Token)
        owner = opened.engine if hasattr(opened.engine, name) else opened.engine.subscriptions
        breaks(patch, type(owner), name, lambda *_: True)
        sent = {
            "manage": lambda: opened.service.manage(CLIENT, message),
            "resume": lambda: opened.service.resume(CLIENT, message),
            "cancel": lambda: opened.service.cancel(message),
            "leave": lambda: opened.service.leave(CLIENT, message),
            "acknowledge": lambda: opened.service.acknowledge(message, 1),
            "adjust": lambda: opened.service.adjust(opened.config),
        }
        sent[name]()
        if name in ("manage", "resume"):
            assert opened.code("bad") == "internal"
        assert [e.token for e in ended(opened, "good") if isinstance(e, Token)] == alone
        assert idle(opened)


@pytest.mark.parametrize("tenant", ["é" * 33, "\N{WHALE}" * 64])
def test_a_tenant_of_many_bytes(model: Model, tenant: str, tmp_path: Path) -> None:
    with engine(model, tmp_path) as harness:
        first = harness.ask(GOOD, session="s", tenant=tenant, **FIELDS)
        assert first == harness.ask(GOOD, tenant=tenant, **FIELDS)
        assert harness.done().usage.cached_tokens > 0
        harness.ask(GOOD, "another's", tenant=tenant[:-1], **FIELDS)
        assert harness.done("another's").usage.cached_tokens == 0


def test_over_the_wire(model: Model, tmp_path: Path) -> None:
    """Such a request did not end, nor did any after it, nor the daemon."""
    text = "the model"
    with daemon(model, state=tmp_path / "s") as running:
        for tenant in ("é" * 33, "", "\N{WHALE}" * 64):
            with Client(running.address, tenant=tenant) as client:
                assert client.generate(text, session="s", max_tokens=4, ignore_eos=True).text()
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0
        assert time.monotonic() - began < 15


class TestRestored:
    def left(self, model: Model, state: Path) -> None:
        with engine(model, state, keep_state=True) as harness:
            harness.add("bad", BAD, tenant="t", **FIELDS)
            harness.add("good", GOOD, **FIELDS)

    def test_one_that_cannot_go_on_is_set_aside(
        self, model: Model, alone: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.left(model, tmp_path)
        breaks(monkeypatch, RequestState, "prepare", lambda self, *_: self.request.request_id == "bad")
        with desk(model, tmp_path) as opened:
            for name, tenant in (("good", ""), ("bad", "t")):
                opened.service.resume(CLIENT, Resume(request_id=name, tenant=tenant))
            assert [e.token for e in ended(opened, "good") if isinstance(e, Token)] == alone
            assert opened.code("bad") == "internal"
            assert idle(opened)
        with engine(model, tmp_path) as harness:
            assert harness.engine.left_behind() == []

    def test_one_that_ends_the_process_again_and_again(self, model: Model, tmp_path: Path) -> None:
        """Whatever it does to the process: it is not taken up for ever. One that gets further is."""
        self.left(model, tmp_path)
        for life in range(LIVES + 1):
            with engine(model, tmp_path, keep_state=True) as harness:
                left = {each.entry.request.request_id: each for each in harness.engine.left_behind()}
                harness.engine.restore(left["good"])
                harness.engine.turn()
                if life == LIVES:
                    harness.engine.restore(left["bad"])
                    harness.resume("bad", tenant="t")
                    (event,) = harness.events["bad"]
                    assert isinstance(event, Failed)
                    assert "daemons in a row" in event.message
        with engine(model, tmp_path) as harness:
            assert [each.entry.request.request_id for each in harness.engine.left_behind()] == ["good"]

    def test_one_that_waits_while_the_daemon_is_restarted(self, model: Model, tmp_path: Path) -> None:
        """It is not to blame for a stop in order, however many there are."""
        self.left(model, tmp_path)
        for _ in range(LIVES + 2):
            with engine(model, tmp_path, keep_state=True) as harness:
                for left in harness.engine.left_behind():
                    harness.engine.restore(left)
                assert harness.engine.suspend() == {"good", "bad"}

    @pytest.mark.parametrize("column", ["message = x'00'", "message = x''", "prompt = x'010203'"])
    def test_one_that_cannot_be_read(self, model: Model, column: str, tmp_path: Path) -> None:
        self.left(model, tmp_path)
        with engine(model, tmp_path, keep_state=True) as harness:
            harness.engine._journal._db.run(f"UPDATE requests SET {column} WHERE id = 'bad'")
        with engine(model, tmp_path, keep_state=True) as harness:
            assert [left.entry.request.request_id for left in harness.engine.left_behind()] == ["good"]
        with engine(model, tmp_path) as harness:
            assert [left.entry.request.request_id for left in harness.engine.left_behind()] == ["good"]

    def test_a_full_disk_does_not_stop_the_start(
        self, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.left(model, tmp_path)
        with engine(model, tmp_path) as harness:
            harness.engine._journal._db.run("PRAGMA query_only = 1")
            assert len(harness.engine.left_behind()) == 2


class TestNobodyToBlame:
    @pytest.fixture
    def opened(self, model: Model, tmp_path: Path) -> Iterator[Desk]:
        with desk(model, tmp_path) as opened:
            yield opened

    def test_once(self, opened: Desk, alone: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        """What runs may be the cause, what waits is not."""
        opened.submit("good", tuple(GOOD), session="s", **FIELDS)
        opened.wait("good", Token)
        opened.submit("waits", tuple(BAD), session="s", **FIELDS)
        with monkeypatch.context() as patch:
            failures = iter([True])
            breaks(patch, Store, "settle", lambda *_: next(failures, False))
            assert opened.code("good") == "internal"
        assert opened.end("waits").reason == "length"
        assert opened.service.lost is None

    def test_again_and_again(
        self, opened: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nothing spins: all that there is fails, and the engine ends, so that another daemon can begin."""
        opened.submit("good", tuple(GOOD), session="s", **FIELDS)
        opened.wait("good", Token)
        opened.submit("waits", tuple(BAD), session="s", **FIELDS)
        with caplog.at_level(logging.ERROR):
            breaks(monkeypatch, Store, "settle", lambda *_: True)
            assert opened.code("good") == opened.code("waits") == "internal"
            opened.service._thread.join(10)
            assert not opened.service._thread.is_alive()
        assert opened.service.lost is not None
        assert "Bug" in opened.service.lost
        assert len(caplog.records) < 12
        assert opened.service.idle()


def test_sessions_that_cannot_be_tended_stop_nobody(
    model: Model, alone: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state folder that is full, every second."""
    monkeypatch.setattr("spilld.engine.upkeep.TICK_S", 0.0)

    def full(*_: object) -> None:
        raise OSError(28, "no space left on device")

    for name in ("expired", "write_pending"):
        monkeypatch.setattr(SessionStore, name, full)
    with engine(model, tmp_path) as harness:
        assert harness.ask(GOOD, **FIELDS) == alone


def test_ids_outside_the_vocabulary(model: Model, alone: list[int], tmp_path: Path) -> None:
    """Whatever they come from: a tokenizer may know more tokens than the model."""
    vocabulary = model.geometry.vocab
    with engine(model, tmp_path) as harness:
        harness.add("good", GOOD, session="s", **FIELDS)
        while said(harness, "good") < 3:
            harness.engine.turn()
        for fields in ({}, {"session": "other"}, {"keep": True}):
            with pytest.raises(SpilldError, match=f"holds token {vocabulary}, which is not below") as refused:
                harness.add("bad", [5, vocabulary, 7], **fields)
            assert refused.value.code == "invalid_request"
        harness.run()
        assert harness.tokens("good") == alone
        book = harness.engine.sessions.store
        book._db.run("UPDATE sessions SET tokens = ?", (np.array([vocabulary], "<u4").tobytes(),))
        harness.engine.contexts.claim(("", "s"))
        with pytest.raises(SpilldError, match="the session holds token"):
            harness.add("later", GOOD, session="s", **FIELDS)
        harness.engine.contexts._idle.clear()


@pytest.mark.parametrize("held", ["nothing", "a context", "tokens"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(Store, "reserve"), (SequenceManager, "find"), (RequestState, "begin"), (SequenceManager, "open")],
)
def test_a_bug_in_an_admission_leaves_the_session_as_it_was(
    model: Model, kind: type, name: str, held: str, tmp_path: Path
) -> None:
    """Its prompt must not be in what the next request goes on with."""
    with engine(model, tmp_path) as harness:
        if held != "nothing":
            for session in ("s", "other"):
                harness.ask(GOOD[:300], session=session, **FIELDS)
        while held == "tokens" and (idle := harness.engine.contexts.oldest()) is not None:
            harness.engine._sequences.discard(idle)
        wanted = harness.ask(MORE, session="other", **FIELDS)
        with pytest.MonkeyPatch.context() as patch:
            first = iter([True])
            breaks(patch, kind, name, lambda *_: next(first, False))
            harness.add("bad", BAD, session="s", **FIELDS)
            harness.run()
            if next(first, None) is None:
                with pytest.raises(InternalError, match=name):
                    harness.tokens("bad")
                assert harness.ask(MORE, session="s", **FIELDS) == wanted


def test_many_that_cannot_begin_behind_each_other(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path) as harness:
        harness.add("first", GOOD[:40], session="s", max_tokens=2, ignore_eos=True)
        names = [f"r{i}" for i in range(600)]
        for name in names:
            message = Message(role="user", content="x")
            harness.engine.add(
                CLIENT_OF_HARNESS, Generate(request_id=name, session="s", prompt=(message,)), []
            )
        harness.run()
        for name in names:
            (event,) = harness.events[name]
            assert isinstance(event, Failed)
            assert event.code == "invalid_request", event.message
        assert not len(harness.engine.requests)


def test_what_was_never_noted_is_not_owed(model: Model, tmp_path: Path) -> None:
    """However many end while the state folder is full."""
    with engine(model, tmp_path) as harness:
        harness.engine._journal._db.run("PRAGMA query_only = 1")
        for _ in range(3):
            harness.ask(GOOD[:40], session="s", max_tokens=2, ignore_eos=True)
            assert not harness.done().saved
        assert harness.engine._journal._owed == []
        harness.engine._journal._db.run("PRAGMA query_only = 0")


def test_every_kind_of_end_is_numbered(model: Model, tmp_path: Path) -> None:
    """A failure that comes amid the last event takes that one's number."""
    with engine(model, tmp_path) as harness, pytest.MonkeyPatch.context() as patch:
        breaks(patch, RequestState, "done", lambda *_: True)
        harness.engine.add(CLIENT_OF_HARNESS, Generate(request_id="bad", prompt=tuple(BAD), **FIELDS), BAD)
        harness.run()
        events = harness.events["bad"]
        assert isinstance(events[-1], Failed)
        assert not any(isinstance(event, Done) for event in events)
        assert [event.seq for event in events] == list(range(len(events)))


CLIENT_OF_HARNESS = b"test"
