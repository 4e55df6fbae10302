"""Sessions: named, durable sequences. Their answers are those of one request that nothing interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spilld.errors import (
    ContextNotFound,
    InternalError,
    InvalidRequest,
    SpilldError,
)
from spilld.models.model import Model
from spilld.protocol.messages import (
    ChangeSession,
    Failed,
    ListSessions,
    Release,
    Sampling,
    SessionInfo,
    Sessions,
)

from .harness import Harness, engine, shared, smallest_host_budget, some_tokens, window_bytes

FORMATS = ["exact", "k8v4"]
PROMPT = some_tokens(3, 1400)
MORE = some_tokens(4, 300)
FIELDS: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
SEEDED: dict[str, Any] = FIELDS | {"sampling": Sampling(temperature=0.8, seed=7)}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


def tight(model: Model, form: str) -> dict[str, Any]:
    """Two windows, as little host memory as is accepted: most of the KV must go to disk."""
    return {
        "format": form,
        "device_budget": 2 * window_bytes(model),
        "host_budget": smallest_host_budget(model, form),
        "disk_budget": "64MiB",
    }


def manage(harness: Harness, **fields: Any) -> tuple[SessionInfo, ...]:
    kind = ChangeSession if "session" in fields else ListSessions
    reply = harness.engine.manage(kind(request_id="m", **fields))
    assert isinstance(reply, Sessions)
    return reply.sessions


def written(harness: Harness) -> int:
    """Bytes written so far, with all that is under way."""
    store = harness.engine._store
    while store.writing:
        store.settle()
    value = store.stats()["disk_written_bytes"]
    assert isinstance(value, int)
    return value


def names(harness: Harness, **fields: Any) -> list[str]:
    return [info.name for info in manage(harness, **fields)]


def without_a_break(
    model: Model, folder: Path, *requests: tuple[list[int], dict[str, Any]]
) -> list[list[int]]:
    """The answers of one context that stays in memory, each request appended to it."""
    answers, context = [], None
    with engine(model, folder, format=requests[0][1].pop("form")) as harness:
        for prompt, fields in requests:
            answers.append(harness.ask(prompt, context=context, keep=True, **fields))
            context = harness.done().context
    return answers


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("fields", [FIELDS, SEEDED], ids=["greedy", "seeded"])
def test_it_outlives_the_process(model: Model, form: str, fields: dict[str, Any], tmp_path: Path) -> None:
    wanted = without_a_break(model, tmp_path / "a", (PROMPT, {"form": form, **fields}), (MORE, fields))
    with engine(model, tmp_path / "s", keep_state=True, **tight(model, form)) as harness:
        first = harness.ask(PROMPT, session="notes", **fields)
    with engine(model, tmp_path / "s", **tight(model, form)) as harness:
        (info,) = manage(harness)
        assert (info.name, info.tokens, info.running) == ("notes", 1408, False)
        assert info.kv_bytes["disk"] > 0
        second = harness.ask(MORE, session="notes", **fields)
        cached = harness.done().usage.cached_tokens
    assert [first, second] == wanted
    assert cached == 1407, "the last token was not computed, all others were saved"


@pytest.mark.parametrize("length", [255, 256, 257, 511, 512, 513, 767, 768, 769, 1023, 1024, 1025, 1280])
@pytest.mark.parametrize("form", FORMATS)
def test_it_goes_on_at_every_edge_of_the_grid(model: Model, form: str, length: int, tmp_path: Path) -> None:
    wanted = without_a_break(
        model, tmp_path / "a", (PROMPT[:length], {"form": form, "max_tokens": 1}), (MORE, FIELDS)
    )
    with engine(model, tmp_path / "s", keep_state=True, format=form) as harness:
        first = harness.ask(PROMPT[:length], session="s", max_tokens=1)
    with engine(model, tmp_path / "s", format=form) as harness:
        assert [first, harness.ask(MORE, session="s", **FIELDS)] == wanted
        cached = harness.done().usage.cached_tokens
    assert cached == (length if length >= 256 else 0), "a tail of less than a cell is not kept"


def test_every_request_reuses_what_begins_alike(model: Model, tmp_path: Path) -> None:
    other = PROMPT[:1300] + MORE
    with engine(model, tmp_path / "a", format="k8v4") as harness:
        wanted = harness.ask(other, **FIELDS)
        assert harness.done().usage.cached_tokens == 0
    with engine(model, tmp_path / "s", format="k8v4") as harness:
        harness.ask(PROMPT, **FIELDS)
        assert harness.ask(other, **FIELDS) == wanted
        assert harness.done().usage.cached_tokens == 1300
        harness.ask(PROMPT[:1200] + MORE, **FIELDS)
        assert harness.done().usage.cached_tokens == 0, (
            "no tail ends there: what is exact cannot be had again"
        )


def test_tenants_share_nothing(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "s") as harness:
        mine = harness.ask(PROMPT, session="s", tenant="mine", **FIELDS)
        theirs = harness.ask(PROMPT, "theirs", session="s", tenant="theirs", **FIELDS)
        assert harness.done("theirs").usage.cached_tokens == 0
        assert mine == theirs
        assert names(harness, tenant="mine") == names(harness, tenant="theirs") == ["s"]
        assert names(harness) == []
        manage(harness, tenant="mine", session="s", action="delete")
        with pytest.raises(ContextNotFound):
            manage(harness, tenant="mine", session="s", action="pin")
        assert harness.ask(MORE, "theirs", session="s", tenant="theirs", **FIELDS)
        with pytest.raises(ContextNotFound):
            harness.ask(MORE, context="s", tenant="mine", **FIELDS)


class TestFork:
    @pytest.mark.parametrize("tokens", [None, 1408, 1290, 700])
    def test_it_differs_only_from_then_on(self, model: Model, tokens: int | None, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s", format="exact") as harness:
            first = harness.ask(PROMPT, session="a", **FIELDS)
            history = (PROMPT + first)[:tokens]
            (info,) = manage(harness, session="a", action="fork", into="b", tokens=tokens)
            assert (info.name, info.tokens) == ("b", len(history))
            before = written(harness)
            forked = harness.ask(MORE, session="b", **FIELDS)
            if tokens is None:
                assert harness.done().usage.cached_tokens == 1407
                assert written(harness) - before < before, "what both have in common is stored once"
            assert harness.ask(MORE[:50], session="a", **FIELDS)
            assert names(harness) == ["a", "b"]
        with engine(model, tmp_path / "t", format="exact") as harness:
            assert forked == harness.ask(history + MORE, **FIELDS)

    def test_a_name_that_is_taken_or_a_length_that_is_not_there(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s") as harness:
            harness.ask(PROMPT[:20], session="a", **FIELDS)
            harness.ask(PROMPT[:20], session="b", **FIELDS)
            with pytest.raises(InvalidRequest, match="there is a session 'b' already"):
                manage(harness, session="a", action="fork", into="b")
            with pytest.raises(InvalidRequest, match="tokens is 29; allowed: 1 to 28"):
                manage(harness, session="a", action="fork", into="c", tokens=29)
            with pytest.raises(InvalidRequest, match="into is None"):
                manage(harness, session="a", action="fork")
            with pytest.raises(ContextNotFound):
                manage(harness, session="x", action="fork", into="c")
            assert names(harness) == ["a", "b"]


class TestManagement:
    def test_renamed(self, model: Model, tmp_path: Path) -> None:
        wanted = without_a_break(model, tmp_path / "a", (PROMPT, {"form": "k8v4", **FIELDS}), (MORE, FIELDS))
        with engine(model, tmp_path / "s") as harness:
            first = harness.ask(PROMPT, session="a", **FIELDS)
            manage(harness, session="a", action="rename", into="b")
            harness.engine.check_integrity()
            assert [first, harness.ask(MORE, session="b", **FIELDS)] == wanted
            assert harness.done().usage.cached_tokens == 1407
            assert names(harness) == ["b"]

    def test_a_kept_context_becomes_a_session(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s", keep_state=True, context_ttl_s=3600) as harness:
            harness.ask(PROMPT, keep=True, **FIELDS)
            handle = harness.done().context
            assert names(harness) == [], "a handle is no name"
            (info,) = manage(harness, session=handle, action="rename", into="kept")
            assert info.ttl_s is None
        with engine(model, tmp_path / "s") as harness:
            assert names(harness) == ["kept"]
            assert harness.ask(MORE, session="kept", **FIELDS)

    def test_releasing_a_session_gives_up_its_memory_only(self, model: Model, tmp_path: Path) -> None:
        wanted = without_a_break(model, tmp_path / "a", (PROMPT, {"form": "k8v4", **FIELDS}), (MORE, FIELDS))
        with engine(model, tmp_path / "s") as harness:
            first = harness.ask(PROMPT, session="s", **FIELDS)
            harness.engine.manage(Release(request_id="m", context=str(harness.done().context)))
            assert manage(harness)[0].kv_bytes["device"] == 0
            assert [first, harness.ask(MORE, session="s", **FIELDS)] == wanted

    def test_a_handle_outlives_the_process(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s", keep_state=True) as harness:
            harness.ask(PROMPT, keep=True, **FIELDS)
            handle = harness.done().context
        with engine(model, tmp_path / "s") as harness:
            assert harness.ask(MORE, context=handle, **FIELDS)
            assert harness.done().usage.cached_tokens == 1407

    def test_expiring(self, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("spilld.engine.upkeep.TICK_S", 0.0)
        with engine(model, tmp_path / "s") as harness:
            for name in ("goes", "stays", "pinned"):
                harness.ask(PROMPT[:20], session=name, **FIELDS)
            manage(harness, session="goes", action="expire", ttl_s=1e-6)
            manage(harness, session="pinned", action="expire", ttl_s=1e-6)
            manage(harness, session="pinned", action="pin")
            harness.run()
            assert names(harness) == ["pinned", "stays"]

    def test_pinned_kv_stays_whatever_room_is_needed(
        self, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("spilld.engine.upkeep.TICK_S", 0.0)
        settings = tight(model, "exact") | {"disk_budget": "4MiB", "device_budget": window_bytes(model)}
        with engine(model, tmp_path / "s", keep_state=True, **settings) as harness:
            for name in ("pinned", "loose"):
                harness.ask(PROMPT if name == "pinned" else MORE + PROMPT, session=name, **FIELDS)
            manage(harness, session="pinned", action="pin")
            for seed in range(5, 15):
                harness.ask(some_tokens(seed, 1400), session=f"of-{seed}", **FIELDS)
            harness.ask(PROMPT[:5], session="pinned", **FIELDS)
            assert harness.done().usage.cached_tokens == 1407
            harness.ask(PROMPT[:5], session="loose", **FIELDS)
            assert harness.done().usage.cached_tokens == 0, "it was evicted, and computed again"

    def test_a_running_session_is_left_alone(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s") as harness:
            harness.ask(PROMPT[:20], "first", session="s", **FIELDS)
            harness.add("r", PROMPT, session="s", **FIELDS)
            harness.engine.turn()
            for change in ({"action": "rename", "into": "t"}, {"action": "delete"}):
                with pytest.raises(InvalidRequest, match="a request runs on session 's'"):
                    manage(harness, session="s", **change)
            assert manage(harness)[0].running
            harness.run()
            assert len(harness.tokens("r")) == 8


class TestRequests:
    def test_two_on_one_session_run_one_after_the_other(self, model: Model, tmp_path: Path) -> None:
        wanted = without_a_break(
            model, tmp_path / "a", (PROMPT, {"form": "k8v4", **FIELDS}), (MORE, FIELDS), (MORE[:9], FIELDS)
        )
        with engine(model, tmp_path / "s") as harness:
            harness.add("1", PROMPT, session="s", **FIELDS)
            harness.add("2", MORE, session="s", **FIELDS)
            harness.add("3", MORE[:9], session="s", **FIELDS)
            harness.run()
            assert [harness.tokens(name) for name in "123"] == wanted

    def test_one_that_waits_can_be_cancelled(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s") as harness:
            for name in "123":
                harness.add(name, PROMPT[:20], session="s", **FIELDS)
            harness.engine.cancel("2")
            harness.run()
            assert isinstance(harness.events["2"][-1], Failed)
            assert len(harness.tokens("1")) == len(harness.tokens("3")) == 8
            assert manage(harness)[0].tokens == 56

    def test_one_that_cannot_begin_lets_the_next_begin(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s", max_context=1500) as harness:
            harness.add("1", PROMPT, session="s", **FIELDS)
            harness.add("2", PROMPT, session="s", **FIELDS)
            harness.add("3", PROMPT[:20], session="s", **FIELDS)
            harness.run()
            with pytest.raises(SpilldError, match="have 2808 tokens"):
                harness.tokens("2")
            assert len(harness.tokens("3")) == 8

    def test_append_computes_and_says_nothing(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s") as harness:
            assert harness.ask(PROMPT, session="s", max_tokens=0) == []
            assert manage(harness)[0].tokens == 1400
            answer = harness.ask(MORE, session="s", **FIELDS)
            assert harness.done().usage.cached_tokens == 1399
        with engine(model, tmp_path / "t") as harness:
            assert answer == harness.ask(PROMPT + MORE, **FIELDS)

    def test_warming_up_brings_it_back_into_memory(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s", keep_state=True) as harness:
            first = harness.ask(PROMPT, session="s", **FIELDS)
        with engine(model, tmp_path / "s") as harness:
            assert manage(harness)[0].kv_bytes["device"] == 0
            for _ in range(2):
                assert harness.ask([], session="s", max_tokens=0) == []
                assert manage(harness)[0].kv_bytes["device"] > 0
            assert manage(harness)[0].tokens == 1408
            assert harness.ask(MORE, session="s", **FIELDS)
        assert first

    def test_a_cancelled_request_leaves_what_it_appended(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s", keep_state=True) as harness:
            harness.add("r", PROMPT, session="s", max_tokens=50, ignore_eos=True)
            while len(harness.events.get("r", [])) < 12:
                harness.engine.turn()
            harness.engine.cancel("r")
            (info,) = manage(harness)
            history = list(harness.engine.sessions.store.get("", "s").tokens)
            assert info.tokens == len(history) > 1400
        with engine(model, tmp_path / "s") as harness:
            answer = harness.ask(MORE, session="s", **FIELDS)
        with engine(model, tmp_path / "t") as harness:
            assert answer == harness.ask(history + MORE, **FIELDS)

    def test_one_that_fails_leaves_the_session_as_it_was(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s") as harness:
            harness.ask(PROMPT, "first", session="s", **FIELDS)
            harness.add("r", MORE, session="s", max_tokens=50, ignore_eos=True)
            for _ in range(4):
                harness.engine.turn()
            harness.engine.fail_running(InternalError("a bug"))
            harness.run()
            assert manage(harness)[0].tokens == 1408
            answer = harness.ask(MORE, session="s", **FIELDS)
        with engine(model, tmp_path / "t") as harness:
            history = PROMPT + harness.ask(PROMPT, **FIELDS)
            assert answer == harness.ask(history + MORE, **FIELDS)


def rot(state: Path) -> None:
    """A bit flips in every page of every segment file."""
    for segment in (state / "kv").glob("*.segment"):
        content = bytearray(segment.read_bytes())
        for offset in range(300, len(content), 4096):
            content[offset] ^= 1
        segment.write_bytes(content)


def test_a_damaged_run_is_computed_again(model: Model, tmp_path: Path) -> None:
    """Bits rot while the daemon is off: the answer is the same, and the run is never served again."""
    wanted = without_a_break(model, tmp_path / "a", (PROMPT, {"form": "k8v4", **FIELDS}), (MORE, FIELDS))
    with engine(model, tmp_path / "s", keep_state=True) as harness:
        first = harness.ask(PROMPT, session="s", **FIELDS)
    rot(tmp_path / "s")
    with engine(model, tmp_path / "s") as harness:
        assert [first, harness.ask(MORE, session="s", **FIELDS)] == wanted
        assert harness.done().usage.cached_tokens == 0


def test_a_damaged_run_of_a_pinned_session_is_computed_again(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is pinned when it turns out to be damaged, and its room is no longer counted."""
    monkeypatch.setattr("spilld.engine.upkeep.TICK_S", 0.0)
    wanted = without_a_break(model, tmp_path / "a", (PROMPT, {"form": "k8v4", **FIELDS}), (MORE, FIELDS))
    with engine(model, tmp_path / "s", keep_state=True) as harness:
        first = harness.ask(PROMPT, session="s", **FIELDS)
        manage(harness, session="s", action="pin")
    rot(tmp_path / "s")
    with engine(model, tmp_path / "s") as harness:
        harness.run()
        assert [first, harness.ask(MORE, session="s", **FIELDS)] == wanted


