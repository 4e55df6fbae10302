"""Context handles and the ends of requests: cancelled, overdue, evicted, expired."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from spilld.daemon.errors import Cancelled, ContextNotFound, DeadlineExceeded
from spilld.daemon.model import Model
from spilld.daemon.protocol import Done, Failed

from .harness import CLIENT, Harness, column_bytes, engine, said, shared, some_tokens, window_bytes

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


def one_window(model: Model) -> dict[str, Any]:
    return {"device_budget": window_bytes(model)}


def code(harness: Harness, request_id: str) -> str:
    last = harness.events[request_id][-1]
    return last.code if isinstance(last, Failed) else ""


class TestHandles:
    def test_unknown(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s") as harness:
            with pytest.raises(ContextNotFound, match="send the whole prompt again"):
                harness.add("r", PROMPT, context="0" * 32)
            with pytest.raises(ContextNotFound):
                harness.engine.release("0" * 32)
            assert not harness.events

    def test_in_use_and_again_afterwards(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s") as harness:
            context = keep(harness)
            harness.add("a", PROMPT[:5], context=context, **FIELDS)
            with pytest.raises(ContextNotFound):
                harness.add("b", PROMPT[:5], context=context)
            with pytest.raises(ContextNotFound):
                harness.engine.release(context)
            harness.run()
            assert harness.done("a").context == context, "a continued context is kept unasked"
            harness.ask(PROMPT[:5], context=context, **FIELDS)
            assert len({event.request_id for events in harness.events.values() for event in events}) == 3

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
            harness.engine.release(context)
            harness.engine.check_integrity()
            stats = harness.engine.stats()
            assert [stats[f"{tier}_used_bytes"] for tier in ("device", "host", "disk")] == [0, 0, 0]
            assert stats["promised_blocks"] == 0
            with pytest.raises(ContextNotFound):
                harness.add("a", PROMPT, context=context)

    def test_evicted_by_a_request_that_needs_its_window(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s", device_budget=2 * window_bytes(model)) as harness:
            old, new = keep(harness), keep(harness, PROMPT[:100])
            harness.ask(PROMPT[:9], **FIELDS)
            with pytest.raises(ContextNotFound):
                harness.add("a", PROMPT, context=old)
            assert harness.ask(PROMPT[:9], context=new, **FIELDS), "the newer one stays"

    def test_evicted_by_a_request_that_needs_its_blocks(self, model: Model, tmp_path: Path) -> None:
        budget = 20 * column_bytes(model, "k8v4")
        with engine(model, tmp_path / "s", host_budget=budget, disk_budget=0) as harness:
            context = keep(harness)
            assert harness.ask(PROMPT[:500], **FIELDS)
            assert len(harness.engine.contexts) == 1, "there was room beside it"
            assert len(harness.ask(PROMPT, **FIELDS)) == 8
            with pytest.raises(ContextNotFound):
                harness.add("a", PROMPT, context=context)

    def test_expired(self, model: Model, tmp_path: Path) -> None:
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
        """Neither may wait for the other: the first in line is served, the other is told."""
        with engine(model, tmp_path / "s", **one_window(model)) as harness:
            context = keep(harness)
            harness.add("first", PROMPT[:20], **FIELDS)
            harness.add("second", PROMPT[:20], context=context, **FIELDS)
            harness.add("third", PROMPT[:20], **FIELDS)
            harness.run()
            assert len(harness.tokens("first")) == len(harness.tokens("third")) == 8
            assert code(harness, "second") == "context_not_found"


class TestEnds:
    def test_cancelled_while_waiting(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s", **one_window(model)) as harness:
            harness.add("r", PROMPT, **FIELDS)
            harness.add("w", PROMPT, **FIELDS)
            harness.engine.turn()
            harness.engine.cancel(CLIENT, "w")
            harness.engine.cancel(b"another client", "r")
            harness.engine.cancel(CLIENT, "unknown")
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
            harness.engine.cancel(CLIENT, "r")
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
            harness.engine.cancel(CLIENT, "r")
            history += harness.engine.contexts.look(context).sequence.tokens[len(history) :]
            assert len(history) == 1408 + 700 + tokens
            continued = harness.ask(PROMPT[:30], context=context, **FIELDS)
            assert continued == harness.ask(history + PROMPT[:30], **FIELDS)

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
