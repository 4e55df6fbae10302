"""A real daemon with a socket in systemd's place: what it tells, and what it takes on SIGHUP."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest

from spilld import Client, Token
from spilld.config.config import Config
from spilld.config.reload import SAFE, Reload
from spilld.demo import spawn
from spilld.demo.spawn import Spawned
from spilld.errors import ConfigError, ContextNotFound, Overloaded
from spilld.models.model import Model
from spilld.protocol.messages import Token as Piece

from .forked import Forked, spawned
from .harness import shared
from .peer import until
from .test_service import LONG, desk


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


class Daemon:
    """A running one with a configuration file, and what it tells systemd."""

    def __init__(self, running: Spawned, file: Path, systemd: socket.socket) -> None:
        self.address = running.address
        self.pid = running.pid
        self._running = running
        self._file = file
        self._systemd = systemd
        self.start = [self.told()]
        """What it has told while it started."""
        while "READY" not in self.start[-1]:
            self.start.append(self.told())

    def told(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self._systemd.recv(200).decode().splitlines())

    def reload(self, text: str) -> str:
        """What the log says of a configuration; by then the daemon has taken it."""
        before = len(self.log())
        self._file.write_text(text)
        began = time.monotonic_ns() // 1000
        os.kill(self.pid, signal.SIGHUP)
        told = self.told()
        assert told["RELOADING"] == "1"
        assert began <= int(told["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        assert self.told()["READY"] == "1"
        return self.log()[before:]

    def log(self) -> str:
        return self._running.log.read_text()


@pytest.fixture
def daemon(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    file = tmp_path / "spilld.toml"
    file.write_text("max_queue = 1\nretention_s = 50\n")
    settings = {"model": model.folder, "cache": model.folder / "cache", "dtype": "float32", "threads": 1}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.delenv("WATCHDOG_USEC", raising=False)
        with spawned({"config": file, "retention_s": 60, **settings}) as running:
            yield Daemon(running, file, systemd)


def test_a_reload_while_it_loads_comes_after(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "spilld.toml"
    file.write_text("max_queue = 1\n")

    def reloaded(arguments: Sequence[str], log: Path) -> Forked:
        process = Forked(arguments, log)
        systemd.recv(4096)
        file.write_text("max_queue = 2\n")
        process.send_signal(signal.SIGHUP)
        return process

    settings = {"model": model.folder, "cache": model.folder / "cache", "dtype": "float32", "threads": 1}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with spawn.spawned({"config": file, **settings}, start=reloaded) as running:
            until(lambda: "max_queue is 2 now, no longer 1" in running.log.read_text())


def answers(client: Client) -> bool:
    generation = client.generate("hello", max_tokens=1, ignore_eos=True)
    generation.text()
    return generation.result.usage.generated_tokens == 1


def test_a_daemon_takes_what_is_safe_and_names_the_rest(daemon: Daemon) -> None:
    with (
        Client(daemon.address) as client,
        client.generate("hello", max_tokens=LONG, ignore_eos=True) as running,
    ):
        while not isinstance(next(running), Token):
            continue
        with pytest.raises(Overloaded, match="1 requests"):
            answers(client)
        said = daemon.reload('max_queue = 2\nhost_budget = "3GiB"\nretention_s = 70\n')
        assert "max_queue is 2 now, no longer 1" in said
        assert f"host_budget stays {2 << 30}: to make it {3 << 30}, restart" in said
        assert "retention_s" not in said, "the command line overrides the file"
        assert answers(client)

        said = daemon.reload("max_queue = 0\nmax_gap_ms = 1\n")
        assert "no setting is changed" in said
        assert "spilld.toml, line 1: max_queue is 0; allowed: an integer from 1" in said
        assert "max_gap_ms" not in said
        assert answers(client)

        said = daemon.reload("max_queue = 1\n")
        assert "max_queue is 1 now, no longer 2" in said
        assert "host_budget" not in said, "it is what it was"
        with pytest.raises(Overloaded, match="1 requests"):
            answers(client)


def test_limits_of_clients_change(daemon: Daemon) -> None:
    with Client(daemon.address) as client:
        daemon.reload("max_queue = 64\nmax_open = 1\n")
        with client.generate("hello", max_tokens=LONG, ignore_eos=True) as running:
            while not isinstance(next(running), Token):
                continue
            with pytest.raises(Overloaded, match="1 requests of this client are open"):
                answers(client)
            said = daemon.reload("max_queue = 64\nmax_open = 2\n")
            assert "max_open is 2 now, no longer 1" in said
            assert answers(client)

        daemon.reload("max_rate = 0.01\n")
        with pytest.raises(Overloaded, match=r"more than 0\.01 messages a second"):
            client.stats(), client.stats()
        said = daemon.reload("max_rate = 1000\n")
        assert "max_rate is 1000.0 now, no longer 0.01" in said
        assert client.stats(), "it need not wait for what the old rate would have allowed"


def test_systemd_is_told_what_the_daemon_does(daemon: Daemon) -> None:
    loading, *preparing, warming, ready = daemon.start
    assert loading["STATUS"].startswith("loading /")
    assert preparing[0]["STATUS"].startswith("preparing kernels")
    assert all(part["STATUS"].startswith("compiling kernels") for part in preparing[1:])
    assert warming["STATUS"] == "warming up"
    assert {int(part["EXTEND_TIMEOUT_USEC"]) for part in (loading, *preparing, warming)} == {1800 * 10**6}
    assert ready == {"READY": "1", "STATUS": "serving"}
    os.kill(daemon.pid, signal.SIGTERM)
    assert daemon.told() == {"STOPPING": "1", "STATUS": "draining 0 requests"}


def test_a_daemon_that_is_aborted_says_where_it_was(daemon: Daemon) -> None:
    """As systemd's watchdog does."""
    os.kill(daemon.pid, signal.SIGABRT)
    give_up, traces = time.monotonic() + 10, ""
    while "server.py" not in traces and time.monotonic() < give_up:  # the main thread's is written last
        time.sleep(0.02)
        traces = daemon.log().partition("Fatal Python error: Aborted")[2]
    # Threads run on while they are read: of one in the middle of a call only the inmost frame may be there.
    assert re.search(r"service\.py|engine\.py|memory\.py", traces), "it says where the engine was"
    assert "server.py" in traces