def test_a_restored_session_moves_back_into_host_memory(model: Model, tmp_path: Path) -> None:
    """Its first scan reads it from disk and copies it; the next reads nothing from disk."""
    wanted = without_a_break(model, tmp_path / "a", (PROMPT, {"form": "k8v4", **FIELDS}), (MORE, FIELDS))
    with engine(model, tmp_path / "s", keep_state=True) as harness:
        first = harness.ask(PROMPT, session="s", **FIELDS)
    with engine(model, tmp_path / "s") as harness:
        assert manage(harness)[0].kv_bytes["host"] == 0
        assert [first, harness.ask(MORE, session="s", **FIELDS)] == wanted
        assert manage(harness)[0].kv_bytes["disk"] == 0
        assert harness.done().usage.disk_read_bytes > 0
        harness.ask(MORE[:5], session="s", **FIELDS)
        assert harness.done().usage.disk_read_bytes == 0


def test_what_host_memory_has_no_room_for_stays_on_disk(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "s", keep_state=True) as harness:
        harness.ask(PROMPT, session="s", **FIELDS)
    with engine(model, tmp_path / "s", **tight(model, "k8v4")) as harness:
        harness.ask(MORE, session="s", **FIELDS)
        assert manage(harness)[0].kv_bytes["disk"] > 0


