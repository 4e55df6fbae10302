"""A daemon that is killed, as a process: its clients wait for the next one, and their answers go on there."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spilld import (
    Accepted,
    Client,
    Event,
    Generation,
    Progress,
    Token,
)
from spilld.__main__ import main
from spilld.demo.spawn import Spawned
from spilld.errors import RequestNotFound, Unreachable
from spilld.models.model import Model

from .forked import spawned
from .harness import column_bytes, engine, shared, some_tokens, window_bytes

FIELDS: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
FIRST, SECOND = some_tokens(1, 1400), some_tokens(2, 900)
SEED: dict[str, Any] = {"temperature": 0.8, "seed": 11}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@pytest.fixture(scope="module")
def wanted(model: Model, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Both answers, undisturbed."""
    with engine(model, tmp_path_factory.mktemp("here"), disk_budget=0) as harness:
        first = harness.ask(FIRST, keep=True, **FIELDS)
        return [first, harness.ask(SECOND, context=harness.done().context, **FIELDS)]


@contextmanager
def daemon(model: Model, folder: Path) -> Iterator[Spawned]:
    """One of several lives at the same address, over the same state."""
    settings = {
        "model": model.folder,
        "cache": model.folder / "cache",
        "state": folder,
        "listen": f"ipc://{folder}.socket",
        "dtype": "float32",
        "threads": 1,
        "device_budget": 2 * window_bytes(model),
        "host_budget": 20 * column_bytes(model, "k8v4"),
    }
    with spawned(settings) as process:
        yield process


def tokens(events: list[Event]) -> list[int]:
    """Of events that are numbered without a gap and a repeat, with at most one admission."""
    assert [event.seq for event in events] == list(range(len(events)))
    assert sum(isinstance(event, Accepted) for event in events) == 1
    return [event.token for event in events if isinstance(event, Token)]


def until(stream: Generation, kind: type, count: int) -> list[Event]:
    """Events up to so many of a kind, or to the end."""
    seen: list[Event] = []
    for event in stream:
        seen.append(event)
        count -= isinstance(event, kind)
        if not count:
            break
    return seen


def kill(process: Spawned) -> None:
    os.kill(process.pid, signal.SIGKILL)


def test_killed_between_requests_in_prefill_and_in_decode(
    model: Model, wanted: list[list[int]], tmp_path: Path
) -> None:
    state = tmp_path / "s"
    with daemon(model, state) as process:
        client = Client(process.address)
        first = list(client.generate(FIRST, session="s", **FIELDS))
        kill(process)
    with daemon(model, state) as process:
        stream = client.generate(SECOND, session="s", **FIELDS)
        seen = until(stream, Progress, 1)
        kill(process)
    assert main(["check", f"--state={state}"]) == 0, "torn writes are orphans, not damage"
    with daemon(model, state) as process:
        seen += until(stream, Token, 5)
        kill(process)
    assert main(["check", f"--state={state}"]) == 0
    with daemon(model, state), client:
        seen += list(stream)
        assert [tokens(first), tokens(seen)] == wanted
        assert stream.result.text == "".join(e.text for e in seen if isinstance(e, Token))
        (info,) = client.sessions()
        assert info.tokens == len(FIRST) + len(SECOND) + 16


def test_stopped_by_a_signal(model: Model, tmp_path: Path) -> None:
    """What a drain does not finish is saved, the log says so, and two streams of one client go on."""
    state = tmp_path / "s"
    fields: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
    with daemon(model, state) as process, Client(process.address) as client:
        whole = [tokens(list(client.generate(FIRST[:300], **chosen, **fields))) for chosen in ({}, SEED)]
        streams = [client.generate(FIRST[:300], **chosen, **fields) for chosen in ({}, SEED)]
        seen = [until(stream, Token, 3) for stream in streams]
        os.kill(process.pid, signal.SIGTERM)
        while "draining" not in process.log.read_text():
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGTERM)
        process.process.wait()
        assert "2 requests are saved" in process.log.read_text()
        with daemon(model, state):
            for events, stream, expected in zip(seen, streams, whole, strict=True):
                assert tokens(events + list(stream)) == expected
            with Client(process.address) as other:
                again = list(other.resume(streams[0].id))
                assert tokens(again) == whole[0], "and are still there for whoever knows the id"
                with pytest.raises(RequestNotFound):
                    other.resume("never was").text()


def test_a_client_that_does_not_wait(model: Model, tmp_path: Path) -> None:
    with daemon(model, tmp_path / "s") as process:
        client = Client(process.address, reconnect_s=0)
        stream = client.generate(FIRST, **FIELDS)
        until(stream, Progress, 1)
        kill(process)
        with pytest.raises(Unreachable, match="keeps the request"):
            stream.text()
        client.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_anywhere(model: Model, wanted: list[list[int]], seed: int, tmp_path: Path) -> None:
    """Three kills at random events of two requests on one session."""
    draw = random.Random(seed)
    state, seen, streams = tmp_path / "s", [[], []], []  # type: ignore[var-annotated]
    client: Client | None = None
    for _ in range(3):
        with daemon(model, state) as process:
            client = client or Client(process.address)
            streams = streams or [client.generate(p, session="s", **FIELDS) for p in (FIRST, SECOND)]
            for events, stream in zip(seen, streams, strict=True):
                events += until(stream, draw.choice([Progress, Token]), draw.randint(1, 6))
            kill(process)
        assert main(["check", f"--state={state}"]) == 0
    assert client is not None
    with daemon(model, state), client:
        for events, stream, expected in zip(seen, streams, wanted, strict=True):
            assert tokens(events + list(stream)) == expected
        (info,) = client.sessions()
        assert info.tokens == len(FIRST) + len(SECOND) + 16
