"""`spilld ask`: what is asked, where the answer goes, and how it ends."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spilld.__main__ import main
from spilld.protocol.messages import Message, Sampling

from .conftest import Running

RUDE = "\ta\r\x07\x0c\x1b[31m\x9b1mé\n"
"""What a terminal would obey."""

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(running: Running, capfd: pytest.CaptureFixture[str]) -> Ask:
    """Runs `spilld ask` in this process: its status, what it wrote, what it said."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main(["ask", f"--address={running.address}", "--max-tokens=3", *map(str, arguments)])
        return status, *capfd.readouterr()

    return run


def type_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def user(content: str) -> tuple[Message, ...]:
    return (Message(role="user", content=content),)


class TestWhatIsAsked:
    def test_a_model_that_chats_is_asked_by_a_message(
        self, ask: Ask, running: Running, tmp_path: Path
    ) -> None:
        running.echo.chat = True
        (tmp_path / "report").write_text("Signed: Ada.")
        assert ask(tmp_path / "report", "Who signed it?")[0] == 0
        assert ask("Who are you?")[0] == 0
        told = running.echo.submitted
        assert [request.prompt for request in told] == [
            user("Signed: Ada.\n\nWho signed it?"),
            user("Who are you?"),
        ]
        assert told[0].stop == ()

    @pytest.mark.parametrize(("chat", "options"), [(False, []), (None, []), (True, ["--raw"])])
    def test_any_other_by_a_text(
        self, ask: Ask, running: Running, chat: bool | None, options: list[str]
    ) -> None:
        """One without a template, one of an older daemon, which does not say, and one by --raw."""
        running.echo.chat = chat
        assert ask(*options, "Who are you?")[0] == 0
        (told,) = running.echo.submitted
        assert (told.prompt, told.stop) == ("Question: Who are you?\nAnswer:", ("\nQuestion:",))

    def test_a_session_goes_on_as_it_began(self, ask: Ask, running: Running) -> None:
        running.echo.chat = True
        assert ask("--session=notes", "And when?")[0] == 0
        status, _, said = ask("--session=notes", "--raw", "And when?")
        assert (status, said.count("\n")) == (1, 1)
        assert "the session 'notes' is a chat" in said
        running.echo.chat = False
        assert ask("--session=notes", "And when?")[0] == 0
        running.echo.chat = True
        assert ask("--session=new", "--raw", "Who?")[0] == 0
        asked = [request.prompt for request in running.echo.submitted]
        texts = ["\n\nQuestion: And when?\nAnswer:", "\n\nQuestion: Who?\nAnswer:"]
        assert asked == [user("And when?"), *texts]

    def test_standard_input_is_the_question_or_the_text(
        self, ask: Ask, running: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        running.echo.chat = True
        for words in ([], ["-"]):
            type_in(monkeypatch, b"Who are you?\n")
            assert ask(*words)[0] == 0
        type_in(monkeypatch, "Signed: Adà.\n".encode())
        assert ask("-", "Who signed it?")[0] == 0
        asked = [request.prompt for request in running.echo.submitted]
        assert asked == [user("Who are you?"), user("Who are you?"), user("Signed: Adà.\n\n\nWho signed it?")]

    def test_what_cannot_be_asked_is_said_in_one_line(
        self, ask: Ask, running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "report.txt"
        file.write_text("Signed: Ada.")
        for words, says in (
            (["Who", "are", "you?"], "needs quotes"),
            (["Who", "are"], "cannot read Who: No such file or directory"),
            ([str(file)], f'what about {file}? spilld ask {file} "'),
            ([" "], "there is no question"),
        ):
            status, out, said = ask(*words)
            assert (status, out, said.count("\n")) == (1, "", 1)
            assert says in said
        for words in (["-", "Who?"], []):
            type_in(monkeypatch, b"caf\xe9")
            assert ask(*words) == (
                1,
                "",
                "spilld: cannot read standard input: it is not UTF-8 text (byte 3)\n",
            )
        status, _, said = ask("caf\udce9?")
        assert (status, said.count("\n")) == (1, 1), "an argument that is not UTF-8"
        assert running.echo.submitted == []


def command(running: Running, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "spilld", "ask", f"--address={running.address}", *arguments, "Why?"]


class TestWhereItGoes:
    def test_a_file_has_it_byte_for_byte(self, running: Running, ask: Ask) -> None:
        running.echo.piece = RUDE
        done = subprocess.run(command(running, "--max-tokens=3"), capture_output=True, timeout=60, check=True)
        assert (done.stdout, done.stderr) == (RUDE.encode() * 3, b"")

    def test_a_terminal_obeys_none_of_it(self, running: Running) -> None:
        running.echo.piece = RUDE
        with terminal() as (leader, follower):
            with subprocess.Popen(
                command(running, "--max-tokens=3"), stdout=follower, stderr=follower
            ) as asking:
                os.close(follower)
                shown = read_all(leader)
            assert asking.returncode == 0
        text = shown.partition(b"\ta")[1] + shown.partition(b"\ta")[2]
        assert text.replace(b"\r\n", b"\n").startswith(b"\ta\\x0d\\x07\\x0c\\x1b[31m\\x9b1m\xc3\xa9\n" * 3), (
            shown
        )

    def test_a_disk_that_is_full(self, running: Running) -> None:
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(
                command(running), stdout=full, stderr=subprocess.PIPE, timeout=60, check=False
            )
        assert (done.returncode, done.stderr) == (
            1,
            b"spilld: the answer cannot be written: No space left on device\n",
        )


class TestHowItEnds:
    @pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
    def test_a_signal_cancels_what_was_asked(self, running: Running, number: int, status: int) -> None:
        with asking(running) as (process, request_id):
            process.send_signal(number)
            assert process.wait(10) == status
            assert process.stderr is not None
            assert process.stderr.read() == b""
        assert cancelled(running) == [request_id]

    def test_a_hangup_that_is_ignored_stays_so(self, running: Running) -> None:
        with asking(running, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as (process, _):
            process.send_signal(signal.SIGHUP)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 143

    def test_nobody_reads_it_any_more(self, running: Running) -> None:
        """As with `| head -1`."""
        with asking(running) as (process, request_id):
            assert process.stdout is not None
            process.stdout.close()
            assert process.wait(10) == 128 + signal.SIGPIPE
            assert process.stderr is not None
            assert process.stderr.read() == b""
        assert cancelled(running) == [request_id]


@contextmanager
def asking(running: Running, **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process that has got some of a long answer, and the id of its request."""
    running.echo.pace_s = 0.01
    with subprocess.Popen(
        command(running, "--max-tokens=100000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1)
            yield process, running.echo.submitted[-1].request_id
        finally:
            process.kill()


def cancelled(running: Running) -> list[str]:
    give_up = time.monotonic() + 10
    while not running.echo.cancelled and time.monotonic() < give_up:
        time.sleep(0.01)
    return running.echo.cancelled


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    leader, follower = pty.openpty()
    try:
        yield leader, follower
    finally:
        os.close(leader)


def read_all(leader: int) -> bytes:
    seen = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # its other end is closed
            return seen
        if not piece:
            return seen
        seen += piece


def test_who_types_the_question_is_told(running: Running) -> None:
    leader, follower = pty.openpty()
    os.write(leader, b"who\n\4")
    command = [sys.executable, "-m", "spilld", "ask", f"--address={running.address}", "--max-tokens=1"]
    done = subprocess.run(command, stdin=follower, capture_output=True, timeout=30, check=False)
    os.close(follower)
    os.close(leader)
    assert (done.returncode, done.stderr) == (0, b"spilld: type the question, then Ctrl-D\n")
    assert running.echo.submitted[0].prompt == "Question: who\nAnswer:"


def test_a_system_message_comes_first(ask: Ask, running: Running) -> None:
    running.echo.chat = True
    assert ask("--system=Be brief.", "Who?")[0] == 0
    assert running.echo.submitted[0].prompt == (Message(role="system", content="Be brief."), *user("Who?"))
    status, _, said = ask("--system=Be brief.", "--session=notes", "Who?")
    assert (status, said) == (0, "spilld: the session has begun, so --system is left out\n")
    assert running.echo.submitted[1].prompt == user("Who?")


@pytest.mark.parametrize(("chat", "options"), [(False, []), (True, ["--raw"])])
def test_a_system_message_that_cannot_be_sent(
    ask: Ask, running: Running, chat: bool, options: list[str]
) -> None:
    running.echo.chat = chat
    status, _, said = ask(*options, "--system=Be brief.", "Who?")
    assert (status, said.count("\n")) == (1, 1)
    assert said.startswith("spilld: --system is a message, and none is sent ")
    assert running.echo.submitted == []


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_how_the_answer_is_chosen(command: str, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    running.echo.chat = True
    type_in(monkeypatch, b"Who?\n")
    options = ["--temperature=0.5", "--top-p=0.9", "--top-k=40", "--seed=7", "--max-tokens=3"]
    assert main([command, f"--address={running.address}", *options]) == 0
    (request,) = running.echo.submitted
    assert request.sampling == Sampling(temperature=0.5, top_p=0.9, top_k=40, seed=7)
    assert request.max_tokens == 3