@pytest.mark.parametrize("restart", [False, True])
def test_the_kv_of_sessions_goes_last(model: Model, restart: bool, tmp_path: Path) -> None:
    """Requests without a session come and go; what a session needs stays, also in a later process."""
    settings: dict[str, Any] = tight(model, "k8v4") | {"disk_budget": 10 << 20}
    cached = {}
    for name in ("s", None):
        state = tmp_path / str(name)
        with engine(model, state, keep_state=restart, **settings) as harness:
            harness.ask(PROMPT, session=name, **FIELDS)
            if not restart:
                flood(harness)
                cached[name] = again(harness, name)
        if restart:
            with engine(model, state, **settings) as harness:
                flood(harness)
                cached[name] = again(harness, name)
    assert cached["s"] == 1407
    assert cached[None] == 0


def flood(harness: Harness) -> None:
    """More KV than the disk takes, of prompts that are not asked again."""
    evicted = 0
    for seed in range(100, 124):
        written(harness)
        harness.engine._upkeep._ticked = 0.0
        harness.ask(some_tokens(seed, 1000), max_tokens=1)
        evicted += harness.engine.stats()["disk_cached_bytes"] == 0
    assert not evicted


def again(harness: Harness, session: str | None) -> int:
    """How many tokens are cached of what was asked first."""
    prompt = MORE if session else PROMPT + MORE
    harness.ask(prompt, session=session, **FIELDS)
    return harness.done().usage.cached_tokens


