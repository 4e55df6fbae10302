"""The command line: what cannot work ends in one line that says what to do, and status 1."""

from __future__ import annotations

import argparse
import json
import os
import pty
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from spilld import Client
from spilld.__main__ import main, make_parser
from spilld.demo.spawn import Spawned, spawned
from spilld.models.model import Model

from .harness import daemon, shared


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@pytest.fixture(scope="module")
def running(model: Model) -> Iterator[Spawned]:
    with daemon(model) as running:
        yield running


def spilld(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spilld", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def serve(folder: Path, *arguments: object) -> list[str]:
    base = ("serve", f"--state={folder}/state", f"--cache={folder}/cache", f"--listen=ipc://{folder}/socket")
    return [*base, "--dtype=float32", *map(str, arguments)]


def corrupt(model: Model, folder: Path) -> Path:
    """The model's folder with the end of its weights cut off."""
    folder.mkdir()
    for file in model.folder.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    return folder


class TestServeThatCannotStart:
    """Each says in one line what is wrong and what is allowed."""

    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # serve would set it for good
        monkeypatch.setattr("spilld.monitoring.logs.set_up", lambda *_: None)

    @pytest.mark.parametrize(
        ("option", "words"),
        [
            ("--format=int3", ["format", "'int3'", "exact, int8, k8v4, int4"]),
            ("--chunk-tokens=many", ["chunk_tokens", "'many'"]),
            ("--host-budget=2XB", ["host_budget", "512MiB"]),
            ("--state=relative", ["state", "a full path"]),
            ("--listen=nowhere", ["listen", "nowhere"]),
            ("--metrics=0.0.0.0:9470", ["metrics", "0.0.0.0:9470", "loopback"]),
            ("--listen=tcp://0.0.0.0:1", ["listen", "without keys", "`spilld keys`"]),
            ("--config=/no/such/file", ["/no/such/file"]),
        ],
    )
    def test_bad_settings(self, option: str, words: list[str], tmp_path: Path, capsys: Any) -> None:
        assert main(serve(tmp_path, option)) == 1
        self.check(capsys.readouterr().err, words)

    def test_a_bad_file(self, tmp_path: Path, capsys: Any) -> None:
        config = tmp_path / "config.toml"
        for text, words in (("modle = 'x'", ["modle", "allowed"]), ("model = ", ["not TOML"])):
            config.write_text(text)
            assert main(serve(tmp_path, "--config", config)) == 1
            self.check(capsys.readouterr().err, words)

    @pytest.mark.parametrize(
        ("option", "words"),
        [
            ("--host-budget=20000", ["host budget", "need at least", "raise it"]),
            ("--device-budget=1000", ["device budget", "holds no window of", "raise it"]),
            ("--disk-budget=5000", ["of disk", "raise it"]),
            ("--max-context=5000", ["5000", "4096"]),
        ],
    )
    def test_small_budgets(
        self, option: str, words: list[str], model: Model, tmp_path: Path, capsys: Any
    ) -> None:
        assert main(serve(tmp_path, f"--model={model.folder}", option)) == 1
        self.check(capsys.readouterr().err, words)

    def test_keys_that_are_not_there(self, tmp_path: Path, capsys: Any) -> None:
        assert main(serve(tmp_path, f"--keys={tmp_path}/none")) == 1
        self.check(capsys.readouterr().err, [f"cannot read {tmp_path}/none/server.key"])

    def test_a_corrupt_folder(self, model: Model, tmp_path: Path, capsys: Any) -> None:
        folder = corrupt(model, tmp_path / "broken")
        assert main(serve(tmp_path, f"--model={folder}")) == 1
        self.check(capsys.readouterr().err, [str(folder)])

    def test_weights_that_cannot_be_read(self, model: Model, tmp_path: Path, capsys: Any) -> None:
        shutil.copy(model.folder / "config.json", tmp_path)
        (tmp_path / "model.safetensors").mkdir()  # root may read any file, but not a folder
        assert main(serve(tmp_path, f"--model={tmp_path}")) == 1
        self.check(capsys.readouterr().err, [f"{tmp_path}/model.safetensors", "cannot be read"])

    def test_a_state_folder_that_is_a_file(self, model: Model, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "state").write_text("")
        assert main(serve(tmp_path, f"--model={model.folder}")) == 1
        self.check(capsys.readouterr().err, [f"{tmp_path}/state", "`state`"])

    def test_metrics_where_another_listens(self, tmp_path: Path, capsys: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            assert main(serve(tmp_path, f"--metrics={address}")) == 1
        self.check(capsys.readouterr().err, [address, "in use", "`metrics`"])

    def check(self, said: str, words: list[str]) -> None:
        assert said.startswith("spilld: ")
        assert said.count("\n") == 1, "one line"
        assert all(word in said for word in words)


def test_every_option_has_a_sentence_and_its_default() -> None:
    def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for child in action.choices.values():
                    yield from options(child)
            elif not isinstance(action, argparse._HelpAction):
                yield parser.prog, action

    found = list(options(make_parser()))
    assert len(found) > 90
    for command, action in found:
        assert action.help, (command, action.dest)
        assert "default" in action.help or action.required or action.dest == "version", (command, action.dest)


@pytest.mark.parametrize("command", ["ask", "chat", "stats", "serve", "keys", "doctor", "sessions delete"])
def test_an_unknown_option_shows_the_usage_of_its_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), *(["name"] if " " in command else []), "--no-such=1"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"usage: spilld {command} ")
    assert said.endswith(f"spilld {command}: error: unrecognized arguments: --no-such=1\n")


