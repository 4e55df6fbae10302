"""What ends a start at once: before torch is imported, and with what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spilld.__main__ import main
from spilld.cli.preflight import check
from spilld.config.config import Config
from spilld.monitoring.memory import physical_bytes
from spilld.offload.size import size

SCRIPT = """
import sys
from spilld.__main__ import main
status = main(sys.argv[1:])
assert "torch" not in sys.modules and "numba" not in sys.modules, "too late"
sys.exit(status)
"""


def refusal(tmp_path: Path, *options: str) -> str:
    """What `serve` says last, in a process that has not imported torch when it ends."""
    places = (f"--state={tmp_path}/state", f"--cache={tmp_path}/cache", f"--listen=ipc://{tmp_path}/s")
    command = [sys.executable, "-c", SCRIPT, "serve", *places, *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


def test_more_host_memory_than_there_is(tmp_path: Path) -> None:
    has = physical_bytes()
    assert has is not None
    assert refusal(tmp_path, "--host-budget=900T") == (
        f"spilld: host_budget is 900 TiB, this machine has {size(has)} of memory: lower it"
    )


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    known = "known names are smollm2-135m, gemma3-270m; a .gguf file or a folder"
    for name in ("gpt-17", f"{tmp_path}/none.gguf"):
        assert refusal(tmp_path, f"--model={name}").startswith(f"spilld: there is no model '{name}': {known}")
    assert refusal(tmp_path, f"--model={tmp_path}") == f"spilld: {tmp_path} has no config.json"


def test_a_gpu_without_a_driver(tmp_path: Path) -> None:
    """Before what the device is to have of the configuration and of packages."""
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver here")
    assert refusal(tmp_path, "--device=cuda") == (
        'spilld: device = "cuda": there is no NVIDIA driver (libcuda.so.1) on this machine: install it, or '
        'take device = "cpu"'
    )


def test_an_address_of_no_form_is_told_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--address=foo", "--wait=0"]) == 1
    assert capsys.readouterr().err.strip().endswith("an address is ipc:///path or tcp://host:port")


def test_help_names_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "A known name (smollm2-135m, gemma3-270m), a .gguf file, or a Hugging Face folder" in said


def test_a_larger_disk_budget_than_the_disk_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check(Config(state=tmp_path / "not" / "there", disk_budget=900 << 40))
    (said,) = caplog.messages
    assert said.startswith(f"disk_budget is 900 TiB, the file system of {tmp_path}/not/there has ")
    caplog.clear()
    check(Config(state=tmp_path, disk_budget=1 << 20, disk_floor=0))
    (tmp_path / "kv").mkdir()
    with (tmp_path / "kv" / "00000001.segment").open("wb") as file:
        file.truncate(2 << 40)
    check(Config(state=tmp_path, disk_budget=2 << 40))
    assert not caplog.messages, "what is stored has its room"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (512 << 20, "512 MiB"),
        (11089920, "10.6 MiB"),
        (1023 << 30, "1023 GiB"),
        (900 << 40, "900 TiB"),
    ],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_what_is_needed_at_the_least_is_rounded_up() -> None:
    assert size((10 << 20) + 1, least=True) == "10.1 MiB"
    assert size(10 << 20, least=True) == "10 MiB"
