"""The watchdog: a socket in systemd's place, and engines that get on, have nothing to do, or hang."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spilld import Client
from spilld.assembly import build_engine, welcome
from spilld.attention.cpu import CpuAttention
from spilld.config.config import Config
from spilld.engine import service
from spilld.engine.service import EngineService
from spilld.models.model import Model
from spilld.server.server import Server

from .harness import one_thread, shared, some_tokens

if TYPE_CHECKING:
    from tests.daemon.conftest import Running, Start

WATCHDOG_S = 0.4
"""What systemd allows between two signs of life; the daemon gives two in that time."""


class Watch:
    """What systemd hears."""

    def __init__(self, notify: socket.socket) -> None:
        self._notify = notify

    def signs(self, seconds: float) -> int:
        """How many signs of life come in so many seconds from now on."""
        self._heard(0)
        return self._heard(seconds).count(b"WATCHDOG=1")

    def _heard(self, seconds: float) -> list[bytes]:
        heard = []
        until = time.monotonic() + seconds
        while True:
            self._notify.settimeout(max(1e-3, until - time.monotonic()))
            try:
                heard.append(self._notify.recv(100))
            except TimeoutError:
                return heard


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCHDOG_S * 1e6)))
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        yield Watch(notify)


def test_a_server_speaks_for_its_service(systemd: Watch, start: Start) -> None:
    """Its own thread is well all the time."""
    running = start()
    assert systemd.signs(4 * WATCHDOG_S) >= 4
    running.echo.hangs = True
    systemd.signs(WATCHDOG_S)  # the last that was due
    assert systemd.signs(3 * WATCHDOG_S) == 0
    assert _answers(running)
    running.echo.hangs = False
    assert systemd.signs(4 * WATCHDOG_S) >= 4


def _answers(running: Running) -> bool:
    with Client(running.address) as client:
        return client.hello().model == "echo"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@contextmanager
def serving(model: Model, folder: Path) -> Iterator[tuple[EngineService, Client]]:
    """A server and an engine in threads, and a client."""
    config = Config.load(None, {"dtype": "float32", "state": folder / "state", "listen": f"ipc://{folder}/s"})
    with one_thread(), Server(config.listen) as server:
        engine = EngineService(
            lambda post: build_engine(config, model, post), server.post, welcome(config, model), 4
        )
        engine.start()
        thread = threading.Thread(target=server.run, args=(engine,))
        thread.start()
        try:
            with Client(config.listen) as client:
                yield engine, client
        finally:
            server.stop()
            thread.join()


def test_an_engine_that_hangs_is_not_reported_alive(
    systemd: Watch, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, entered, released = CpuAttention.forward, threading.Event(), threading.Event()

    def hangs(*arguments: Any) -> Any:
        entered.set()
        released.wait(60)
        return forward(*arguments)

    monkeypatch.setattr(service, "IDLE_S", WATCHDOG_S / 8)
    with serving(model, tmp_path) as (_, client):
        try:
            assert systemd.signs(4 * WATCHDOG_S) >= 4, "to have nothing to do is not to hang"
            monkeypatch.setattr(CpuAttention, "forward", hangs)
            generation = client.generate("hello", max_tokens=3, ignore_eos=True)
            assert entered.wait(10)
            systemd.signs(WATCHDOG_S)  # the last that was due
            assert systemd.signs(3 * WATCHDOG_S) == 0
        finally:
            released.set()
        generation.text()
        assert generation.result.usage.generated_tokens == 3
        assert systemd.signs(4 * WATCHDOG_S) >= 4


def test_within_a_long_step_every_layer_is_progress(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, seen = CpuAttention.forward, []

    def looked_at(*arguments: Any) -> Any:
        seen.append((engine._turns, engine.progress()))
        return forward(*arguments)

    with serving(model, tmp_path) as (engine, client):
        monkeypatch.setattr(CpuAttention, "forward", looked_at)
        client.generate(some_tokens(1, 1300), max_tokens=2, ignore_eos=True).text()
    turns = [[moved for _, moved in layers] for _, layers in groupby(seen, lambda look: look[0])]
    assert len(turns) >= 4, "three chunks and a token"
    assert all(len(layers) == len(model.geometry.layers) > 1 for layers in turns)
    assert all(before < after for layers in turns for before, after in pairwise(layers))