@pytest.mark.parametrize("action", ["fork", "rename", "pin", "unpin", "delete", "expire", "export"])
def test_a_session_that_is_not_there(
    running: Spawned, action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"fork": ["new"], "rename": ["new"], "expire": ["5"], "export": [f"{tmp_path}/file"]}
    assert main(["sessions", f"--address={running.address}", action, "nosuch", *more.get(action, [])]) == 1
    said = capsys.readouterr().err
    assert said == "spilld: there is no session 'nosuch': `spilld sessions` lists them\n"


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["keys", "--help"]])
def test_help_without_a_home_or_a_name(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    homeless(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: spilld")


@pytest.mark.parametrize("command", ["stats", "serve", "keys", "check"])
def test_commands_without_a_home_or_a_name(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    homeless(monkeypatch)
    monkeypatch.setattr("spilld.monitoring.logs.set_up", lambda *_: None)
    assert main([command]) == 1
    said = capsys.readouterr().err
    assert said.startswith("spilld: your home directory is not known; set HOME, or XDG_")
    assert said.count("\n") == 1


def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """HOME is unset, and the user's id has no name."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


def test_version() -> None:
    shown = spilld("--version")
    assert (shown.returncode, shown.stdout) == (0, f"spilld {version('spilld')}\n")


def test_an_unknown_model_as_a_process(tmp_path: Path) -> None:
    """The whole way: exit status, nothing but the message, no socket left behind."""
    ended = spilld(*serve(tmp_path, "--model=gpt-17"))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1].startswith("spilld: there is no model 'gpt-17': known names are")
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "socket").exists()


def test_ask_and_stats(running: Spawned, model: Model, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("A short text.")
    ended = spilld("ask", "--address", running.address, "--max-tokens=8", text, "What is it?")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout
    piped = spilld(
        "ask", "--address", running.address, "--max-tokens=8", "-", "What is it?", input="A short text."
    )
    assert (piped.returncode, piped.stdout) == (0, ended.stdout)
    shown = spilld("stats", "--address", running.address, "--json")
    values = json.loads(shown.stdout)
    assert values["model"] == str(model.folder)
    assert values["requests_running"] == 0
    table = spilld("stats", "--address", running.address)
    assert "host budget bytes" in table.stdout
    assert "2,048.00 MiB" in table.stdout


def test_top_once(running: Spawned, model: Model) -> None:
    asking = Client(running.address)
    with asking as client, client.generate("hello", max_tokens=3000, ignore_eos=True):
        shown = spilld("top", "--address", running.address, "--once", "--every=0.3")
    assert (shown.returncode, shown.stderr) == (0, "")
    said = dict(re.findall(r"^(\w+) +(.*?) *$", shown.stdout, flags=re.M))
    assert said["requests"] == "1 running, 0 waiting, 0 contexts idle"
    generated, computed = map(float, re.findall(r"([\d.]+)/s", said["tokens"].replace(",", "")))
    assert 0 < generated <= computed
    assert said["failures"] == "0 writes, 0 reads, 0 recomputations"
    assert re.match(r"[\d.]+ MiB +2,048.00 MiB +0% +[\d.,]+ MiB$", said["host"])
    assert re.match(r"[\d.]+ MiB +16,384.00 MiB +0% +[\d.,]+ MiB +[\d.,]+ MiB$", said["disk"])
    assert str(model.folder) in shown.stdout.replace("\n", "")


# What runs in the background inherits that interrupts are ignored.
IN_THE_FOREGROUND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from spilld.__main__ import main, make_parser
sys.exit(main(sys.argv[1:]))
"""


def test_top_goes_on_until_it_is_interrupted(running: Spawned) -> None:
    leader, follower = pty.openpty()
    arguments = ["top", "--every=0.1", f"--address={running.address}"]
    command = [sys.executable, "-c", IN_THE_FOREGROUND, *arguments]
    with subprocess.Popen(command, stdout=follower, env=os.environ | {"TERM": "xterm"}) as watching:
        os.close(follower)
        try:
            seen = b""
            while seen.count(b"running") < 3:
                seen += os.read(leader, 4096)
            watching.send_signal(signal.SIGINT)
            with suppress(OSError):  # it has ended, and its end of the terminal with it
                while os.read(leader, 4096):  # a full terminal would hold it up
                    continue
            assert watching.wait(10) == 0
        finally:
            watching.kill()
    os.close(leader)


def test_top_of_nothing(running: Spawned) -> None:
    ended = spilld("top", "--every=0", "--address", running.address)
    assert (ended.returncode, ended.stderr) == (1, "spilld: --every is 0; allowed: seconds above 0\n")


def test_ask_waits_for_a_daemon_that_starts(model: Model, tmp_path: Path) -> None:
    text, address = tmp_path / "text", f"ipc://{tmp_path}/socket"
    text.write_text("A short text.")
    command = [sys.executable, "-m", "spilld", "ask", "--wait=60", f"--address={address}"]
    command += ["--max-tokens=8", str(text), "What is it?"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
        assert asking.stderr is not None
        assert "waiting for 60 s" in asking.stderr.readline()
        settings = {"model": model.folder, "cache": model.folder / "cache", "dtype": "float32", "threads": 1}
        with spawned({**settings, "listen": address}):
            answer, errors = asking.communicate(timeout=60)
    assert (asking.returncode, errors) == (0, "")
    assert answer


def test_ask_without_a_daemon_or_a_text(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("A short text.")
    ended = spilld("ask", "--wait=0.5", f"--address=ipc://{tmp_path}/nobody", text, "What is it?")
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("spilld: ")
    assert f"ipc://{tmp_path}/nobody" in ended.stderr
    assert "spilld serve" in ended.stderr
    text.write_bytes(b"\xff\xfe\x00")
    for file in (text, tmp_path / "missing"):
        ended = spilld("ask", file, "What is it?", env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)})
        assert ended.returncode == 1
        assert ended.stderr.startswith(f"spilld: cannot read {file}")
        assert ended.stderr.count("\n") == 1
