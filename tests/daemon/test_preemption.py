"""Requests that make way for others, or pause: they go on with the tokens they would have had."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spilld.errors import Cancelled, SpilldError
from spilld.kv.attention_span import CELL
from spilld.models.model import Model
from spilld.protocol.messages import Sampling, Token
from spilld.scheduler import scheduler

from .harness import (
    CLIENT,
    Harness,
    disk_tier,
    engine,
    said,
    shared,
    smallest_host_budget,
    some_tokens,
    window_bytes,
)

LONG, SHORT = some_tokens(1, 1100), some_tokens(2, 300)
ANSWER = 30


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have had nothing of the engine."""
    monkeypatch.setattr(scheduler, "QUANTUM_S", 0.0)


@contextmanager
def crowded(model: Model, state: Path, **settings: Any) -> Iterator[Harness]:
    """An engine with one window, and with little host memory."""
    fixed = {"device_budget": window_bytes(model), "host_budget": smallest_host_budget(model)}
    with engine(model, state, **{**fixed, "disk_budget": "1 GiB", **settings}) as harness:
        yield harness


def begin(harness: Harness, tokens: int = 1, **fields: Any) -> None:
    """A long request that has produced so many tokens, and another client's short one."""
    harness.add("long", LONG, max_tokens=ANSWER, ignore_eos=True, tenant="a", **fields)
    while said(harness, "long") < tokens or (not tokens and not harness.events.get("long")):
        assert harness.engine.turn()
    harness.add("short", SHORT, max_tokens=5, ignore_eos=True, tenant="b")


def alone(model: Model, state: Path, prompt: list[int], count: int, **fields: Any) -> list[int]:
    with crowded(model, state) as harness:
        return harness.ask(prompt, max_tokens=count, ignore_eos=True, **fields)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.9, seed=3)], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("tokens", [0, 1, 12])
def test_it_goes_on_where_it_was(model: Model, tmp_path: Path, sampling: Sampling, tokens: int) -> None:
    with crowded(model, tmp_path / "s") as harness:
        begin(harness, tokens, sampling=sampling)
        while said(harness, "short") < 5:
            harness.engine.turn()
        assert said(harness, "long") < ANSWER, "the short one did not have to wait"
        harness.run()
        stats = harness.engine.stats()
        found = harness.tokens("long"), harness.tokens("short")
    assert int(str(stats["preemptions"])) >= 1
    assert stats["computed_tokens"] == len(LONG) + len(SHORT) + ANSWER + 5 - 2, "nothing is computed again"
    expected = alone(model, tmp_path / "1", LONG, ANSWER, sampling=sampling)
    assert found == (expected, alone(model, tmp_path / "2", SHORT, 5))


def test_two_take_turns(model: Model, tmp_path: Path) -> None:
    """Each is owed by the other again and again."""
    with crowded(model, tmp_path / "s") as harness:
        for name, seed in (("a", 1), ("b", 2)):
            harness.add(name, some_tokens(seed, 600), max_tokens=20, ignore_eos=True, tenant=name)
        harness.run()
        stats = harness.engine.stats()
        found = [harness.tokens(name) for name in "ab"]
    assert int(str(stats["preemptions"])) > 4
    assert stats["computed_tokens"] == 2 * (600 + 20 - 1)
    assert found == [alone(model, tmp_path / f"{s}", some_tokens(s, 600), 20) for s in (1, 2)]


def test_only_who_is_owed_enough_has_others_make_way(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "QUANTUM_S", 1000.0)
    with crowded(model, tmp_path / "s") as harness:
        begin(harness)
        harness.run()
        assert harness.engine.stats()["preemptions"] == 0


