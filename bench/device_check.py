"""Do the kernels, the devices and the engine do on this GPU what they do on the CPU? Run by device_check.sh.

Stages, one after another, each a process with a limit of its own; whatever becomes of one, the next is run,
and nothing is waited for once all have had their time. What each prints is in a file of its name, and all of
it in one log. A table is last: what became of each stage, seconds, and one line that says why.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

TOTAL_S = 580
"""All stages together; less than the ten minutes for which a GPU is lent."""
GRACE_S = 5.0
"""Between asking a process to end and ending it, and then until it is left alone: a GPU may keep it."""
NO_GPU = 3
"""Exit status of the stage `machine` where there is none."""
TAIL = 25
"""Lines of what failed that are shown before the table."""

ROOT = Path(__file__).parents[1]
SANITIZED = (
    "merge-80 or seal-k8v4-bfloat16-80 or k8v4-bfloat16-80-plain or attend_window-bfloat16-64-whole"
    " or dequantise-k8v4-bfloat16-80"
)
FAKED = "merge-80 or rotate-80 or seal-int8-bfloat16-64 or int8-bfloat16-80-bounds"
"""Cases of the matrix: compute-sanitizer and the emulator are slow."""


@dataclass(frozen=True)
class Stage:
    name: str
    limit_s: float
    command: Sequence[str]
    needs_gpu: bool = True
    lacks: str = ""
    """Why it cannot be run here."""


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str
    seconds: float
    why: str

    @property
    def bad(self) -> bool:
        return self.result in ("FAILED", "TOO LONG")


@dataclass
class Check:
    """The stages of a run, and what became of them. folder: of logs."""

    folder: Path
    total_s: float = TOTAL_S
    outcomes: list[Outcome] = field(default_factory=list)
    no_gpu: bool = False

    def run(self, stages: Iterable[Stage]) -> None:
        ends = time.monotonic() + self.total_s
        for stage in stages:
            outcome = self._outcome(stage, ends - time.monotonic())
            self.outcomes.append(outcome)
            print(row(outcome), flush=True)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _outcome(self, stage: Stage, left_s: float) -> Outcome:
        if stage.lacks or (self.no_gpu and stage.needs_gpu):
            return Outcome(stage.name, "skipped", 0.0, stage.lacks or "no GPU")
        if left_s < 1:
            return Outcome(stage.name, "skipped", 0.0, f"all stages together have {self.total_s:.0f} s")
        began, limit_s = time.monotonic(), min(stage.limit_s, left_s)
        try:
            status = finished(stage.command, self.log(stage.name), limit_s)
        except (KeyboardInterrupt, SystemExit):
            ended = Outcome(stage.name, "FAILED", time.monotonic() - began, "interrupted")
            self.outcomes.append(ended)
            raise
        seconds, why = time.monotonic() - began, said(self.log(stage.name))
        if status is None:
            return Outcome(stage.name, "TOO LONG", seconds, f"ended after {limit_s:.0f} s; at last: {why}")
        if status == NO_GPU and stage.name == "machine":
            self.no_gpu = True
            return Outcome(stage.name, "no GPU", seconds, why)
        return Outcome(stage.name, "FAILED" if status else "ok", seconds, why)


def finished(command: Sequence[str], log: Path, limit_s: float) -> int | None:
    """The exit status, None if it did not end in time; it and its children are ended, as far as possible."""
    with log.open("wb") as file:
        try:
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            file.write(str(error).encode())
            return 127
    try:
        return child.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)


def said(log: Path) -> str:
    """The last line, and the last that begins with "== ", which is for the table."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip(" =")]
    last = lines[-1:] + [line for line in lines if line.startswith("== ")][-1:]
    return "; ".join(dict.fromkeys(line.strip(" =") for line in last)) or "it said nothing"


def row(outcome: Outcome) -> str:
    return f"{outcome.name:<20} {outcome.result:<9} {outcome.seconds:>6.1f} s  {outcome.why[:200]}"


