"""The other end of serving.py: a system as a process that is stopped while others have their turn."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

BENCH = Path(__file__).parent.parent
STOP_S = 20.0


class NotRun(Exception):
    """Why a system gave no number."""


class Child:
    """A system in a process group of its own, with all that it starts. It dies with this process.

    Raises NotRun if it cannot start.
    """

    def __init__(
        self,
        python: Path,
        module: str,
        arguments: Sequence[object],
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        if not python.exists():
            raise NotRun(f"no {python.parent.parent.name}: make bench-peers")
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self._process = subprocess.Popen(
            [python, "-m", f"systems.{module}", *map(str, arguments)],
            cwd=BENCH,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            process_group=0,
            env={**os.environ, **environment},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        try:
            self.versions: dict[str, str] = self._reply()["versions"]
        except NotRun:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def generate(self, prompt: Sequence[int] | Sequence[Sequence[int]], count: int) -> list[float]:
        """Seconds until each of count tokens was there, or of as many for each prompt of several.

        Raises NotRun if the process fails.
        """
        self._signal(signal.SIGCONT)
        try:
            print(json.dumps({"prompt": list(prompt), "count": count}), file=self._requests, flush=True)
            arrivals: list[float] = self._reply()["arrivals_s"]
        except BrokenPipeError:
            raise NotRun(self._end()) from None
        self._signal(signal.SIGSTOP)
        return arrivals

    def close(self) -> None:
        """End it, and what it started."""
        self._signal(signal.SIGKILL)
        self._process.wait(STOP_S)
        with contextlib.suppress(BrokenPipeError):  # a request that it did not read
            self._requests.close()
        self._replies.close()
        self._log.close()

    def _reply(self) -> dict[str, Any]:
        if not (line := self._replies.readline()):
            raise NotRun(self._end())
        reply: dict[str, Any] = json.loads(line)
        if "failed" in reply:
            raise NotRun(reply["failed"])
        return reply

    def _end(self) -> str:
        """How a process that says nothing any more has ended."""
        code = self._process.wait(STOP_S)
        self._log.seek(0)
        said = self._log.read().strip().splitlines()[-1:] or ["nothing"]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"{how}, having said: {said[0][:200]}"

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended; its next reply says so
            os.killpg(self._process.pid, number)