@pytest.mark.parametrize(
    "settings",
    [{"disk_budget": 0, "host_budget": "64 MiB"}, {"write_budget": "1 KiB"}],
    ids=["no disk", "wear"],
)
def test_without_a_place_on_disk_nobody_makes_way(
    model: Model, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with crowded(model, tmp_path / "s", **{"host_budget": "64 MiB", **settings}) as harness:
        begin(harness)
        harness.run()
        stats = harness.engine.stats()
        assert stats["preemptions"] == 0
        assert stats["computed_tokens"] == len(LONG) + len(SHORT) + ANSWER + 5 - 2
        assert len(harness.tokens("long")) == ANSWER


def test_what_is_lost_on_the_way_is_computed_again(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with crowded(model, tmp_path / "s", host_budget="64 MiB") as harness:
        begin(harness)

        gone = threading.Event()

        def fail(*_: object) -> None:
            gone.wait()
            raise OSError(5, "the disk is gone")

        monkeypatch.setattr(disk_tier(harness).system, "pwritev", fail)
        while not harness.engine.stats()["preemptions"]:
            harness.engine.turn()
        gone.set()
        harness.run()
        found = harness.tokens("long")
        assert harness.engine.stats()["preemptions"] == 1
    assert found == alone(model, tmp_path / "1", LONG, ANSWER)


def test_a_cancel_ends_it_while_it_is_away(model: Model, tmp_path: Path) -> None:
    with crowded(model, tmp_path / "s") as harness:
        begin(harness, 3, session="notes")
        while not harness.engine.stats()["preemptions"]:
            harness.engine.turn()
        harness.engine.cancel("long")
        harness.run()
        with pytest.raises(Cancelled):
            harness.tokens("long")
        assert len(harness.tokens("short")) == 5
        while harness.engine.writing:
            harness.engine.rest()  # a slow disk has not had it yet
        more = harness.ask([5], "more", session="notes", tenant="a", max_tokens=1)
        assert len(more) == 1
        assert harness.done("more").usage.cached_tokens >= len(LONG)


def test_a_stop_saves_it_while_it_is_away(model: Model, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"device_budget": window_bytes(model), "disk_budget": "1 GiB"}
    with engine(model, tmp_path / "s", keep_state=True, **fields) as harness:
        begin(harness, 3)
        while not harness.engine.stats()["preemptions"]:
            harness.engine.turn()
        assert harness.engine.suspend() == {"long", "short"}
        before = list(harness.events["long"])
    with engine(model, tmp_path / "s", **fields) as harness:
        for left in harness.engine.left_behind():
            harness.engine.restore(left)
        harness.resume("long", len(before), "a")
        harness.run()
        assert harness.done("long").usage.generated_tokens == ANSWER
        tokens = [e.token for e in (*before, *harness.events["long"]) if isinstance(e, Token)]
    assert tokens == alone(model, tmp_path / "1", LONG, ANSWER)


def test_a_broken_step_leaves_who_is_away_alone(model: Model, tmp_path: Path) -> None:
    with crowded(model, tmp_path / "s") as harness:
        begin(harness)
        while not said(harness, "short"):
            harness.engine.turn()
        harness.engine.fail_running(SpilldError("broken"))
        harness.run()
        with pytest.raises(SpilldError, match="broken"):
            harness.tokens("short")
        assert len(harness.tokens("long")) == ANSWER


def test_who_does_not_read_pauses_and_makes_way(model: Model, tmp_path: Path) -> None:
    """And comes back when what it has produced was taken."""
    with crowded(model, tmp_path / "s") as harness:
        harness.add("long", LONG, max_tokens=ANSWER, ignore_eos=True, tenant="a", ahead=20)
        while harness.engine.turn():
            pass
        assert len(harness.events["long"]) == 20
        assert harness.engine.stats()["requests_paused"] == 1
        harness.ask(SHORT, "short", max_tokens=5, ignore_eos=True, tenant="a")
        stats = harness.engine.stats()
        assert (stats["preemptions"], stats["requests_waiting"], stats["requests_paused"]) == (1, 1, 1)
        harness.engine.subscriptions.acknowledge("unknown", 20)
        harness.engine.subscriptions.acknowledge("long", 20, "not a's")
        harness.engine.cancel("long", "")
        assert harness.engine.stats()["requests_paused"] == 1
        harness.engine.subscriptions.acknowledge("long", 5)
        harness.run()
        assert len(harness.events["long"]) == 25
        while said(harness, "long") < ANSWER:
            harness.engine.subscriptions.acknowledge("long", len(harness.events["long"]))
            harness.run()
        found = harness.tokens("long")
    assert found == alone(model, tmp_path / "1", LONG, ANSWER)


def test_who_reads_slowly_holds_up_nobody_else(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "s", disk_budget=0) as harness:
        harness.add("slow", LONG, max_tokens=ANSWER, ignore_eos=True, ahead=8)
        harness.add("other", SHORT, max_tokens=ANSWER, ignore_eos=True)
        while harness.engine.turn():
            pass
        assert len(harness.tokens("other")) == ANSWER
        assert len(harness.events["slow"]) == 8
        harness.engine.subscriptions.leave(CLIENT, "slow")  # nobody listens: it goes on
        harness.run()
        harness.resume("slow", 3)
        assert len(harness.tokens("slow")) == ANSWER
        assert harness.engine.stats()["preemptions"] == 0


def test_a_cancel_reaches_one_that_pauses(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "s", disk_budget=0) as harness:
        harness.add("slow", LONG, max_tokens=ANSWER, ignore_eos=True, ahead=8)
        while harness.engine.turn():
            pass
        harness.engine.cancel("slow")
        harness.run()
        with pytest.raises(Cancelled):
            harness.tokens("slow")


def test_less_than_a_cell_is_not_worth_it(model: Model, tmp_path: Path) -> None:
    with crowded(model, tmp_path / "s") as harness:
        harness.add("long", LONG[: CELL // 2], max_tokens=20, ignore_eos=True, tenant="a")
        harness.engine.turn()
        harness.add("short", SHORT, max_tokens=5, ignore_eos=True, tenant="b")
        harness.run()
        assert harness.engine.stats()["preemptions"] == 0
