"""Sessions of chats and answers that end early: what they hold is what the client was told."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spilld.errors import ForeignSession, InvalidRequest
from spilld.models.model import Model
from spilld.protocol.messages import (
    Accepted,
    ChangeSession,
    Generate,
    ListSessions,
    Message,
    Sessions,
    Token,
)
from spilld.sessions.store import Session

from .harness import Harness, engine, said, shared, some_tokens

CLIENT = b"test"
FIELDS: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
SYSTEM = Message(role="system", content="be brief")
ONE, TWO, THREE = (Message(role="user", content=word) for word in ("one", "two", "three"))
LONG = Message(role="user", content="the model " * 200)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


def add(harness: Harness, messages: Sequence[Message] | str, request_id: str = "r", **fields: Any) -> None:
    """As the service does it: a new chat comes in tokens."""
    prompt = messages if isinstance(messages, str) else tuple(messages)
    request = Generate(request_id=request_id, prompt=prompt, **fields)
    tokens: list[int] = []
    if prompt and not isinstance(prompt, str) and request.context is None and request.session is None:
        tokens = harness.engine.model.tokenizer.chat(prompt, answer=request.max_tokens > 0)
    harness.events.pop(request_id, None)
    harness.engine.add(CLIENT, request, tokens)


def say(harness: Harness, messages: Sequence[Message] | str, **fields: Any) -> str:
    add(harness, messages, **{**FIELDS, **fields})
    harness.run()
    harness.tokens()
    return harness.done().text


def book(harness: Harness, name: str = "s") -> Session:
    return harness.engine.sessions.store.get("", name)


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


def holds(harness: Harness, model: Model, *messages: Message, name: str = "s") -> None:
    """The session's messages are these, and its tokens say the same."""
    session = book(harness, name)
    assert session.messages == messages
    *turns, last = messages
    spoken = last.role == "assistant"
    opened = model.tokenizer.chat(turns if spoken else messages, answer=spoken)
    wanted = model.tokenizer.decode(opened) + (last.content if spoken else "")
    assert model.tokenizer.decode(session.tokens) == wanted


class TestAppended:
    def test_then_answered(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "a") as harness:
            wanted = say(harness, [SYSTEM, ONE, TWO], session="s")
            tokens = book(harness).tokens
        with engine(model, tmp_path / "s") as harness:
            assert say(harness, [SYSTEM, ONE], session="s", max_tokens=0) == ""
            holds(harness, model, SYSTEM, ONE)
            assert say(harness, [TWO], session="s") == wanted
            holds(harness, model, SYSTEM, ONE, TWO, assistant(wanted))
            assert book(harness).tokens == tokens

    @pytest.mark.parametrize("prompt", ["", []])
    def test_then_asked_for_the_answer(self, model: Model, prompt: Any, tmp_path: Path) -> None:
        with engine(model, tmp_path / "a") as harness:
            wanted = say(harness, [SYSTEM, ONE], session="s")
        with engine(model, tmp_path / "s", keep_state=True) as harness:
            say(harness, [SYSTEM], session="s", max_tokens=0)
            say(harness, [ONE], session="s", max_tokens=0)
            say(harness, prompt, session="s", max_tokens=0)
            holds(harness, model, SYSTEM, ONE)
        with engine(model, tmp_path / "s") as harness:
            assert say(harness, prompt, session="s") == wanted
            holds(harness, model, SYSTEM, ONE, assistant(wanted))

    def test_an_answer_goes_on(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "a") as harness:
            wanted = say(harness, [ONE], session="s", max_tokens=20)
        with engine(model, tmp_path / "s") as harness:
            first = say(harness, [ONE], session="s", max_tokens=8)
            assert first + say(harness, "", session="s", max_tokens=12) == wanted
            holds(harness, model, ONE, assistant(wanted))

    def test_the_context_of_a_chat(self, model: Model, tmp_path: Path) -> None:
        """One that was appended to a kept context, before its first answer."""
        with engine(model, tmp_path / "a") as harness:
            wanted = say(harness, [ONE, TWO])
        with engine(model, tmp_path / "s") as harness:
            say(harness, [ONE], keep=True, max_tokens=0)
            assert say(harness, [TWO], context=harness.done().context) == wanted

    def test_a_conversation_that_was_had_elsewhere(self, model: Model, tmp_path: Path) -> None:
        """It ends with what the model said, or began to say: that is gone on with, or answered."""
        with engine(model, tmp_path / "a") as harness:
            begun = say(harness, [ONE, assistant("I say")], session="s")
            holds(harness, model, ONE, assistant("I say" + begun))
            wanted = say(harness, [ONE, assistant("I say"), TWO])
        with engine(model, tmp_path / "s") as harness:
            say(harness, [ONE, assistant("I say")], session="s", max_tokens=0)
            holds(harness, model, ONE, assistant("I say"))
            say(harness, [ONE, assistant("I say")], session="t", max_tokens=0)
            assert say(harness, "", session="s") == begun
            assert say(harness, [TWO], session="t") == wanted

    def test_a_raw_prompt_is_warmed_up(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path) as harness:
            harness.ask(some_tokens(1, 300), session="s", **FIELDS)
            say(harness, "", session="s", max_tokens=0)
            assert book(harness).messages is None
            with pytest.raises(InvalidRequest, match="raw prompt"):
                say(harness, [ONE], session="s")


