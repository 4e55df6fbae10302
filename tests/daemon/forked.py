"""Daemons that are forked from a process which has imported what they need: a start takes seconds less.

Otherwise they are the command's own: its arguments, its signals, its log, an environment as the test has it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NoReturn

from spilld.demo import spawn

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["spilld.assembly", "transformers.models.llama.modeling_llama"])


class Forked:
    """As subprocess.Popen; it is the fork server that collects its exit status."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._process: ForkServerProcess = _CONTEXT.Process(
            target=_main, args=(list(arguments), log, dict(os.environ), Path.cwd())
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("spilld", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)


spawned = functools.partial(spawn.spawned, start=Forked)


def _main(arguments: list[str], log: Path, environment: dict[str, str], folder: Path) -> NoReturn:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with log.open("wb") as output, Path(os.devnull).open("rb") as nothing:
        for source, number in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source.fileno(), number)
    from spilld.__main__ import main

    sys.exit(main(arguments))
