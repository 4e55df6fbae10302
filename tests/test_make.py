"""The venvs that make makes, with a pip that installs nothing: it writes down what it is asked for."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ("Makefile", "pyproject.toml", "constraints.txt")

PYTHON = """#!{python}
import os, shutil, subprocess, sys
from pathlib import Path

here = Path(__file__).parent
if sys.argv[1:3] == ["-m", "venv"]:
    venv = Path(sys.argv[3]).resolve()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    shutil.copytree(here / "pip", next(venv.glob("lib/python*/site-packages")) / "pip", dirs_exist_ok=True)
    (venv / "bin/pip").write_text(f"#!{{venv}}/bin/python")
elif (here / "old").exists() and "version_info" in sys.argv[2]:
    sys.exit(1)
elif (here / "bare").exists() and "ensurepip" in sys.argv[2]:
    raise ModuleNotFoundError
else:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
PIP = """
import sys, time
from pathlib import Path

here = Path({here!r})
if "index" in sys.argv:
    print((here / "versions").read_text())
    sys.exit()
with (here / "asked").open("a") as asked:
    print(*sys.argv[1:], file=asked)
while (here / "slow").exists():
    time.sleep(0.01)
sys.exit((here / "offline").exists())
"""
RUNUSER = """#!/bin/sh
shift 3
exec "$@"
"""


