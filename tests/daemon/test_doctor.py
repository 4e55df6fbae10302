"""What spilld doctor finds, and what it says to change."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

import pytest

from spilld.__main__ import main
from spilld.cli import doctor
from spilld.cuda_ext.compile.build import DriverMissing, DriverTooOld
from spilld.cuda_ext.device.cpu import CpuDevice
from spilld.cuda_ext.errors import OutOfMemory


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "COPIED", 8 << 20)
    monkeypatch.setattr(doctor, "READ", 8 << 20)


def rates(found: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+) GB/s", found)]


def test_kernels_are_compiled_before_it_says_that_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    assert doctor.compiler().advice == ""
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    finding = doctor.compiler()
    assert finding.found == "cannot be compiled"
    assert "spilld[cuda]" in finding.advice


def test_without_a_gpu_it_says_what_is_missing() -> None:
    def find() -> CpuDevice:
        raise DriverTooOld("the driver is of CUDA 12.9: update it")

    (finding,) = doctor.gpu(find)
    assert "the CPU computes" in finding.found
    assert finding.advice == "the driver is of CUDA 12.9: update it"


def test_the_link_is_measured_each_way_and_the_device_closed() -> None:
    device = CpuDevice()
    name, link = doctor.gpu(lambda: device)
    assert name == doctor.Finding("GPU", "CPU")
    assert len(rates(link.found)) == 2
    assert min(rates(link.found)) > 0
    with pytest.raises(ValueError, match="begins"):
        device.free(0)


def test_a_device_without_room_is_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: CpuDevice, nbytes: int) -> int:
        raise OutOfMemory("stop other programs")

    monkeypatch.setattr(CpuDevice, "allocate", full)
    _, link = doctor.gpu(CpuDevice)
    assert link == doctor.Finding("host to GPU and back", "not measured", "stop other programs")


def test_locked_memory() -> None:
    for limit in (resource.RLIM_INFINITY, 1 << 30):
        assert doctor.locked_memory(1 << 30, limit).advice == ""
    finding = doctor.locked_memory(1 << 30, 8 << 20)
    assert finding.found == "8.0 MiB may be pinned, host_budget is 1024.0 MiB"
    assert "LimitMEMLOCK" in finding.advice


@pytest.mark.parametrize(
    ("enabled", "on"), [("[always] madvise never", True), ("always [madvise] never", True), ("", False)]
)
def test_huge_pages(enabled: str, on: bool) -> None:
    finding = doctor.huge_pages(enabled)
    assert (finding.found == "on", finding.advice == "") == (on, on)
    assert doctor.huge_pages("always madvise [never]").advice.startswith("as root: echo madvise")


def test_the_disk_is_measured_where_the_state_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finding,) = doctor.disk(tmp_path / "not" / "there")
    assert str(tmp_path) in finding.found
    assert len(rates(finding.found)) == 2
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECTORY)  # which no file can be opened with
    (finding,) = doctor.disk(tmp_path)
    assert "no O_DIRECT there" in finding.advice
    assert len(rates(finding.found)) == 2


def test_a_folder_that_cannot_be_written() -> None:
    (finding,) = doctor.disk(Path("/proc/self"))
    assert "`state`" in finding.advice


def test_what_follows_for_cold_kv() -> None:
    without = doctor.choices(host=20e9, disk=2e9, link=0.0)
    assert without.what == "KV outside the window"
    assert without.found == "each token reads it: 54 ms for each GiB in host memory, 537 ms for each on disk"
    assert "10 times as much" in without.advice
    with_gpu = doctor.choices(host=20e9, disk=0.0, link=60e9)
    assert "the GPU fetches 75 %" in with_gpu.found
    assert with_gpu.advice == ""


def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str) -> list[str]:
    """What each line of the command is about."""
    file = tmp_path / "spilld.toml"
    file.write_text(f'state = "{tmp_path}"\ndevice = "{device}"\n')
    assert main(["doctor", "--config", str(file)]) == 0
    return [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if line[0] != " "]


OF_EVERY_MACHINE = ["memory", "disk", "KV outside the window", "huge pages", "weights"]


def test_the_command_prints_each_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What decides how fast it is first, what only a GPU takes last."""
    found = printed(tmp_path, capsys, "cuda")
    assert found[:5] == OF_EVERY_MACHINE
    assert {"GPU", "kernels", "locked memory"} <= set(found[5:])


def test_without_a_gpu_nothing_is_said_of_what_only_that_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise DriverMissing("there is none")

    monkeypatch.setattr(doctor, "find_driver", missing)
    assert printed(tmp_path, capsys, "cpu") == [*OF_EVERY_MACHINE, "GPU"]
