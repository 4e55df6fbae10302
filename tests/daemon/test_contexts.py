"""Context handles and the ends of requests: cancelled, overdue, evicted, expired."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from spilld.errors import (
    Cancelled,
    ContextNotFound,
    DeadlineExceeded,
    InvalidRequest,
)
from spilld.models.model import Model
from spilld.protocol.messages import (
    Accepted,
    Done,
    Failed,
    Release,
    Released,
)

from .harness import Harness, column_bytes, engine, said, shared, some_tokens, window_bytes

PROMPT = some_tokens(1, 1400)
FIELDS: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


def keep(harness: Harness, prompt: list[int] = PROMPT) -> str:
    harness.ask(prompt, "kept", keep=True, **FIELDS)
    context = harness.done("kept").context
    assert context is not None
    return context


def release(harness: Harness, context: str) -> None:
    assert isinstance(harness.engine.manage(Release(request_id="m", context=context)), Released)


def one_window(model: Model) -> dict[str, Any]:
    return {"device_budget": window_bytes(model)}


def code(harness: Harness, request_id: str) -> str:
    last = harness.events[request_id][-1]
    return last.code if isinstance(last, Failed) else ""


class TestHandles:
    def test_unknown(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s") as harness:
            with pytest.raises(ContextNotFound, match="send the whole prompt"):
                harness.add("r", PROMPT, context="0" * 32)
            with pytest.raises(ContextNotFound):
                release(harness, "0" * 32)
            assert not harness.events

    def test_requests_on_one_run_one_after_the_other(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s") as harness:
            context = keep(harness)
            harness.add("a", PROMPT[:5], context=context, **FIELDS)
            harness.add("b", PROMPT[:5], context=context, **FIELDS)
            with pytest.raises(InvalidRequest, match="a request runs on"):
                release(harness, context)
            harness.run()
            assert harness.done("a").context == context, "a continued context is kept unasked"
            assert harness.done("b").context == context
            assert harness.done("b").usage.cached_tokens == 1400 + 8 + 5 + 8 - 1

    def test_a_refused_request_leaves_the_context(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s", max_context=1500) as harness:
            context = keep(harness)
            with pytest.raises(Exception, match="have 1508 tokens"):
                harness.add("a", PROMPT[:100], context=context)
            assert len(harness.ask(PROMPT[:50], context=context, **FIELDS)) == 8

    def test_released(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s") as harness:
            context = keep(harness)
            stats = harness.engine.stats()
            assert stats["contexts_idle"] == 1
            assert stats["device_used_bytes"] == window_bytes(model)
            release(harness, context)
            while harness.engine._store.writing:
                harness.engine.rest()
            harness.engine.check_integrity()
            stats = harness.engine.stats()
            assert [stats[f"{tier}_used_bytes"] for tier in ("device", "host")] == [0, 0]
            assert stats["contexts_idle"] == 0
            assert stats["reserved_blocks"] == 0
            with pytest.raises(ContextNotFound):
                harness.add("a", PROMPT, context=context)

    def test_one_that_made_way_comes_back(self, model: Model, tmp_path: Path) -> None:
        """A window for one sequence: each request takes it from the context before."""
        with engine(model, tmp_path / "a") as harness:
            old = keep(harness)
            wanted = harness.ask(PROMPT[:9], context=old, **FIELDS)
        with engine(model, tmp_path / "s", **one_window(model)) as harness:
            old = keep(harness)
            harness.ask(PROMPT[:100], **FIELDS)
            assert len(harness.engine.contexts) == 0
            assert harness.ask(PROMPT[:9], context=old, **FIELDS) == wanted
            assert harness.done().usage.cached_tokens == 1407, "from disk"

    def test_one_whose_kv_is_nowhere_is_computed_again(self, model: Model, tmp_path: Path) -> None:
        budget = 20 * column_bytes(model, "k8v4")
        with engine(model, tmp_path / "s", host_budget=budget, disk_budget=0) as harness:
            context = keep(harness)
            assert harness.ask(PROMPT[:500], **FIELDS)
            assert len(harness.engine.contexts) == 1, "there was room beside it"
            assert len(harness.ask(PROMPT, **FIELDS)) == 8
            assert len(harness.engine.contexts) == 0
            again = harness.ask(PROMPT[:9], context=context, **FIELDS)
            assert harness.done().usage.cached_tokens == 0
        with engine(model, tmp_path / "a") as harness:
            assert again == harness.ask(PROMPT[:9], context=keep(harness), **FIELDS)

    def test_expired(self, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("spilld.engine.upkeep.TICK_S", 0.0)
        with engine(model, tmp_path / "s", context_ttl_s=0.2) as harness:
            context = keep(harness)
            harness.add("a", PROMPT[:5], context=context, **FIELDS)
            time.sleep(0.25)
            harness.run()
            assert harness.done("a").context == context, "one that is used does not expire"
            time.sleep(0.25)
            harness.run()
            assert len(harness.engine.contexts) == 0
            with pytest.raises(ContextNotFound):
                harness.add("b", PROMPT[:5], context=context)

    def test_a_continuation_behind_a_request_that_needs_its_window(
        self, model: Model, tmp_path: Path
    ) -> None:
        """Neither may wait for the other: the first in line is served, the other's context comes back."""
        with engine(model, tmp_path / "s", **one_window(model)) as harness:
            context = keep(harness)
            harness.add("first", PROMPT[:20], **FIELDS)
            harness.add("second", PROMPT[:20], context=context, **FIELDS)
            harness.add("third", PROMPT[:20], **FIELDS)
            harness.run()
            assert [len(harness.tokens(name)) for name in ("first", "second", "third")] == [8, 8, 8]
            cached = harness.done("second").usage.cached_tokens
            assert cached in (1407, 1400), "from disk, where its newest tail may not yet be"