class Machine:
    """A checkout, and a Python that makes venvs with a pip of ours; files beside both say how they behave."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.tools = folder / "spilld", folder / "tools"
        self.checkout.mkdir()
        for name in NEEDED:
            shutil.copy2(ROOT / name, self.checkout)
        (self.tools / "pip").mkdir(parents=True)
        (self.tools / "pip/__init__.py").touch()
        (self.tools / "pip/__main__.py").write_text(PIP.format(here=str(self.tools)))
        self.versions("2.13.0, 2.12.1")
        for name, script in (("python", PYTHON), ("runuser", RUNUSER)):
            (self.tools / name).write_text(script.format(python=sys.executable))
            (self.tools / name).chmod(0o755)

    def versions(self, of_torch: str) -> None:
        (self.tools / "versions").write_text(f"torch (2.15.0)\nAvailable versions: 2.15.0, {of_torch}\n")

    def set(self, *states: str) -> None:
        for state in ("offline", "slow", "old", "bare"):
            (self.tools / state).unlink(missing_ok=True)
        for state in states:
            (self.tools / state).touch()

    def asked(self) -> list[str]:
        """What pip was asked for since the last time."""
        path = self.tools / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PATH": f"{self.tools}:{os.environ['PATH']}"}
        for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # of a make that runs this test
            environment.pop(name, None)
        return subprocess.Popen(
            ["make", f"PYTHON={self.tools / 'python'}", "NVIDIA=", *arguments],
            cwd=self.checkout,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def make(self, *arguments: str, fails: bool = False) -> str:
        running = self.start(*arguments)
        said, _ = running.communicate(timeout=60)
        assert (running.returncode != 0) == fails, said
        return said


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


class Venv:
    """One that make makes, and what it is told for that."""

    def __init__(self, machine: Machine, folder: Path, *arguments: str) -> None:
        self.machine, self.folder, self.arguments = machine, folder, arguments

    def make(self, *, fails: bool = False) -> str:
        return self.machine.make(*self.arguments, fails=fails)

    def start(self) -> subprocess.Popen[str]:
        return self.machine.start(*self.arguments)

    @property
    def ready(self) -> bool:
        return (self.folder / ".ready").exists()

    def mark(self) -> None:
        """Whether it is this one that is still there is `marked` from now on."""
        (self.folder / "mark").touch()

    @property
    def marked(self) -> bool:
        return (self.folder / "mark").exists()


@pytest.fixture(params=["make", "make install"])
def venv(request: pytest.FixtureRequest, machine: Machine, tmp_path: Path) -> Venv:
    if request.param == "make":
        return Venv(machine, machine.checkout / ".venv", ".venv/.ready")
    return Venv(machine, tmp_path / "opt/spilld", "install-venv", f"prefix={tmp_path}/opt/spilld")


def test_one_that_failed_is_made_anew(machine: Machine, venv: Venv) -> None:
    machine.set("offline")
    venv.make(fails=True)
    assert not venv.ready
    venv.mark()
    venv.make(fails=True)
    assert not venv.ready
    assert not venv.marked
    machine.set()
    venv.make()
    assert venv.ready


def test_one_that_was_killed_is_made_anew(machine: Machine, venv: Venv) -> None:
    machine.set("slow")
    running = venv.start()
    deadline = time.monotonic() + 30
    while not machine.asked():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate(timeout=10)
    assert not venv.ready
    venv.mark()
    machine.set()
    venv.make()
    assert venv.ready
    assert not venv.marked


def test_one_whose_python_has_gone_is_made_anew(venv: Venv) -> None:
    venv.make()
    venv.mark()
    (venv.folder / "bin/python").unlink()
    (venv.folder / "bin/python").symlink_to("/usr/bin/python2.5")
    venv.make()
    assert not venv.marked
    subprocess.run([venv.folder / "bin/python", "-c", "import pip"], check=True)


def test_one_that_was_moved_is_made_anew(machine: Machine) -> None:
    machine.make(".venv/.ready")
    (machine.checkout / ".venv/mark").touch()
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("elsewhere"))
    machine.make(".venv/.ready")
    assert not (machine.checkout / ".venv/mark").exists()


def test_one_that_is_whole_is_kept(machine: Machine, venv: Venv) -> None:
    venv.make()
    venv.mark()
    machine.asked()
    venv.make()
    assert venv.marked
    if venv.folder.name == ".venv":
        assert not machine.asked()
    os.utime(machine.checkout / "constraints.txt", times=(time.time() + 5, time.time() + 5))
    venv.make()
    assert venv.marked
    assert any("-c constraints.txt" in line for line in machine.asked())
    assert venv.ready


def test_one_whose_update_failed_is_made_anew(machine: Machine, venv: Venv) -> None:
    venv.make()
    venv.mark()
    os.utime(machine.checkout / "constraints.txt", times=(time.time() + 5, time.time() + 5))
    machine.set("offline")
    venv.make(fails=True)
    assert not venv.ready
    machine.set()
    venv.make()
    assert not venv.marked


def test_a_folder_that_make_did_not_make_is_left(venv: Venv) -> None:
    venv.folder.mkdir(parents=True)
    (venv.folder / "pyvenv.cfg").touch()
    assert f"== {venv.folder.name}" in venv.make(fails=True).replace(f"{venv.folder.parent}/", "")
    assert [path.name for path in venv.folder.iterdir()] == ["pyvenv.cfg"]


@pytest.mark.parametrize(
    ("versions", "nvidia", "asked", "said"),
    [
        ("2.13.0+cpu, 2.13.0", "", "torch", r"0\.\d GB .*CPU build"),
        ("2.13.0", "", "torch", r"3\.\d GB .*CUDA"),
        ("2.12.1+cpu, 2.13.0", "", "torch", r"3\.\d GB .*CUDA"),
        ("2.13.0+cpu, 2.13.0", "/dev/nvidia0", "torch!=2.13.0+cpu", r"3\.\d GB .*CUDA"),
    ],
)
def test_which_torch(machine: Machine, versions: str, nvidia: str, asked: str, said: str) -> None:
    """pip is asked for any torch where there is no GPU, and takes +cpu if it knows one: that sorts higher."""
    machine.versions(versions)
    lines = machine.make(".venv/.ready", f"NVIDIA={nvidia}").splitlines()
    sizes = [line for line in lines if re.match(r"== .*\d GB", line)]
    assert len(sizes) == 1
    assert re.search(said, sizes[0])
    assert f" {asked} setuptools" in machine.asked()[0]


@pytest.mark.parametrize(("state", "said"), [("old", "no Python 3.11 or newer"), ("bare", "python3-venv")])
def test_a_python_that_does_not_do(machine: Machine, venv: Venv, state: str, said: str) -> None:
    machine.set(state)
    words = venv.make(fails=True)
    assert said in words
    assert "Traceback" not in words
    assert not venv.folder.exists()
    machine.set()
    assert "no Python 3.11 or newer" in machine.make(*venv.arguments, "PYTHON=python3.absent", fails=True)
