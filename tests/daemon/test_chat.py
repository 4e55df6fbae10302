"""`spilld chat`: what the daemon holds is never sent twice, and one message ends no conversation."""

from __future__ import annotations

import os
import pty
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import msgpack
import pytest

from spilld import Client
from spilld.demo.spawn import Spawned
from spilld.models.model import Model

from .conftest import Running
from .harness import daemon, shared
from .test_cli import IN_THE_FOREGROUND, spilld


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[Spawned]:
    with daemon(model) as running:
        yield running


class Talk:
    """`spilld chat` in a terminal."""

    def __init__(self, process: subprocess.Popen[bytes], leader: int) -> None:
        self.process = process
        self._leader = leader
        self._seen = b""

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def until(self, *wanted: bytes) -> bytes:
        """What is shown until one of these has come; the rest is left for later."""
        while not any(word in self._seen for word in wanted):
            self._read()
        end = min(self._seen.index(word) + len(word) for word in wanted if word in self._seen)
        shown, self._seen = self._seen[:end], self._seen[end:]
        return shown

    def some(self) -> None:
        """Until something of an answer has come."""
        self._seen = b""
        while len(self._seen) < 40:
            self._read()

    def stop(self, wanted: bytes) -> None:
        """Ctrl-C, again if it came between two looks, until it is answered."""
        while wanted not in self._seen:
            self.process.send_signal(signal.SIGINT)
            if select.select([self._leader], [], [], 0.5)[0]:
                time.sleep(0.2)
                self._read()
        self.until(wanted)

    def _read(self) -> None:
        assert select.select([self._leader], [], [], 30)[0], f"nothing comes after {self._seen!r}"
        self._seen += os.read(self._leader, 65536)


@contextmanager
def talking(address: str, *options: str, terminal: str = "dumb") -> Iterator[Talk]:
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", IN_THE_FOREGROUND, "chat", f"--address={address}", *options]
    ends = {"stdin": follower, "stdout": follower, "stderr": follower}
    with subprocess.Popen(command, env=os.environ | {"TERM": terminal}, **ends) as process:  # type: ignore[call-overload]
        os.close(follower)
        try:
            yield Talk(process, leader)
        finally:
            process.kill()
    os.close(leader)


def messages(served: Spawned, name: str) -> list[tuple[str, str]]:
    """What a session holds, (role, content)."""
    file = Path(served.address.removeprefix("ipc://")).parent / "state/sessions.sqlite"
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as book:
        (packed,) = book.execute("SELECT messages FROM sessions WHERE name = ?", (name,)).fetchone()
    return [(role, content) for role, content in msgpack.unpackb(packed)]


def test_an_answer_that_was_stopped_is_no_reason_to_send_all_again(served: Spawned) -> None:
    with talking(served.address, "--session=new", "--system=Be brief.", "--max-tokens=3000") as talk:
        talk.until(b"> ")
        talk.type("first\n")
        talk.until(b"first\r\n")
        talk.some()
        talk.process.send_signal(signal.SIGINT)
        talk.until(b"(stopped)")
        talk.until(b"> ")
        talk.type("second\n")
        talk.until(b"second\r\n")
        talk.some()
        talk.process.send_signal(signal.SIGINT)
        talk.until(b"(stopped)")
        talk.until(b"> ")
        talk.stop(b"(Ctrl-D ends the chat)")
        talk.until(b"> ")
        talk.type("\4")
        assert talk.process.wait(20) == 0
    held = messages(served, "new")
    asked = [(role, content) for role, content in held if role != "assistant"]
    assert asked == [("system", "Be brief."), ("user", "first"), ("user", "second")]
    assert [role for role, _ in held] == ["system", "user", "assistant", "user", "assistant"]
    assert all(content for _, content in held)


def test_without_a_session_all_is_sent_again_where_nothing_is_held(running: Running) -> None:
    """The first answer was stopped: its context went with it."""
    running.echo.chat, running.echo.pace_s = True, 0.01
    with talking(running.address, "--system=Be brief.", "--max-tokens=3000") as talk:
        talk.until(b"> ")
        talk.type("first\n")
        talk.until(b"first\r\n")
        talk.some()
        talk.process.send_signal(signal.SIGINT)
        talk.until(b"(stopped)")
        running.echo.pace_s = 0.0
        talk.until(b"> ")
        talk.type("second\n")
        talk.until(b"second\r\n")
        talk.until(b"> ")
        talk.type("third\n")
        talk.until(b"third\r\n")
        talk.until(b"> ")
        talk.type("\4")
        assert talk.process.wait(20) == 0
    sent = [[(m.role, m.content) for m in request.prompt] for request in running.echo.submitted]  # type: ignore[union-attr]
    answer = sent[1][2][1]
    assert answer
    assert sent[0] == [("system", "Be brief."), ("user", "first")]
    assert sent[1] == [*sent[0], ("assistant", answer), ("user", "second")]
    assert sent[2] == [("user", "third")]
    assert running.echo.submitted[2].context == "kept"


def test_a_message_that_is_too_long_is_left_out(served: Spawned) -> None:
    for options in ([], ["--session=long"]):
        lines = f"hello\n{'word ' * 9000}\nhello again\n"
        done = spilld("chat", f"--address={served.address}", "--max-tokens=5", *options, input=lines)
        assert done.returncode == 0
        assert "at most 4095 leave room to answer" in " ".join(done.stderr.split())
        assert "the conversation goes on" in " ".join(done.stderr.split())
        assert len(done.stdout) > 2
    asked = [content for role, content in messages(served, "long") if role == "user"]
    assert asked == ["hello", "hello again"]