class TestWarmedUp:
    @pytest.mark.parametrize("length", [40, 509, 510, 511, 512, 513])
    def test_an_answer_that_ended_by_itself(self, model: Model, length: int, tmp_path: Path) -> None:
        """All of it was computed: nothing is left, and that takes no negative time."""
        prompt, before = some_tokens(length, length), model.geometry.eos
        with engine(model, tmp_path) as harness:
            told = harness.ask(prompt, **FIELDS)
            at = next(i for i in range(2, 12) if told[i] not in told[:i])
            model.geometry.__dict__["eos"] = frozenset({told[at]})
            try:
                assert harness.ask(prompt, session="z", max_tokens=12) == told[: at + 1]
                assert harness.done().reason == "eos"
                for _ in range(2):
                    assert harness.ask([], session="z", max_tokens=0) == []
                    (accepted,) = [e for e in harness.events["r"] if isinstance(e, Accepted)]
                    assert accepted.first_token_s is not None
                    assert accepted.first_token_s >= 0
                assert harness.ask([], session="z", max_tokens=9) == [told[at]], "it ends again"
            finally:
                model.geometry.__dict__["eos"] = before

    @pytest.mark.parametrize("restart", [False, True])
    def test_a_session_that_is_full(self, model: Model, restart: bool, tmp_path: Path) -> None:
        with engine(model, tmp_path, keep_state=restart, max_context=400) as harness:
            harness.ask(some_tokens(1, 300), session="s", max_tokens=1000, ignore_eos=True)
            assert len(book(harness).tokens) == 400
            if not restart:
                assert harness.ask([], session="s", max_tokens=0) == []
        if restart:
            with engine(model, tmp_path, max_context=400) as harness:
                assert harness.ask([], session="s", max_tokens=0) == []
                with pytest.raises(InvalidRequest, match="at most 399 leave room to answer"):
                    harness.ask([], session="s", max_tokens=1)
                with pytest.raises(InvalidRequest, match="at most 400 fit"):
                    harness.ask([5], session="s", max_tokens=0)


class TestStopped:
    """The session ends where its answer does, and goes on as if nothing else had ever been computed."""

    @pytest.mark.parametrize("length", [3, 250, 500, 505, 506, 507, 508, 509, 510, 511, 512, 1275])
    @pytest.mark.parametrize("restart", [False, True])
    def test_anywhere_on_the_grid(self, model: Model, length: int, restart: bool, tmp_path: Path) -> None:
        prompt, more = some_tokens(length, length), some_tokens(9, 40)
        with engine(model, tmp_path / "a", format="exact") as harness:
            harness.ask(prompt, **FIELDS)
            pieces = [e.text for e in harness.events["r"] if isinstance(e, Token)]
        text = "".join(pieces)
        middle = len("".join(pieces[:5]))
        stop = text[middle + 1 : middle + 6]
        assert stop
        with engine(model, tmp_path / "s", format="exact", keep_state=restart) as harness:
            harness.ask(prompt, session="s", stop=(stop,), **FIELDS)
            done = harness.done()
            assert (done.reason, done.text) == ("stop", text[: text.index(stop)])
            held = list(book(harness).tokens)
            assert held[:length] == prompt
            assert model.tokenizer.decode(held).endswith(done.text)
            assert stop not in model.tokenizer.decode(held[length:])
            if not restart:
                found = harness.ask(more, session="s", **FIELDS)
        if restart:
            with engine(model, tmp_path / "s", format="exact") as harness:
                found = harness.ask(more, session="s", **FIELDS)
        with engine(model, tmp_path / "b", format="exact") as harness:
            assert found == harness.ask(held + more, **FIELDS)

    def test_what_is_left_of_it_need_not_be_computed(self, model: Model, tmp_path: Path) -> None:
        """Where the cut lies before the cell of the last token, the tail amid the answer serves it."""
        prompt = some_tokens(4, 1270)
        with engine(model, tmp_path / "a") as harness:
            harness.ask(prompt, **FIELDS | {"max_tokens": 30})
            pieces = [e.text for e in harness.events["r"] if isinstance(e, Token)]
        text = "".join(pieces)
        stop = text[len("".join(pieces[:6])) : len("".join(pieces[:16]))]
        with engine(model, tmp_path / "s") as harness:
            harness.ask(prompt, session="s", stop=(stop,), **FIELDS | {"max_tokens": 30})
            assert harness.done().reason == "stop"
            assert len(book(harness).tokens) < 1280 < 1270 + len(harness.tokens())
            harness.ask(some_tokens(9, 40), session="s", **FIELDS)
            assert harness.done().usage.cached_tokens >= 1270

    def test_a_chat(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "a") as harness:
            text = say(harness, [ONE])
        stop = text[5:9]
        with engine(model, tmp_path / "s") as harness:
            shown = say(harness, [ONE], session="s", stop=(stop,))
            assert shown == text[: text.index(stop)]
            holds(harness, model, ONE, assistant(shown))
            answer = say(harness, [TWO], session="s")
            holds(harness, model, ONE, assistant(shown), TWO, assistant(answer))

    def test_half_a_stop_string_is_text_at_the_end(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path) as harness:
            text = say(harness, [ONE], session="s")
            assert say(harness, [ONE], session="t", stop=(text[-2:] + "never",)) == text
            assert book(harness, "t").tokens == book(harness).tokens


