"""bench/device_check.sh where there is no GPU: no stage stops the next, nothing is waited for without end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import device_check
import pytest
from device_check import SANITIZED, Check, Outcome, Stage, archived, card, main, on_gpu, said, table

from spilld.models.catalog import default_cache

from ..cuda_ext.cases import cases

SCRIPT = Path(device_check.__file__).with_suffix(".sh")


def stage(name: str, code: str, limit_s: float = 60, *, needs_gpu: bool = False) -> Stage:
    return Stage(name, limit_s, (sys.executable, "-c", code), needs_gpu=needs_gpu)


HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf])
print(child.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Not even a zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "GRACE_S", 0.3)


def test_no_stage_stops_the_next(tmp_path: Path) -> None:
    check, began = Check(tmp_path), time.monotonic()
    check.run(
        [
            stage("good", "print('12 passed'); print('== error 3e-6')"),
            stage("bad", "import sys; print('1 failed'); sys.exit(9)"),
            stage("dead", "import os; os.abort()"),
            stage("stuck", HANGS, 1.5),
            Stage("absent", 9, ("no-such-program",), lacks="there is no such program"),
            stage("last", "pass"),
        ]
    )
    assert time.monotonic() - began < 30
    results = {outcome.name: (outcome.result, outcome.why) for outcome in check.outcomes}
    child = results.pop("stuck")
    assert results == {
        "good": ("ok", "error 3e-6"),
        "bad": ("FAILED", "1 failed"),
        "dead": ("FAILED", "it said nothing"),
        "absent": ("skipped", "there is no such program"),
        "last": ("ok", "it said nothing"),
    }
    assert child[0] == "TOO LONG"
    assert child[1].startswith("ended after 2 s; at last: ")
    assert not alive(int(child[1].split()[-1])), "what a stage has started ends with it"


def test_a_program_that_is_missing_is_a_failure_like_another(tmp_path: Path) -> None:
    check = Check(tmp_path)
    check.run([Stage("gone", 9, ("/no/such/program",), needs_gpu=False), stage("last", "pass")])
    assert [outcome.result for outcome in check.outcomes] == ["FAILED", "ok"]
    assert "No such file" in check.outcomes[0].why


def test_all_stages_together_have_a_limit(tmp_path: Path) -> None:
    check, began = Check(tmp_path, total_s=2), time.monotonic()
    check.run([stage("long", "import time; time.sleep(600)"), stage("late", "pass")])
    assert time.monotonic() - began < 20
    assert [outcome.result for outcome in check.outcomes] == ["TOO LONG", "skipped"]


def test_a_run_that_is_interrupted_says_where(tmp_path: Path) -> None:
    check = Check(tmp_path)
    timer = threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(143))
    try:
        timer.start()
        with pytest.raises(SystemExit):
            check.run([stage("long", "import os, time; print(os.getpid(), flush=True); time.sleep(600)")])
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert table(check.outcomes).splitlines()[0].split()[::4] == ["long", "interrupted"]
    assert not alive(int(check.log("long").read_text()))


def test_without_a_gpu_what_needs_one_is_skipped(tmp_path: Path) -> None:
    check = Check(tmp_path)
    none = f"import sys; print('== there is no driver'); sys.exit({device_check.NO_GPU})"
    check.run([stage("machine", none), stage("kernels", "", needs_gpu=True), stage("import", "")])
    assert [(outcome.result, outcome.why) for outcome in check.outcomes] == [
        ("no GPU", "there is no driver"),
        ("skipped", "no GPU"),
        ("ok", "it said nothing"),
    ]
    assert not any(outcome.bad for outcome in check.outcomes)
    assert card(check.outcomes) == "no GPU"


def test_a_machine_that_does_not_answer_is_not_one_without_a_gpu(tmp_path: Path) -> None:
    check = Check(tmp_path)
    check.run([stage("machine", "import time; time.sleep(600)", 0.5), stage("kernels", "", needs_gpu=True)])
    assert [outcome.result for outcome in check.outcomes] == ["TOO LONG", "ok"]


def test_one_log_has_it_all_and_the_table_last(tmp_path: Path) -> None:
    check = Check(tmp_path)
    check.run(
        [
            stage("machine", "print('== NVIDIA H200, sm_90, 141 GB')"),
            stage("bad", "print('why'); raise SystemExit(1)"),
        ]
    )
    path = archived(check, card(check.outcomes))
    assert path.name.endswith("-nvidia-h200.log")
    lines = path.read_text().splitlines()
    assert lines[:2] == ["#### machine", "== NVIDIA H200, sm_90, 141 GB"]
    assert "why" in lines
    assert lines[-4:] == ["#### table", *table(check.outcomes).splitlines()]
    assert lines[-1].endswith(": 1 bad, 0 skipped")


def test_a_line_that_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for words, wanted in (
        ("== first\n== error 2e-6\n3 passed in 1 s\n\n", "3 passed in 1 s; error 2e-6"),
        ("what it is\n== NVIDIA H200\n", "NVIDIA H200"),
        ("== error 2e-6\n====== 3 passed in 1 s ======\n", "3 passed in 1 s; error 2e-6"),
        ("\n \n====\n", "it said nothing"),
    ):
        log.write_text(words)
        assert said(log) == wanted
    assert len(device_check.row(Outcome("x", "ok", 1.0, "y" * 1000))) < 250


def test_a_stage_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "matrix,warp"])
    assert "no stages: warp; there are machine, import" in capsys.readouterr().err


def test_stages_name_what_there_is() -> None:
    stages = list(on_gpu())
    assert max(stage.limit_s for stage in stages) < device_check.TOTAL_S / 2
    files = [word for stage in stages for word in stage.command if word.endswith(".py")]
    assert len(files) == 10
    assert all((device_check.ROOT / file).exists() for file in files)
    names = [case.name for case in cases()]
    assert all(any(part in name for name in names) for part in SANITIZED.split(" or "))


def script(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The script as whoever has a GPU runs it, with nothing of ours on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "PYTHON": sys.executable,
        "OUT": str(folder),
        "XDG_CACHE_HOME": str(default_cache().parent),
    }
    return subprocess.run(
        [str(SCRIPT), *options], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_script_without_a_gpu(tmp_path: Path) -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver here")
    done = script(tmp_path, "--only", "machine,matrix")
    assert done.returncode == 0, done.stdout + done.stderr
    *_, machine, matrix, total, path = done.stdout.splitlines()
    assert machine.split()[:3] == ["machine", "no", "GPU"]
    assert "libcuda.so.1" in machine
    assert matrix.split()[:2] == ["matrix", "skipped"]
    assert total.endswith(": 0 bad, 1 skipped")
    log = Path(path).read_text()
    assert f"Python {sys.version.split()[0]}" in log
    assert "cuda-core 1" in log


@pytest.mark.slow
def test_the_script_over_the_fake_driver(tmp_path: Path) -> None:
    done = script(tmp_path, "--fake")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    results = {line.split()[0]: line.split()[1] for line in lines[-9:-3]}
    assert results == {
        "machine": "no",
        **dict.fromkeys(("import", "contract", "matrix", "engine"), "ok"),
        "bench": "ok",
    }
    assert lines[-1] == "over the fake driver: nothing of this ran on a GPU"