def test_what_is_changed_while_a_request_runs_stays_changed(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path) as harness:
        for name in ("pinned", "expiring"):
            harness.ask(PROMPT[:100], session=name, **FIELDS)
            harness.add(name, MORE, session=name, **FIELDS)
        harness.engine.turn()
        manage(harness, session="pinned", action="pin")
        manage(harness, session="expiring", action="expire", ttl_s=3600.0)
        harness.run()
        expiring, pinned = manage(harness)
        assert (pinned.pinned, expiring.ttl_s) == (True, 3600.0)
        assert len({pinned.tokens, expiring.tokens, 100 + len(MORE) + 16}) == 1


@pytest.mark.parametrize("action", ["fork", "rename"])
def test_no_session_takes_the_name_of_one_that_a_request_begins(
    model: Model, tmp_path: Path, action: str
) -> None:
    """It would be overwritten when that request ends."""
    with engine(model, tmp_path) as harness:
        harness.ask(PROMPT[:100], session="old", **FIELDS)
        harness.add("new", MORE, session="new", **FIELDS)
        harness.engine.turn()
        with pytest.raises(InvalidRequest, match="'new'"):
            manage(harness, session="old", action=action, into="new")
        harness.run()
        assert {info.name: info.tokens for info in manage(harness)} == {
            "old": 100 + 8,
            "new": len(MORE) + 8,
        }