class TestEnds:
    def test_cancelled_while_waiting(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s", **one_window(model)) as harness:
            harness.add("r", PROMPT, **FIELDS)
            harness.add("w", PROMPT, **FIELDS)
            harness.engine.turn()
            harness.engine.cancel("w")
            harness.engine.cancel("unknown")
            assert [type(event) for event in harness.events["w"]] == [Failed]
            assert code(harness, "w") == "cancelled"
            harness.run()
            assert len(harness.tokens("r")) == 8

    @pytest.mark.parametrize("tokens", [0, 3])
    def test_cancelled_while_running(self, model: Model, tokens: int, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s") as harness:
            alone = harness.ask(PROMPT[:900], "b", **FIELDS)
            harness.events.clear()
            harness.add("r", PROMPT, **FIELDS)
            harness.add("b", PROMPT[:900], **FIELDS)
            harness.engine.turn()
            while said(harness, "r") < tokens:
                harness.engine.turn()
            before = list(harness.events["r"])
            harness.engine.cancel("r")
            harness.engine.check_integrity()
            with pytest.raises(Cancelled):
                harness.tokens("r")
            harness.run()
            assert harness.events["r"][:-1] == before, "nothing comes after the end"
            assert harness.tokens("b") == alone
            assert harness.engine.stats()["device_used_bytes"] == 0

    @pytest.mark.parametrize("tokens", [0, 3])
    def test_a_context_survives_a_cancelled_continuation(
        self, model: Model, tokens: int, tmp_path: Path
    ) -> None:
        more = some_tokens(9, 700)
        with engine(model, tmp_path / "s") as harness:
            context = keep(harness)
            history = PROMPT + harness.tokens("kept") + more
            harness.add("r", more, context=context, **FIELDS)
            harness.engine.turn()
            while said(harness, "r") < tokens:
                harness.engine.turn()
            harness.engine.cancel("r")
            history += harness.engine.sessions.store.get("", context).tokens[len(history) :]
            assert len(history) == 1408 + 700 + tokens
            continued = harness.ask(PROMPT[:30], context=context, **FIELDS)
            assert continued == harness.ask(history + PROMPT[:30], **FIELDS)

    def test_a_deadline_that_cannot_be_met(self, model: Model, tmp_path: Path) -> None:
        """Nothing of it is computed, as others wait; what the steps before have shown says so."""
        with engine(model, tmp_path / "s") as harness:
            harness.ask(PROMPT, "first", **FIELDS)
            for _ in range(20):
                harness.engine._prefill.took([(0, 1)], 1000.0)
            harness.add("late", PROMPT[7:], deadline_s=30.0, **FIELDS)
            harness.add("patient", PROMPT[8:], **FIELDS)
            harness.run()
            with pytest.raises(DeadlineExceeded, match="its prompt alone would take"):
                harness.tokens("late")
            assert [type(event) for event in harness.events["late"]] == [Accepted, Failed]
            assert harness.tokens("patient")
            assert harness.ask(PROMPT[9:], "alone", deadline_s=30.0, **FIELDS)

    def test_overdue(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s", **one_window(model)) as harness:
            harness.add("r", PROMPT, deadline_s=0.3, max_tokens=2000, ignore_eos=True)
            harness.add("w", PROMPT, deadline_s=1e-6, **FIELDS)
            harness.add("n", PROMPT[:20], deadline_s=60.0, **FIELDS)
            harness.run()
            for name in "rw":
                with pytest.raises(DeadlineExceeded, match="not done after"):
                    harness.tokens(name)
            assert isinstance(harness.events["n"][-1], Done)