def test_a_signal_ends_it_at_the_prompt_and_in_an_answer(served: Spawned) -> None:
    for answering in (False, True):
        with talking(served.address, "--session=ended", "--max-tokens=3000") as talk:
            talk.until(b"> ")
            if answering:
                talk.type("first\n")
                talk.until(b"first\r\n")
                talk.some()
            talk.process.send_signal(signal.SIGTERM)
            assert talk.process.wait(10) == 143
    with Client(served.address) as client:
        assert [info.running for info in client.sessions() if info.name == "ended"] == [False]


def test_what_cannot_chat_says_so_before_the_first_message(running: Running) -> None:
    running.echo.chat = False
    done = spilld("chat", f"--address={running.address}", input="hello\n")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "echo has no chat template" in done.stderr
    assert "`spilld ask`" in done.stderr
    assert running.echo.submitted == []


def test_a_session_that_holds_a_text(served: Spawned) -> None:
    assert spilld("ask", f"--address={served.address}", "--session=text", "--raw", "Why?").returncode == 0
    done = spilld("chat", f"--address={served.address}", "--session=text", input="hello\n")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "the session 'text' holds a text, not a chat" in done.stderr
    assert spilld("ask", f"--address={served.address}", "--session=text", "And?").returncode == 0


def test_input_that_is_not_text(running: Running) -> None:
    running.echo.chat = True
    command = [sys.executable, "-m", "spilld", "chat", f"--address={running.address}"]
    done = subprocess.run(command, input=b"caf\xe9\n", capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, b"spilld: standard input is not UTF-8\n")


@contextmanager
def echoing(address: str) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon of echoes, as a process."""
    conftest = Path(__file__).with_name("conftest.py")
    with subprocess.Popen([sys.executable, str(conftest), address, "9", "0.01"]) as process:
        try:
            with Client(address, connect_timeout=30):
                pass
            yield process
        finally:
            process.kill()


def test_a_daemon_that_is_gone_does_not_end_it(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/s"
    with ExitStack() as stack:
        daemon = stack.enter_context(echoing(address))
        talk = stack.enter_context(talking(address, "--max-tokens=5", "--wait=10"))
        talk.until(b"> ")
        talk.type("first\n")
        talk.until(b"(cut at")
        talk.until(b"> ")
        daemon.kill()
        daemon.wait()
        talk.type("second\n")
        talk.until(b"the daemon is gone; waiting up to 10 s for it")
        stack.enter_context(echoing(address))
        talk.until(b"(cut at")
        talk.until(b"> ")
        talk.type("\4")
        assert talk.process.wait(20) == 0


def test_a_message_that_no_daemon_takes_is_left_out(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/s"
    with ExitStack() as stack:
        daemon = stack.enter_context(echoing(address))
        talk = stack.enter_context(talking(address, "--max-tokens=3000", "--wait=1"))
        talk.until(b"> ")
        talk.type("first\n")
        talk.some()
        daemon.kill()
        talk.until(b"the daemon is gone; waiting up to 1 s for it")
        talk.until(b"This message is left out")
        talk.until(b"> ")
        talk.type("second\n")
        talk.until(b"the daemon is gone; waiting up to 1 s for it")
        talk.until(b"This message is left out")
        talk.until(b"> ")
        stack.enter_context(echoing(address))
        talk.type("third\n")
        talk.some()
        talk.stop(b"(stopped")  # the answer, or what was waited for before it
        talk.until(b"> ")
        talk.type("/bye\n")
        assert talk.process.wait(20) == 0


def asked(running: Running) -> list[str]:
    """The last message of each request."""
    return [request.prompt[-1].content for request in running.echo.submitted]  # type: ignore[union-attr]


def test_several_lines_between_quotes_are_one_message(running: Running) -> None:
    running.echo.chat = True
    lines = '"""one\ntwo\n\n  three"""\nfour\n"""\nfive\n"""\n"""six"""\n"""\nseven\n'
    done = spilld("chat", f"--address={running.address}", "--max-tokens=1", input=lines)
    assert done.returncode == 0
    assert asked(running) == ["one\ntwo\n\n  three", "four", "five", "six", "seven"]


def test_what_is_pasted_is_one_message(running: Running) -> None:
    running.echo.chat = True
    with talking(running.address, "--max-tokens=1", terminal="xterm") as talk:
        assert b'""" begins and ends a message of several lines' in talk.until(b"> ")
        talk.type("\x1b[200~one\ntwo\nthree\x1b[201~")
        talk.type("\r")
        talk.until(b"(cut at")
        talk.until(b"> ")
        talk.type("\4")
        assert talk.process.wait(20) == 0
    assert asked(running) == ["one\ntwo\nthree"]


@pytest.mark.parametrize("farewell", ["/bye", "/exit"])
def test_words_that_are_no_messages(running: Running, farewell: str) -> None:
    running.echo.chat = True
    lines = f"/help\n/?\n/etc/hosts\n{farewell}\nnever\n"
    done = spilld("chat", f"--address={running.address}", "--max-tokens=1", input=lines)
    assert done.returncode == 0
    assert done.stdout.count("Ctrl-D or /bye the chat.\n") == 2
    assert asked(running) == ["/etc/hosts"]
