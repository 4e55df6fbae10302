"""The systemd units, read by systemd's own tools, and what `make install` does with them."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from spilld.config.config import Config

ROOT = Path(__file__).parents[2]
SYSTEMD = ROOT / "systemd"
UNITS = ("spilld.service", "spilld-user.service")

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze here to read the units"
)


def service(name: str) -> configparser.SectionProxy:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((SYSTEMD / name).read_text())
    return unit["Service"]


def analyze(*arguments: str | Path, runtime: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XDG_RUNTIME_DIR": str(runtime)},
    )


@pytest.mark.parametrize("name", UNITS)
def test_units_fit_the_daemon(name: str) -> None:
    unit, defaults = service(name), Config()
    assert unit["Type"] == "notify"
    assert unit["ExecStart"].split()[1] == "serve"
    assert float(unit["TimeoutStopSec"]) > defaults.drain_seconds
    assert 60 * float(unit["WatchdogSec"].removesuffix("min")) > 2 * defaults.read_deadline_s
    assert ("--config" in unit["ExecStart"]) == ("ExecReload" in unit), (
        "without a file, SIGHUP ends the daemon"
    )
    assert unit["RestrictAddressFamilies"].split() == ["AF_UNIX", "AF_INET", "AF_INET6"]
    assert int(unit["LimitNOFILE"]) >= 4 * defaults.max_connections
    assert unit["StateDirectoryMode"] == unit["CacheDirectoryMode"] == "0700"


def test_only_the_system_unit_is_open_to_a_group() -> None:
    """Its group is one of its own, and the folder of the socket lets it pass."""
    system, user = map(service, UNITS)
    assert system["ExecStart"].endswith(" --open-to-group true")
    assert (system["User"], system["Group"], system["RuntimeDirectoryMode"]) == ("spilld", "spilld", "0750")
    assert user["RuntimeDirectoryMode"] == "0700"
    assert "open-to-group" not in user["ExecStart"]


@needs_analyze
@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_no_fault(tmp_path: Path, name: str) -> None:
    text = (SYSTEMD / name).read_text()
    (tmp_path / name).write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.M))
    user = ["--user"] if "user" in name else []
    verified = analyze("verify", *user, tmp_path / name, runtime=tmp_path)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


@needs_analyze
def test_exposure(tmp_path: Path) -> None:
    """2.0 at the most, and what is left out is what a GPU and a compiler need."""
    command = ("security", "--offline=true", "--json=short", SYSTEMD / "spilld.service")
    judged = analyze(*command, "--threshold=20", runtime=tmp_path)
    if "unrecognized option" in judged.stderr:
        pytest.skip("this systemd-analyze cannot judge a file")
    assert judged.returncode == 0, judged.stdout
    assert analyze(*command, "--threshold=1", runtime=tmp_path).returncode != 0, "it does judge"
    exposed = {finding["json_field"] for finding in json.loads(judged.stdout) if finding["exposure"]}
    assert {"MemoryDenyWriteExecute", "PrivateDevices", "ProcSubset"} < exposed


def test_the_gpu_may_be_opened() -> None:
    unit = service("spilld.service")
    assert (unit["DevicePolicy"], unit["DeviceAllow"]) == ("closed", "char-nvidia* rw")
    assert "PrivateDevices" not in unit


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="no systemd-sysusers here")
def test_the_user_and_its_group_are_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    command = ["systemd-sysusers", f"--root={tmp_path}", str(SYSTEMD / "spilld.sysusers")]
    subprocess.run(command, check=True, capture_output=True)
    user, *_ = [line for line in (tmp_path / "etc/passwd").read_text().splitlines() if "spilld" in line]
    name, _, _, gid, _, home, shell = user.split(":")
    assert (name, home) == ("spilld", "/var/lib/spilld")
    assert shell.endswith("nologin")
    assert f"spilld:x:{gid}:" in (tmp_path / "etc/group").read_text()


def make(*arguments: str) -> str:
    command = ["make", "--no-print-directory", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
class TestInstall:
    """Without the venv, which takes minutes and is `make install-venv`."""

    def test_into_a_folder_and_out_again(self, tmp_path: Path) -> None:
        make("install-files", f"DESTDIR={tmp_path}")
        config = tmp_path / "etc/spilld.toml"
        assert files(tmp_path) == [
            "etc/spilld.toml",
            "usr/local/bin/spilld",
            "usr/local/lib/systemd/system/spilld.service",
            "usr/local/lib/systemd/user/spilld.service",
            "usr/local/lib/sysusers.d/spilld.conf",
        ]
        assert (tmp_path / "usr/local/bin/spilld").readlink() == Path("/opt/spilld/bin/spilld")
        assert config.read_text() == (SYSTEMD / "spilld.toml").read_text()
        unit = (tmp_path / "usr/local/lib/systemd/system/spilld.service").read_text()
        assert unit == (SYSTEMD / "spilld.service").read_text()
        config.write_text("max_queue = 3\n")
        make("install-files", f"DESTDIR={tmp_path}")
        assert config.read_text() == "max_queue = 3\n", "a configuration that is there is kept"
        (tmp_path / "opt/spilld").mkdir(parents=True)
        (tmp_path / "opt/spilld/precious").touch()
        make("uninstall", f"DESTDIR={tmp_path}")
        assert files(tmp_path) == ["etc/spilld.toml", "opt/spilld/precious"], "that was no venv of ours"
        (tmp_path / "opt/spilld/pyvenv.cfg").touch()
        make("uninstall", f"DESTDIR={tmp_path}")
        assert files(tmp_path) == ["etc/spilld.toml"]

    @needs_analyze
    def test_units_name_what_was_installed(self, tmp_path: Path) -> None:
        """As they lie there systemd finds no fault with them, the command included."""
        places = {"prefix": "opt", "bindir": "bin", "libdir": "lib", "sysconfdir": "etc"}
        (tmp_path / "opt/bin").mkdir(parents=True)
        (tmp_path / "opt/bin/spilld").symlink_to("/bin/true")
        make("install-files", *(f"{name}={tmp_path}/{place}" for name, place in places.items()))
        for kind, options in (("system", ()), ("user", ("--user",))):
            unit = tmp_path / "lib/systemd" / kind / "spilld.service"
            assert f"ExecStart={tmp_path}/opt/bin/spilld serve" in unit.read_text()
            verified = analyze("verify", *options, unit, runtime=tmp_path)
            assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
        system = (tmp_path / "lib/systemd/system/spilld.service").read_text()
        assert f"--config {tmp_path}/etc/spilld.toml " in system

    def test_a_venv_is_not_made_to_be_moved(self, tmp_path: Path) -> None:
        command = ["make", "-C", str(ROOT), "install", f"DESTDIR={tmp_path}"]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode != 0
        assert "a venv cannot be moved" in refused.stdout
        assert files(tmp_path) == []