class TestCancelled:
    """After `accepted` the session holds what was asked and what was told of the answer."""

    @pytest.mark.parametrize("tokens", range(1, 9))
    def test_amid_the_answer(self, model: Model, tokens: int, tmp_path: Path) -> None:
        with engine(model, tmp_path) as harness:
            add(harness, [SYSTEM, ONE], session="s", stop=("\n\n\n\n",), **FIELDS)
            while said(harness, "r") < tokens:
                harness.engine.turn()
            told = "".join(e.text for e in harness.events["r"] if isinstance(e, Token))
            harness.engine.cancel("r")
            harness.run()
            holds(harness, model, *([SYSTEM, ONE, assistant(told)] if told else [SYSTEM, ONE]))
            answer = say(harness, [TWO], session="s")
            assert book(harness).messages is not None
            roles = [message.role for message in book(harness).messages or ()]
            assert roles == ["system", "user", *(["assistant"] if told else []), "user", "assistant"]
            assert answer

    @pytest.mark.parametrize("turns", [1, 3])
    def test_amid_the_prompt(self, model: Model, turns: int, tmp_path: Path) -> None:
        """No turn of the model's has begun."""
        with engine(model, tmp_path / "a") as harness:
            wanted = say(harness, [LONG, TWO])
        with engine(model, tmp_path / "s", chunk_tokens=64) as harness:
            add(harness, [LONG], session="s", **FIELDS)
            for _ in range(turns):
                harness.engine.turn()
            assert said(harness, "r") == 0
            harness.engine.cancel("r")
            harness.run()
            holds(harness, model, LONG)
            assert say(harness, [TWO], session="s") == wanted

    def test_before_it_is_accepted(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path) as harness:
            say(harness, [ONE], session="s")
            before = book(harness)
            add(harness, [TWO], session="s", **FIELDS)
            harness.engine.cancel("r")
            harness.run()
            assert [type(event).__name__ for event in harness.events["r"]] == ["Failed"]
            assert book(harness) == before
            add(harness, [TWO], "first", session="new", **FIELDS)
            harness.engine.cancel("first")
            harness.run()
            reply = harness.engine.manage(ListSessions(request_id="m"))
            assert isinstance(reply, Sessions)
            assert [info.name for info in reply.sessions] == ["s"]


class TestAnotherModel:
    @pytest.fixture
    def other(self, tmp_path_factory: pytest.TempPathFactory) -> Model:
        return shared(tmp_path_factory, "qwen3")

    @pytest.mark.parametrize("prompt", [[TWO], "", "text"])
    def test_it_is_refused_and_stays(self, model: Model, other: Model, prompt: Any, tmp_path: Path) -> None:
        with engine(model, tmp_path, keep_state=True) as harness:
            say(harness, [ONE], session="s")
            say(harness, [ONE], keep=True)
            handle, before = harness.done().context, book(harness)
        with engine(other, tmp_path, keep_state=True) as harness:
            add(harness, [ONE], "good", session="mine", **FIELDS)
            harness.engine.turn()
            for fields in ({"session": "s"}, {"context": handle}, {"session": "s", "max_tokens": 0}):
                with pytest.raises(
                    ForeignSession, match=f"is of model '{model.name}', here is '{other.name}'"
                ):
                    say(harness, prompt, **fields)
            harness.run()
            assert harness.done("good").text
            infos = harness.engine.manage(ListSessions(request_id="m"))
            assert isinstance(infos, Sessions)
            assert {i.name: i.model for i in infos.sessions} == {"s": model.name, "mine": other.name}
            harness.engine.manage(ChangeSession(request_id="m", session="s", action="fork", into="t"))
            with pytest.raises(ForeignSession):
                say(harness, prompt, session="t")
            assert book(harness).tokens == before.tokens
        with engine(model, tmp_path) as harness:
            assert say(harness, [TWO], session="s")

    def test_the_same_model_in_another_dtype(self, model: Model, tmp_path: Path) -> None:
        """Its KV is computed anew, its tokens mean the same."""
        from spilld.models.model import load

        half = load(model.folder, "bfloat16", cache=model.folder / "cache")
        assert half.fingerprint != model.fingerprint
        with engine(model, tmp_path, keep_state=True) as harness:
            say(harness, [ONE], session="s")
        with engine(half, tmp_path) as harness:
            assert say(harness, [TWO], session="s")


