"""A model folder's chat template, rendered by a process that is killed if it takes too much."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from spilld.errors import Draining, InvalidRequest, PromptTooLong

from .template_process import (
    CPU_S,
    MEMORY_BYTES,
    Mode,
    pack,
    receive,
    unpack,
)

WALL_S = 30.0
"""Seconds after which a rendering is killed; CPU_S normally ends it before."""


class ChatTemplate:
    """Renders a chat template in a child process, for any thread, one rendering at a time.

    The process starts with the first rendering or with `start`, and again after it had to be killed.
    """

    def __init__(self, source: str, variables: Mapping[str, str], control: Mapping[str, str]) -> None:
        """Keep the arguments of Renderer, for when the process starts."""
        self._setup = pack({"source": source, "variables": variables, "control": control})
        self._lock = threading.Lock()
        self._running: _Process | None = None

    def start(self) -> None:
        """Start the process, without waiting for it."""
        with self._lock:
            self._process()

    def close(self) -> None:
        """Kill the process: a rendering that runs raises Draining."""
        if (running := self._running) is not None:
            running.kill()

    def render(self, turns: Sequence[tuple[str, str]], mode: Mode, most: int) -> str:
        """Make the prompt of a conversation, with stand-ins for control tokens that the template writes.

        Args:
            turns: (role, content) of each message.
            mode: Where the prompt ends.
            most: How many characters it may have.

        Raises:
            PromptTooLong: The prompt has more than `most` characters.
            InvalidRequest: The template refuses the messages, fails, or takes more time or memory than it
                may.
            Draining: The process was killed by `close`.
        """
        request = pack({"turns": turns, "mode": mode, "most": most})
        with self._lock:
            process = self._process()
            try:
                answer = process.ask(request, 4 * most + (1 << 16))
            except (OSError, ValueError) as error:
                self._running = None
                raise _ended(process, error) from error
        return _text(answer)

    def _process(self) -> _Process:
        if self._running is None or not self._running.alive:
            self._running = _Process(self._setup)
        return self._running


class _Process:
    def __init__(self, setup: bytes) -> None:
        self._link, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "spilld.tokenizer.template_process"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._setup = setup
        self.killed = False
        self._finalizer = weakref.finalize(self, _end, self._process, self._link)

    def ask(self, request: bytes, most: int) -> Mapping[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            OSError: The process has ended or takes too long.
            ValueError: Its answer is malformed or has more than `most` bytes.
        """
        deadline = time.monotonic() + WALL_S
        self._link.settimeout(WALL_S)
        self._link.sendall(self._setup + request)
        self._setup = b""
        self._link.settimeout(max(0.0, deadline - time.monotonic()))
        if (body := receive(self._link, most)) is None:
            raise ConnectionResetError("it is gone")
        answer = unpack(body)
        if not isinstance(answer, Mapping):
            raise ValueError(f"it answers {answer!r:.100}")
        return answer

    @property
    def alive(self) -> bool:
        return not self.killed and self._process.poll() is None

    def kill(self) -> None:
        self.killed = True
        self._process.kill()

    def end(self) -> int:
        """Kill the process and return its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)  # the kernel may be killing it just now
        self._finalizer()
        return self._process.returncode


def _end(process: subprocess.Popen[bytes], link: socket.socket) -> None:
    link.close()
    process.kill()
    process.wait()


def _ended(process: _Process, error: Exception) -> InvalidRequest | Draining:
    code = process.end()
    if process.killed:
        return Draining("the daemon is stopping; try again when it is back")
    if code == -signal.SIGXCPU or isinstance(error, TimeoutError):
        return _fault(f"does not end: it was stopped after {CPU_S} s of computing")
    return _fault(f"ended the process that renders it ({error}; exit code {code})")


def _text(answer: Mapping[str, Any]) -> str:
    text = answer.get("text")
    if isinstance(text, str):
        return text
    match answer.get("error"):
        case "long":
            raise PromptTooLong(
                "the chat template makes a prompt of these messages that the model cannot take"
            )
        case "memory":
            raise _fault(f"takes more than {MEMORY_BYTES >> 20} MiB of memory")
        case "refuses":
            raise InvalidRequest(f"the model's chat template refuses these messages: {answer.get('message')}")
        case _:
            raise _fault(f"fails: {answer.get('message')}")


def _fault(what: str) -> InvalidRequest:
    return InvalidRequest(f"the model's chat template {what}; send a raw prompt, or have the template mended")
