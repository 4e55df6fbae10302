"""A daemon of its own, over a real socket: several clients, bad ones, dying ones, and signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from spilld import (
    AsyncClient,
    Client,
    Done,
    Token,
)
from spilld.auth.keyring import make_client, make_server
from spilld.demo.spawn import Spawned
from spilld.errors import (
    AccessDenied,
    ContextNotFound,
    DeadlineExceeded,
    Draining,
    InternalError,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    Unreachable,
)
from spilld.models.model import Model

from .forked import spawned
from .harness import column_bytes, daemon, engine, shared, some_tokens, window_bytes

PROMPT = some_tokens(1, 1300)
LONG = 2500
"""Tokens of an answer that is not waited for."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@pytest.fixture(scope="module")
def running(model: Model) -> Iterator[Spawned]:
    """Two windows; most of PROMPT's KV does not fit the host budget."""
    budgets = {
        "device_budget": 2 * window_bytes(model),
        "host_budget": 10 * column_bytes(model, "k8v4"),
        "disk_budget": "64MiB",
        "chunk_tokens": 128,
        "retention_s": 1,
    }
    with daemon(model, **budgets) as running:
        yield running


@pytest.fixture
def client(running: Spawned) -> Iterator[Client]:
    """A client of a daemon that is idle before and after."""
    with Client(running.address) as client:
        settle(client)
        yield client
        settle(client)


def settle(client: Client) -> None:
    """Wait until nothing runs."""
    give_up = time.monotonic() + 20
    while (stats := client.stats())["requests_running"] or stats["requests_waiting"]:
        assert time.monotonic() < give_up, f"requests never end: {stats}"
        time.sleep(0.02)


def emptied(client: Client) -> None:
    """Nothing runs and no memory is taken, soon: a write that is under way still has its rows."""
    settle(client)
    give_up = time.monotonic() + 10
    while any((stats := client.stats())[f"{tier}_used_bytes"] for tier in ("device", "host")):
        assert time.monotonic() < give_up, f"bytes are lost: {stats}"
        time.sleep(0.02)


def tokens_of(generation: Any) -> list[int]:
    return [event.token for event in generation if isinstance(event, Token)]


