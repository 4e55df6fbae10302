"""A daemon that is killed, as a process: what it had computed is there again, and is what it was."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spilld.daemon.__main__ import main
from spilld.daemon.client import Client, Progress, Token
from spilld.daemon.errors import Unreachable
from spilld.daemon.model import Model
from spilld.daemon.spawn import Spawned, spawned

from .harness import column_bytes, engine, shared, some_tokens, window_bytes

FIELDS: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
FIRST, SECOND = some_tokens(1, 1400), some_tokens(2, 900)


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
def daemon(model: Model, state: Path) -> Iterator[tuple[Spawned, Client]]:
    settings = {
        "model": model.folder,
        "cache": model.folder / "cache",
        "state": state,
        "dtype": "float32",
        "threads": 1,
        "device_budget": 2 * window_bytes(model),
        "host_budget": 20 * column_bytes(model, "k8v4"),
    }
    with spawned(settings) as process, Client(process.address) as client:
        yield process, client


def tokens(client: Client, prompt: list[int]) -> list[int]:
    stream = client.generate(prompt, session="s", **FIELDS)
    return [event.token for event in stream if isinstance(event, Token)]


def kill(process: Spawned, client: Client, kind: type, count: int) -> None:
    """Ask, and kill the daemon after so many events of a kind."""
    stream = client.generate(SECOND, session="s", **FIELDS)
    for event in stream:
        count -= isinstance(event, kind)
        if not count:
            os.kill(process.pid, signal.SIGKILL)
            break
    with pytest.raises(Unreachable):
        client.generate(SECOND, session="s", **FIELDS).text()


def test_killed_in_prefill_and_in_decode(model: Model, wanted: list[list[int]], tmp_path: Path) -> None:
    with daemon(model, tmp_path) as (process, client):
        assert tokens(client, FIRST) == wanted[0]
        kill(process, client, Progress, 1)
    with daemon(model, tmp_path) as (process, client):
        kill(process, client, Token, 5)
    assert main(["check", f"--state={tmp_path}"]) == 0, "torn writes are orphans, not damage"
    with daemon(model, tmp_path) as (process, client):
        (info,) = client.sessions()
        assert info.tokens == 1408, "a session is what it was before the request that was lost"
        assert tokens(client, SECOND) == wanted[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_anywhere(model: Model, wanted: list[list[int]], seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    with daemon(model, tmp_path) as (process, client):
        assert tokens(client, FIRST) == wanted[0]
        kind = draw.choice([Progress, Token])
        kill(process, client, kind, draw.randint(1, 2 if kind is Progress else 8))
    assert main(["check", f"--state={tmp_path}"]) == 0
    with daemon(model, tmp_path) as (process, client):
        found = client.sessions()
        if [info.tokens for info in found] == [2316]:  # it was killed after the last token
            return
        assert [info.tokens for info in found] == [1408]
        assert tokens(client, SECOND) == wanted[1]
