"""A daemon as a child process over a temporary state folder: for the demo, benchmarks and tests."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from spilld.client.client import Client
from spilld.errors import DeadlineExceeded, InternalError, Unreachable

START_S = 600.0
"""Seconds for a first start on a busy machine, which compiles kernels; less if the process ends."""
STOP_S = 30.0


class Process(Protocol):
    """A child process, as subprocess.Popen has it."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def poll(self) -> int | None:
        """Return its exit status; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Args:
            timeout: How long, in seconds; None for ever.

        Raises:
            TimeoutExpired: It has not ended by then; subprocess.TimeoutExpired.
        """

    def send_signal(self, sig: int) -> None:
        """Send it a signal, if it runs."""


Start = Callable[[Sequence[str], Path], Process]
"""Runs `spilld` with these arguments and this log."""


def command(arguments: Sequence[str], log: Path) -> Process:
    """Run `spilld` as a command of its own, with its output in a log."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "spilld", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


@dataclass(frozen=True)
class Spawned:
    """A daemon that runs as a child process."""

    address: str
    process: Process
    log: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def peak_rss_bytes(self) -> int:
        """The largest resident set so far (VmHWM), mapped files included."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise InternalError(f"the kernel does not tell the peak memory of process {self.pid}")


@contextmanager
def spawned(
    settings: Mapping[str, object], key: Path | None = None, start: Start = command
) -> Iterator[Spawned]:
    """Run a daemon with these settings; it has ended when the context has.

    Args:
        settings: Values by the names of Config.
        key: A client's key file, where the daemon has keys.
        start: Starts the process.

    Raises:
        InternalError: It does not start; the error has the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="spilld-") as folder:
        options = {"state": f"{folder}/state", "listen": f"ipc://{folder}/socket", **settings}
        address = str(options["listen"])
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        log = Path(folder) / "log"
        process = start(["serve", *arguments], log)
        try:
            _await(process, address, key, log)
            yield Spawned(address, process, log)
        finally:
            _end(process)


def _await(process: Process, address: str, key: Path | None, log: Path) -> None:
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and process.poll() is None:
        try:
            with Client(address, keys=key, connect_timeout=1.0) as client:
                client.hello()
                return
        except (Unreachable, DeadlineExceeded):  # still loading
            continue
    raise InternalError(f"the daemon did not start; its log ends:\n{log.read_text()[-2000:]}")


def _end(process: Process) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()


def import_rss_bytes() -> int:
    """Measure the peak memory, in bytes, of an interpreter with the imports of the daemon."""
    code = (
        "from spilld.models.frameworks import import_frameworks; import_frameworks(); "
        "import numba, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(shown.stdout) * 1024