@pytest.fixture(scope="module")
def expected(model: Model, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    with engine(model, tmp_path_factory.mktemp("here"), disk_budget=0) as harness:
        return harness.ask(PROMPT, max_tokens=20, ignore_eos=True)


def test_tokens_text_and_chat(client: Client, model: Model, expected: list[int]) -> None:
    generation = client.generate(PROMPT, max_tokens=20, ignore_eos=True)
    assert tokens_of(generation) == expected
    assert generation.result.usage.read_bytes["disk"] > 0
    assert len(client.generate("Once upon a time", max_tokens=5, ignore_eos=True).text()) > 0
    messages = [{"role": "user", "content": "hello"}]
    first = client.generate(messages, max_tokens=5, ignore_eos=True, keep=True)
    first.text()
    more = [{"role": "user", "content": "and then?"}]
    second = client.generate(more, context=first.result.context, max_tokens=5, ignore_eos=True)
    second.text()
    assert second.result.usage.cached_tokens > 0
    client.release(str(first.result.context))
    with pytest.raises(ContextNotFound):
        client.generate(more, context=first.result.context).text()
    welcome = client.hello()
    assert (welcome.model, welcome.dtype, welcome.format) == (str(model.folder), "float32", "k8v4")
    assert welcome.max_context == model.geometry.max_positions


def test_the_pieces_are_the_whole_text(client: Client) -> None:
    """Text held back for a stop string that never comes is the last piece."""
    whole = client.generate(PROMPT, max_tokens=12, ignore_eos=True).text()
    stop = [whole[-2:] + "\0"]
    held = client.generate(PROMPT, max_tokens=12, ignore_eos=True, stop=stop)
    streamed = "".join(event.text for event in held if isinstance(event, Token))
    assert whole.startswith(streamed)
    assert len(streamed) < len(whole)
    again = client.generate(PROMPT, max_tokens=12, ignore_eos=True, stop=stop)
    assert "".join(again.tokens()) == again.result.text == whole


def test_several_clients_at_once(running: Spawned, client: Client, expected: list[int]) -> None:
    async def both() -> list[list[int]]:
        async with AsyncClient(running.address) as one, AsyncClient(running.address) as two:

            async def ask(asking: AsyncClient) -> list[int]:
                generation = asking.generate(PROMPT, max_tokens=20, ignore_eos=True)
                return [event.token async for event in generation if isinstance(event, Token)]

            return list(await asyncio.gather(ask(one), ask(two), ask(two)))

    mine = client.generate(PROMPT, max_tokens=20, ignore_eos=True)
    assert asyncio.run(both()) == [expected] * 3
    assert tokens_of(mine) == expected


def test_closing_a_generation_frees_its_window(client: Client) -> None:
    with client.generate(PROMPT, max_tokens=LONG, ignore_eos=True) as generation:
        while not isinstance(next(generation), Token):
            pass
        assert client.stats()["requests_running"] == 1
    emptied(client)


def test_bad_requests_get_typed_errors(client: Client, running: Spawned, model: Model) -> None:
    vocab = model.geometry.vocab
    with pytest.raises(InvalidRequest, match=f"{vocab} is not below"):
        client.generate([1, vocab]).text()
    with pytest.raises(PromptTooLong, match="leave room to answer"):
        client.generate(some_tokens(1, 4096)).text()
    with pytest.raises(InvalidRequest, match="not empty"):
        client.generate([]).text()
    with pytest.raises(ContextNotFound):
        client.release("0" * 32)
    with pytest.raises(DeadlineExceeded):
        client.generate(PROMPT, max_tokens=LONG, ignore_eos=True, timeout=0.3).text()
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(running.address)
        for frames in ([b""], [b"spilld\x00\x01", b"\xc1"], [os.urandom(2000)] * 3):
            socket.send_multipart(frames)
        assert socket.poll(5000)
    assert client.generate(PROMPT[:5], max_tokens=3, ignore_eos=True).text() is not None


def test_stats(client: Client, running: Spawned, model: Model) -> None:
    stats = client.stats()
    assert stats["device_budget_bytes"] == 2 * window_bytes(model)
    assert stats["host_budget_bytes"] == 10 * column_bytes(model, "k8v4")
    assert stats["disk_budget_bytes"] == 64 << 20
    assert stats["disk_failure"] == ""
    before = int(str(stats["disk_written_bytes"]))
    unknown = some_tokens(77, len(PROMPT))
    generation = client.generate(unknown, max_tokens=20, ignore_eos=True)
    while not isinstance(next(generation), Token):
        pass
    during = client.stats()
    assert during["device_used_bytes"] == window_bytes(model)
    assert 0 < int(str(during["host_used_bytes"])) <= 10 * column_bytes(model, "k8v4")
    assert 0 < int(str(during["disk_used_bytes"])) <= 64 << 20
    assert int(str(during["reserved_blocks"])) == 15
    generation.text()
    after = client.stats()
    assert int(str(after["disk_written_bytes"])) > before
    assert int(str(after["prefetch_bytes_read"])) > 0
    assert (after["requests_running"], after["reserved_blocks"]) == (0, 0)
    emptied(client)
    assert running.peak_rss_bytes > 100 << 20


def test_a_killed_client_disturbs_nobody_and_its_request_ends(
    client: Client, running: Spawned, expected: list[int]
) -> None:
    program = (
        "import sys; from spilld import Client, Token\n"
        "for event in Client(sys.argv[1]).generate('hello', max_tokens=2500, ignore_eos=True):\n"
        "    if isinstance(event, Token): print('token', flush=True)\n"
    )
    command = [sys.executable, "-c", program, running.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"token\n"
        mine = client.generate(PROMPT, max_tokens=20, ignore_eos=True)
        child.send_signal(signal.SIGKILL)
    assert tokens_of(mine) == expected
    emptied(client)


def ends(running: Spawned, seconds: float) -> int:
    """Its exit status."""
    try:
        return running.process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(
            f"the daemon has not ended; its log ends: {running.log.read_text()[-1000:]}"
        ) from None


def first_token(generation: Any) -> None:
    while not isinstance(next(generation), Token):
        pass


def drains(running: Spawned) -> None:
    """Wait until the daemon has taken a signal: of two that wait one is lost, and requests overtake them."""
    while "draining" not in running.log.read_text():
        time.sleep(0.02)


def test_the_first_signal_lets_a_running_answer_finish(model: Model) -> None:
    with daemon(model) as running, Client(running.address) as client, Client(running.address) as other:
        generation = client.generate("hello", max_tokens=500, ignore_eos=True)
        first_token(generation)
        os.kill(running.pid, signal.SIGTERM)
        drains(running)
        with pytest.raises(Draining):
            other.generate("hello").text()
        assert len(tokens_of(generation)) == 499
        assert isinstance(generation.result, Done)
        assert ends(running, 10) == 0


def test_the_second_signal_stops_at_once(model: Model) -> None:
    with (
        daemon(model, drain_seconds=60) as running,
        Client(running.address, reconnect_s=0) as client,
    ):
        generation = client.generate("hello", max_tokens=LONG, ignore_eos=True)
        first_token(generation)
        os.kill(running.pid, signal.SIGTERM)
        drains(running)
        os.kill(running.pid, signal.SIGTERM)
        with pytest.raises(Unreachable, match="keeps the request"):
            generation.text()
        assert ends(running, 10) == 0
        assert "Traceback" not in running.log.read_text()


def test_keys_have_tenants_and_limits(model: Model, tmp_path: Path) -> None:
    make_server(tmp_path / "keys")
    alice, laptop = (
        make_client(tmp_path / "keys", "alice", "a"),
        make_client(tmp_path / "keys", "laptop", "a"),
    )
    bob = make_client(tmp_path / "keys", "bob")
    settings = {"model": model.folder, "cache": model.folder / "cache", "dtype": "float32", "threads": 1}
    with (
        spawned({**settings, "keys": tmp_path / "keys", "max_open": 1}, bob) as running,
        Client(running.address, keys=alice) as client,
    ):
        client.generate("hello", session="notes", max_tokens=5, ignore_eos=True).text()
        with Client(running.address, keys=laptop) as other:
            assert [info.name for info in other.sessions()] == ["notes"]
        with Client(running.address, keys=bob) as other:
            assert other.sessions() == ()
        with Client(running.address, keys=bob, tenant="a") as liar, pytest.raises(AccessDenied):
            liar.sessions()
        with pytest.raises(AccessDenied, match="wants a key"):
            Client(running.address)
        held = client.generate("hello", max_tokens=LONG, ignore_eos=True)
        first_token(held)
        with pytest.raises(Overloaded, match="1 requests of this client"):
            client.generate("hello").text()


def test_a_daemon_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="there is no model"), spawned({"model": tmp_path / "none"}):
        pass
