"""The system unit under a real systemd: process 1 of its own namespaces, over this machine's files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import spilld
from spilld import cuda_ext, offload

from .tiny_models import build

ROOT = Path(__file__).parents[2]
SOCKET = "ipc:///run/spilld/spilld.sock"
START_S = 300.0
"""Kernels are compiled, as at every first start."""

WATCHDOG_S = 10


def cgroups() -> Path | None:
    """Where cgroups of version 2 are mounted."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return next((Path(folder) for _, folder, kind, *_ in mounts if kind == "cgroup2"), None)


def missing() -> str:
    """Why no systemd can be booted here; empty if one can."""
    if os.geteuid() != 0:
        return "only root can boot a systemd here"
    needed = ("unshare", "nsenter", "setpriv", "systemd-sysusers", "make")
    if lacking := [tool for tool in needed if shutil.which(tool) is None]:
        return f"{lacking[0]} is not installed"
    if not Path("/lib/systemd/systemd").exists():
        return "systemd is not installed"
    if cgroups() is None:
        return "no cgroups of version 2 here"
    allowed = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, check=False)
    return "" if allowed.returncode == 0 else "this machine allows no namespaces"


NAMESPACES = ("--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--net", "--uts", "--ipc")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


class Machine:
    """A booted one."""

    def __init__(self, init: int) -> None:
        self._init = init

    def run(self, *command: str, check: bool = True) -> str:
        """What a command says there."""
        done = subprocess.run(
            ["nsenter", f"--target={self._init}", "--all", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def show(self, name: str) -> str:
        return self.run("systemctl", "show", "spilld", f"--property={name}", "--value", check=False).strip()

    def until(self, name: str, value: str, seconds: float) -> None:
        give_up = time.monotonic() + seconds
        while (found := self.show(name)) != value:
            assert time.monotonic() < give_up, f"{name} is {found}; {self.log()}"
            assert found != "failed", self.log()
            time.sleep(0.2)

    def spilld(self, *arguments: str, group: str = "spilld", check: bool = True) -> str:
        """What a command says to somebody who is in that group."""
        who = ("setpriv", "--reuid=nobody", f"--regid={group}", "--clear-groups", "--")
        return self.run(*who, "spilld", *arguments, "--address", SOCKET, "--wait=5", check=check)

    def log(self) -> str:
        return self.run("journalctl", "--unit=spilld", "--no-pager", "--output=cat", check=False)


def staged(folder: Path) -> None:
    """What `make install` puts on a machine, a model, and settings."""
    root, venv = folder / "root", folder / "venv"
    for file in build("llama", root / "srv/model").iterdir():
        file.chmod(0o644)
    (root / "etc/systemd/system/spilld.service.d").mkdir(parents=True)
    (root / "etc/systemd/system/spilld.service.d/test.conf").write_text(
        f"[Service]\nWatchdogSec={WATCHDOG_S}\n"
    )
    settings = 'model = "/srv/model"\ndtype = "float32"\nthreads = 1\ndisk_budget = "64MiB"\ndisk_floor = 0\n'
    (root / "etc/spilld.toml").write_text(settings)
    make = ["make", "--no-print-directory", "-C", str(ROOT), "install-files", f"DESTDIR={root}"]
    subprocess.run(make, check=True, capture_output=True)
    packages = venv / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages/spilld"
    for package, place in ((spilld, "."), (offload, "offload"), (cuda_ext, "cuda_ext")):
        source = Path(str(package.__file__)).parent
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, packages / place, ignore=ignored, dirs_exist_ok=True)
    (venv / "bin").mkdir()
    command = venv / "bin/spilld"
    command.write_text(
        "#!/opt/spilld/bin/python\nfrom spilld.__main__ import main\nraise SystemExit(main())\n"
    )
    command.chmod(0o755)


@contextmanager
def booted(folder: Path) -> Iterator[Machine]:
    parent = cgroups()
    assert parent is not None
    group = parent / f"spilld-boot-{os.getpid()}"
    group.mkdir()
    boot = str(Path(__file__).with_name("boot.sh"))
    within = f'echo $$ > {group}/cgroup.procs; exec unshare {" ".join(NAMESPACES)} sh {boot} "$0" "$@"'
    with (folder / "console").open("wb") as console:
        command = ["sh", "-c", within, str(folder), sys.prefix, sys.base_prefix]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
    try:
        yield Machine(_init(process, folder / "console"))
    finally:
        process.kill()
        process.wait()
        _remove(group)


def _init(process: subprocess.Popen[bytes], console: Path) -> int:
    """The systemd that a shell has become."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    give_up = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < give_up:
        for child in children.read_text().split():
            if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                return int(child)
        time.sleep(0.1)
    raise AssertionError(f"systemd did not boot: {console.read_text()}")


def _remove(group: Path) -> None:
    give_up = time.monotonic() + 10
    while group.exists() and time.monotonic() < give_up:
        for folder in sorted(group.rglob("*/"), reverse=True):
            with suppress(OSError):
                folder.rmdir()
        with suppress(OSError):
            group.rmdir()
        time.sleep(0.05)


def test_the_unit_runs(tmp_path: Path) -> None:
    """From the first start to the last stop, within everything that hardens it."""
    staged(tmp_path)
    with booted(tmp_path) as machine:
        machine.until("ActiveState", "active", START_S)
        assert machine.show("StatusText") == "serving"
        assert machine.run("stat", "--format=%A %U %G", "/run/spilld", "/run/spilld/spilld.sock").split("\n")[
            :2
        ] == [
            "drwxr-x--- spilld spilld",
            "srw-rw---- spilld spilld",
        ]
        assert "requests_running" in machine.spilld("stats", "--json")
        assert "no daemon answered" in machine.spilld("stats", group="nogroup", check=False)
        machine.spilld("ask", "--max-tokens=5", "/etc/hostname", "What is it?")

        main = machine.show("MainPID")
        machine.run("sed", "-i", "1i max_queue = 3", "/etc/spilld.toml")
        machine.run("systemctl", "reload", "spilld")
        give_up = time.monotonic() + 10
        while "max_queue is 3 now" not in machine.log():
            assert time.monotonic() < give_up, machine.log()
            time.sleep(0.1)
        assert (machine.show("ActiveState"), machine.show("MainPID")) == ("active", main)

        time.sleep(1.5 * WATCHDOG_S)
        assert machine.show("NRestarts") == "0", "to have nothing to do is not to hang"
        machine.run("kill", f"-{signal.SIGSTOP.value}", main)
        machine.until("NRestarts", "1", 4 * WATCHDOG_S)
        machine.until("ActiveState", "active", START_S)
        assert "Watchdog timeout" in machine.log()

        served_with_keys(machine)
        machine.run("systemctl", "stop", "spilld")
        assert (machine.show("ActiveState"), machine.show("Result")) == ("inactive", "success"), machine.log()


def served_with_keys(machine: Machine) -> None:
    """As systemd/README.md has it: root makes the keys, and the daemon, not root, may only read them."""
    machine.run("spilld", "keys")
    machine.run("spilld", "keys", "--client", "laptop")
    made = machine.run("find", "/etc/spilld", "-printf", "%M %u %g %P\n").splitlines()
    assert sorted(made) == [
        "-rw------- spilld spilld keys/clients.toml",
        "-rw------- spilld spilld keys/laptop.key",
        "-rw------- spilld spilld keys/server.key",
        "drwx------ spilld spilld ",
        "drwx------ spilld spilld keys",
    ]
    settings = r'1i keys = "/etc/spilld/keys"\nlisten = "tcp://0.0.0.0:5757"'
    machine.run("sed", "-i", settings, "/etc/spilld.toml")
    machine.run("systemctl", "restart", "spilld", check=False)
    assert machine.show("ActiveState") == "active", machine.log()
    at = ("--address", "tcp://127.0.0.1:5757", "--wait=5")
    stats = machine.run("spilld", "stats", "--json", *at, "--keys", "/etc/spilld/keys/laptop.key")
    assert "requests_running" in stats
    assert "requests_running" not in machine.run("spilld", "stats", "--json", *at, check=False), "no key"
    main = machine.show("MainPID")
    inside = ("nsenter", f"--target={main}", "--mount", "touch", "/etc/spilld/keys/clients.toml")
    assert "Read-only file system" in machine.run(*inside, check=False)