def test_the_engine_takes_what_is_safe(model: Model, tmp_path: Path) -> None:
    before = Config.load(None, {"dtype": "float32", "state": str(tmp_path / "s")})
    with desk(model, tmp_path / "s") as opened:
        opened.submit("running", "hello", max_tokens=LONG)
        opened.wait("running", Piece)
        after = replace(before, context_ttl_s=0.01, max_gap_ms=5.0, retention_s=7.0, read_deadline_s=3.0)
        opened.service.adjust(after)
        short = opened.ask("short", "hello", keep=True).context
        engine = opened.engine
        assert (engine._prefill.gap_s, engine._upkeep.retention_s) == (0.005, 7.0)
        assert engine._store.disk is not None
        assert engine._store.disk.prefetch.deadline_s == 3.0
        opened.service.cancel("running")
        assert opened.code("running") == "cancelled"
        time.sleep(1.1)  # sessions are looked at once a second
        with pytest.raises(ContextNotFound):
            opened.ask("more", "hello", context=short)


def test_every_setting_but_the_safe_ones_stays(caplog: pytest.LogCaptureFixture) -> None:
    old = Config()
    other = {
        field.name: "other" if isinstance(value, str) else Path("/other") if isinstance(value, Path) else 3
        for field in fields(Config)
        for value in [getattr(old, field.name)]
    }
    applied: list[Config] = []
    Reload(old, lambda: replace(old, **other), applied.append)()  # type: ignore[arg-type]
    assert applied == [replace(old, **dict.fromkeys(SAFE, 3))]  # type: ignore[arg-type]
    assert caplog.text.count("restart the daemon") == len(other) - len(SAFE)

    def fails() -> Config:
        raise ConfigError("it is gone")

    Reload(old, fails, applied.append)()
    assert len(applied) == 1
    assert "no setting is changed: it is gone" in caplog.text
