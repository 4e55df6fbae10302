"""The daemon's log: what it says while it starts and once it is ready, for people and for machines."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spilld import Client
from spilld.__main__ import main
from spilld.models.child_output import lines_to
from spilld.models.model import Model
from spilld.monitoring import logs
from spilld.monitoring.sd_notify import Notifier
from spilld.monitoring.startup import Startup, next_command
from spilld.server.server import Server

from .forked import spawned
from .harness import shared


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, which is as it was afterwards."""
    logger = logging.getLogger()
    before = logger.level, logger.handlers[:]
    yield logger
    logger.setLevel(before[0])
    logger.handlers[:] = before[1]
    logging.captureWarnings(False)


def served(model: Model, **settings: object) -> str:
    """The log of a daemon that has started and ended."""
    chosen = {"model": model.folder, "cache": model.folder / "cache", "dtype": "float32", "threads": 1}
    with spawned({**chosen, **settings}) as running:
        log = running.log
        with Client(running.address) as client:
            client.generate("hello", max_tokens=2).text()
        address, said = running.address, log.read_text()
    return said.replace(address, "ADDRESS")


def test_one_line_says_that_it_is_ready(model: Model) -> None:
    said = served(model, host_budget="512M", disk_budget="1G")
    (ready,) = [line for line in said.splitlines() if "ready" in line]
    assert re.fullmatch(
        rf"INFO spilld\.monitoring\.startup: ready: {model.folder}, up to 4,096 tokens; KV budgets: "
        r"device [\d.]+ MiB, host 512 MiB, disk 1 GiB; at ADDRESS\. "
        r"Try: spilld ask --address ADDRESS \"Who are you\?\"",
        ready,
    )


def test_json_is_one_object_a_line(model: Model) -> None:
    lines = [json.loads(line) for line in served(model, log_format="json").splitlines()]
    assert all(set(line) >= {"time", "level", "logger", "message"} for line in lines)
    assert any(line["message"].startswith("ready: ") for line in lines)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in lines)


def test_a_level_leaves_out_what_is_less(model: Model) -> None:
    assert served(model, log_level="warning", disk_budget="1G") == ""


def test_json_has_errors_and_exceptions_too(
    root: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # serve would set it for good
    config = tmp_path / "spilld.toml"
    config.write_text('log_format = "json"\n')
    places = (f"--state={tmp_path}/state", f"--cache={tmp_path}/cache", f"--listen=ipc://{tmp_path}/s")
    assert main(["serve", f"--config={config}", "--model=gpt-17", *places]) == 1
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (last["level"], last["logger"]) == ("critical", "spilld.cli.commands.serve")
    assert last["message"].startswith("there is no model 'gpt-17'")
    assert main(["serve", "--log-format=json", "--host-budget=many", *places]) == 1
    assert "host_budget is 'many'" in json.loads(capsys.readouterr().err)["message"]
    monkeypatch.setattr(Server, "__enter__", lambda _: 1 // 0)
    assert main(["serve", "--log-format=json", *places]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError" in json.loads(line)["exception"]


def test_the_journal_has_priorities(
    root: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "journal").open("w") as journal:
        status = os.fstat(journal.fileno())
        monkeypatch.setattr(sys, "stderr", journal)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        logs.set_up("text", "info")
        root.info("begun")
        try:
            raise ValueError("two\nlines")
        except ValueError:
            root.exception("failed")
    lines = (tmp_path / "journal").read_text().splitlines()
    assert lines[:2] == ["<6>root: begun", "<3>root: failed"]
    assert lines[-2:] == ["<3>ValueError: two", "<3>lines"]
    assert not logs.in_journal(sys.stdin, {})


def test_a_name_with_line_breaks_forges_no_line(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clients name sessions and requests, and the log names these."""
    logs.set_up("text", "info")
    root.info("session %s has expired", "notes\nCRITICAL root: all is lost\r\x1b[2J")
    assert capsys.readouterr().err == (
        "INFO root: session notes\\nCRITICAL root: all is lost\\x0d\\x1b[2J has expired\n"
    )


def test_libraries_do_not_chatter_in_it(
    root: logging.Logger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends while it imports torch has statistics of torch's caches logged: at the root."""
    logs.set_up("text", "debug")
    theirs = logging.getLogger("torch._subclasses.fake_tensor")
    for logger in (theirs, logging.getLogger("torch")):
        monkeypatch.setattr(logger, "propagate", True)
        monkeypatch.setattr(logger, "handlers", [])
        monkeypatch.setattr(logger, "level", logging.NOTSET)
    theirs.info("FakeTensor cache stats:")
    logging.getLogger("spilld.here").debug("loaded")
    theirs.warning("out of date")
    assert capsys.readouterr().err == (
        "DEBUG spilld.here: loaded\nWARNING torch._subclasses.fake_tensor: out of date\n"
    )


def test_progress_says_how_long_it_will_take(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(Notifier, "_send", lambda _, state: told.append(state))
    with caplog.at_level("INFO"):
        tell = Startup(Notifier({})).parts("compiling")
        tell(0, 5)
        began = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: began + 4.0)
        tell(2, 5)
        tell(5, 5)
    assert caplog.messages == [
        "compiling: 0 of 5 done",
        "compiling: 2 of 5 done, about 6 s left",
        "compiling: 5 of 5 done",
    ]
    assert [state.splitlines()[0] for state in told] == [f"STATUS={line}" for line in caplog.messages]


def test_what_to_type_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/elsewhere")
    assert next_command("ipc:///run/user/7/spilld/spilld.sock", keyed=False) == 'spilld ask "Who are you?"'
    there = next_command("tcp://127.0.0.1:5757", keyed=True)
    assert there == 'spilld ask --address tcp://127.0.0.1:5757 --keys FILE "Who are you?"'
    monkeypatch.setattr(sys, "argv", [".venv/bin/spilld", "serve"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert next_command("ipc:///a", keyed=False).startswith(".venv/bin/spilld ask --address ipc:///a ")


def test_lines_of_a_child_come_while_it_runs() -> None:
    seen = threading.Event()
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        seen.set()

    with lines_to(tell) as sink:
        os.write(sink, b"one\ntw")
        assert seen.wait(10)
        os.write(sink, b"o")
    assert said == ["one", "two"]


def test_a_daemon_that_starts_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It listens before it has a model, and answers once it serves."""
    with Server(f"ipc://{tmp_path}/s") as server:
        began = time.monotonic()
        assert main(["stats", f"--address={server.address}", "--wait=2.5"]) == 1
        assert time.monotonic() - began < 60
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"spilld: the daemon at {server.address} is starting, or busy; waiting for 2.5 s"
    assert "its first start takes minutes" in said[1]
    assert len(said) == 2