def table(outcomes: Sequence[Outcome]) -> str:
    bad = sum(outcome.bad for outcome in outcomes)
    skipped = sum(outcome.result == "skipped" for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    total = f"{len(outcomes)} stages in {seconds:.0f} s: {bad} bad, {skipped} skipped"
    return "\n".join([*map(row, outcomes), total])


def pytest(limit_s: int, *options: str) -> tuple[str, ...]:
    """Warnings of other versions of libraries than are pinned are no errors."""
    how = ("-v", "-p", "no:cacheprovider", "-o", "filterwarnings=default", f"--timeout={limit_s}", "-rfE")
    return (sys.executable, "-m", "pytest", *how, "--durations=3", *options)


def preparing() -> Iterator[Stage]:
    """Stages that need no GPU."""
    yield Stage("machine", 30, (sys.executable, "bench/device_machine.py"), needs_gpu=False)
    yield Stage("import", 60, (sys.executable, "bench/device_import.py"), needs_gpu=False)


def on_gpu() -> Iterator[Stage]:
    yield from preparing()
    yield Stage("compile", 110, (sys.executable, "-m", "tests.cuda_ext.compile_matrix"), needs_gpu=False)
    yield Stage("contract", 60, pytest(60, "-m", "gpu", "tests/cuda_ext/test_gpu.py"))
    yield Stage("matrix", 120, pytest(120, "-m", "gpu", "tests/cuda_ext/test_matrix_gpu.py"))
    yield Stage("engine", 150, pytest(150, "-m", "gpu", "-rP", "tests/daemon/test_device_engine.py"))
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    for tool in ("memcheck", "racecheck", "synccheck"):
        checked = pytest(40, "-m", "gpu", "tests/cuda_ext/test_matrix_gpu.py", "-k", SANITIZED)
        command = (sanitizer or "", "--tool", tool, "--error-exitcode", "9", *checked)
        yield Stage(tool, 40, command, lacks="" if sanitizer else "there is no compute-sanitizer on PATH")
    yield Stage("bench", 150, (sys.executable, "bench/gpu.py", "--json"))
    yield Stage("copies", 40, (sys.executable, "bench/gpu_copies.py", "--json"))


def over_fake_driver(folder: Path) -> Iterator[Stage]:
    """The same over the libcuda.so.1 of a folder, which needs no GPU."""
    yield from preparing()
    for name, options in (
        ("contract", ("tests/cuda_ext/under_driver.py",)),
        ("matrix", ("tests/cuda_ext/matrix_under_driver.py", "-k", FAKED)),
        ("engine", ("tests/daemon/engine_under_driver.py",)),
        ("bench", ("tests/bench/gpu_under_driver.py",)),
    ):
        found_there = ("env", f"LD_LIBRARY_PATH={folder}")
        yield Stage(name, 300, (*found_there, *pytest(300, *options)), needs_gpu=False)


def fake_driver() -> Path:
    from spilld.models.catalog import default_cache
    from tests.cuda_ext.driver import compile_driver

    return compile_driver(default_cache() / "emulator")


def card(outcomes: Iterable[Outcome]) -> str:
    machine = next((outcome for outcome in outcomes if outcome.name == "machine"), None)
    return machine.why.partition(",")[0] if machine and machine.result == "ok" else "no GPU"


def archived(check: Check, card: str) -> Path:
    """All logs and the table in one file, named by the day and the card."""
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    path = check.folder / f"{day}-{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.log"
    with path.open("w") as file:
        for outcome in check.outcomes:
            log = check.log(outcome.name)
            if outcome.result != "skipped":
                file.write(f"#### {outcome.name}\n{log.read_text(errors='replace')}\n")
        file.write(f"#### table\n{table(check.outcomes)}\n")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """0 unless a stage failed or took too long."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--fake", action="store_true", help="over the tests' fake driver: shows that this runs"
    )
    parser.add_argument("--only", metavar="STAGE,...", help="these stages alone")
    parser.add_argument("--total", type=float, default=TOTAL_S, help="seconds of all (%(default)s)")
    options = parser.parse_args(arguments)
    stages = list(over_fake_driver(fake_driver()) if options.fake else on_gpu())
    names = options.only.split(",") if options.only else [stage.name for stage in stages]
    if unknown := sorted(set(names) - {stage.name for stage in stages}):
        parser.error(
            f"no stages: {', '.join(unknown)}; there are {', '.join(stage.name for stage in stages)}"
        )
    check = Check(Path(os.environ.get("OUT") or "build/device_check"), total_s=options.total)
    check.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the table, and without what still runs
    try:
        check.run(stage for stage in stages if stage.name in names)
    finally:
        path = archived(check, "fake driver" if options.fake else card(check.outcomes))
        for outcome in check.outcomes:
            if outcome.bad:
                lines = check.log(outcome.name).read_text(errors="replace").splitlines()[-TAIL:]
                print(f"\n#### {outcome.name}, its last lines", *lines, sep="\n")
        print(f"\n{table(check.outcomes)}\n{path}")
        if options.fake:
            print("over the fake driver: nothing of this ran on a GPU")
    return int(any(outcome.bad for outcome in check.outcomes))


if __name__ == "__main__":
    sys.exit(main())