class TestFullDisk:
    def fill(self, harness: Harness) -> None:
        db = harness.engine._journal._db
        ((pages,),) = db.rows("PRAGMA page_count")
        db.run(f"PRAGMA max_page_count = {pages}")

    def free(self, harness: Harness) -> None:
        harness.engine._journal._db.run("PRAGMA max_page_count = 1000000")

    def test_the_conversation_goes_on_and_is_saved_later(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "a") as harness:
            wanted = [say(harness, [m], session="s") for m in (ONE, LONG, TWO, THREE)]
            whole = book(harness)
        with engine(model, tmp_path / "s", keep_state=True) as harness:
            answers = [say(harness, [ONE], session="s")]
            assert harness.done().saved
            self.fill(harness)
            for message in (LONG, TWO):
                answers.append(say(harness, [message], session="s"))
                assert not harness.done().saved
            infos = harness.engine.manage(ListSessions(request_id="m"))
            assert isinstance(infos, Sessions)
            (info,) = infos.sessions
            holds(
                harness,
                model,
                *itertools.chain(
                    *([m, assistant(a)] for m, a in zip((ONE, LONG, TWO), answers, strict=True))
                ),
            )
            assert info.tokens == len(book(harness).tokens)
        with engine(model, tmp_path / "s", keep_state=True) as harness:
            assert len(book(harness).messages or ()) == 2, "it was killed before there was room"
        assert answers == wanted[:3]
        assert whole.messages is not None

    def test_saved_once_there_is_room(
        self, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("spilld.engine.upkeep.TICK_S", 0.0)
        with engine(model, tmp_path, keep_state=True) as harness:
            self.fill(harness)
            say(harness, [LONG], session="new")
            assert not harness.done().saved
            before = book(harness, "new")
            self.free(harness)
            harness.run()
            assert say(harness, [ONE], session="other")
            assert harness.done().saved
        with engine(model, tmp_path) as harness:
            assert book(harness, "new") == before
            assert say(harness, [TWO], session="new")

    def test_a_turn_is_not_had_twice(self, model: Model, tmp_path: Path) -> None:
        """Its session is written when there is room, and with it that the request has ended."""
        with engine(model, tmp_path, keep_state=True) as harness:
            add(harness, [ONE], session="s", **FIELDS)
            while said(harness, "r") < 12 - 1:
                harness.engine.turn()
            harness.engine._journal._db.run("PRAGMA query_only = 1")
            harness.run()
            assert not harness.done().saved
            harness.resume("r", harness.done().seq)
            assert not harness.done().saved, "its client may have missed it"
            harness.engine._journal._db.run("PRAGMA query_only = 0")
            harness.engine._upkeep._ticked = 0.0
            harness.run()
            before = book(harness)
        with engine(model, tmp_path) as harness:
            assert harness.engine.left_behind() == []
            assert book(harness) == before

    def test_changes_meanwhile(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path, keep_state=True) as harness:
            self.fill(harness)
            say(harness, [LONG], session="new")
            assert not harness.done().saved
            say(harness, [LONG], session="gone")
            for action, into in (("fork", "x"), ("rename", "y"), ("pin", None)):
                with pytest.raises(OSError, match=r"full|in memory only"):
                    harness.engine.manage(
                        ChangeSession(request_id="m", session="new", action=action, into=into)
                    )
            harness.engine.manage(ChangeSession(request_id="m", session="gone", action="delete"))
            with pytest.raises(InvalidRequest, match="already"):
                harness.engine.manage(
                    ChangeSession(request_id="m", session="new", action="rename", into="new")
                )
            self.free(harness)
            harness.engine._upkeep._ticked = 0.0
            harness.run()
            harness.engine.manage(ChangeSession(request_id="m", session="new", action="rename", into="kept"))
            infos = harness.engine.manage(ListSessions(request_id="m"))
            assert isinstance(infos, Sessions)
            assert [info.name for info in infos.sessions] == ["kept"]
        with engine(model, tmp_path) as harness:
            assert say(harness, [TWO], session="kept")
