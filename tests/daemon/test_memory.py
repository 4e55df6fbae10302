"""What is left of memory, from files as the kernel writes them; and an engine that has too little."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from spilld.engine import upkeep
from spilld.models.model import Model
from spilld.monitoring.memory import MemoryWatch, available_bytes
from spilld.offload.host.slab import HostSlab

from .harness import Harness, engine, said, shared, smallest_host_budget, some_tokens

MIB = 1 << 20


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


MACHINE = {
    "meminfo": "MemTotal:       2048 kB\nMemFree:  1 kB\nMemAvailable:   1000 kB\nHugePages_Total: 0\n"
}


@pytest.mark.parametrize(
    ("groups", "left"),
    [
        ({}, 1024000),
        ({"a/memory.max": "max\n", "a/memory.current": "5000\n"}, 1024000),
        ({"a/memory.max": "9000\n", "a/memory.current": "5000\n"}, 4000),
        (
            {
                "a/memory.max": "9000\n",
                "a/memory.current": "5000\n",
                "a/memory.stat": "anon 1\ninactive_file 600\n",
            },
            4600,
        ),
        ({"a/memory.max": "9000\n", "a/memory.current": "9500\n"}, 0),
        ({"memory.max": "7000\n", "memory.current": "6500\n", "a/memory.max": "max"}, 500),
        ({"memory/b/memory.limit_in_bytes": "8000\n", "memory/b/memory.usage_in_bytes": "1000\n"}, 7000),
    ],
)
def test_the_least_that_anybody_leaves(tmp_path: Path, groups: dict[str, str], left: int) -> None:
    proc = tree(tmp_path / "proc", MACHINE | {"self/cgroup": "4:memory:/b\n2:cpu,cpuacct:/\n0::/a\n"})
    assert available_bytes(proc, tree(tmp_path / "groups", groups)) == left


def test_a_kernel_that_says_nothing(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) is None
    watch = MemoryWatch(10**12, lambda: None)
    watch.look()
    assert not watch.short


def test_this_machine_has_some_left() -> None:
    left = available_bytes()
    assert left is not None
    assert MIB < left < 1 << 50


def test_both_changes_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    left = [50, 20, 10, 70, 80]
    watch = MemoryWatch(30, lambda: left.pop(0))
    seen = []
    with caplog.at_level("INFO"):
        while left:
            watch.look()
            seen.append(watch.short)
    assert seen == [False, True, True, False, False]
    assert len(caplog.records) == 2


def resident_bytes(memory: NDArray[np.uint8]) -> int:
    """Of this array alone: whatever else the process does."""
    pages = (ctypes.c_ubyte * (memory.nbytes // mmap.PAGESIZE))()
    length = ctypes.c_size_t(len(pages) * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(memory.ctypes.data), length, pages) == 0
    return mmap.PAGESIZE * sum(page & 1 for page in pages)


def test_free_rows_give_their_memory_back_and_others_keep_it() -> None:
    slab = HostSlab(64 * MIB, [8000 * 64])
    rows = slab.allocate(slab.n_columns)
    slab.memory[:] = 7
    assert resident_bytes(slab.memory) > 60 * MIB
    slab.free(rows[:, ::2])
    slab.give_back()
    assert resident_bytes(slab.memory) < 36 * MIB
    assert (slab.records[0][rows[0, 1::2]] == 7).all()
    slab.free(rows[:, 1::2])
    slab.give_back()
    assert resident_bytes(slab.memory) == 0
    again = slab.allocate(3)
    slab.records[0][again[0]] = 9
    slab.give_back()
    assert (slab.records[0][again[0]] == 9).all()
    assert np.count_nonzero(slab.memory) == 3 * slab.column_bytes
    slab.check_integrity()


class Kernel:
    """Says what is left."""

    def __init__(self, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(upkeep, "TICK_S", 0.0)
        self.left = 1 << 40
        harness.engine._capacity.memory = MemoryWatch(MIB, lambda: self.left)


def test_nothing_is_admitted_beside_what_runs(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(model, tmp_path / "s", disk_budget=0) as harness:
        kernel = Kernel(harness, monkeypatch)
        kernel.left = 0
        for name in "ab":
            harness.add(name, some_tokens(1, 300), max_tokens=6, ignore_eos=True)
        while said(harness, "a") < 6:
            assert harness.engine.turn()
            assert harness.engine.stats()["requests_running"] == int(said(harness, "a") < 6)
        harness.run()
        assert harness.tokens("a") == harness.tokens("b"), "one that is alone runs all the same"


def test_who_does_not_read_holds_up_nobody(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(model, tmp_path / "s", disk_budget=0) as harness:
        harness.add("slow", some_tokens(1, 300), max_tokens=30, ignore_eos=True, ahead=8)
        while harness.engine.turn():
            pass
        Kernel(harness, monkeypatch).left = 0
        assert len(harness.ask(some_tokens(2, 300), "other", max_tokens=6, ignore_eos=True)) == 6
        assert said(harness, "slow") < 30


def test_what_lies_in_host_memory_goes_to_disk(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 4 * smallest_host_budget(model)
    prompt = some_tokens(1, 2500)
    with engine(model, tmp_path / "s", host_budget=budget, disk_budget="64MiB") as harness:
        kernel = Kernel(harness, monkeypatch)
        harness.add("r", prompt, max_tokens=60, ignore_eos=True)
        while said(harness, "r") < 5:
            harness.engine.turn()
        used = int(str(harness.engine.stats()["host_used_bytes"]))
        kernel.left = 0
        while said(harness, "r") < 40:
            harness.engine.turn()
        stats = harness.engine.stats()
        assert int(str(stats["host_used_bytes"])) < used / 2
        assert stats["memory_short"] == 1
        kernel.left = 1 << 40
        harness.run()
        found = harness.tokens("r")
        assert harness.engine.stats()["memory_short"] == 0
    with engine(model, tmp_path / "t") as harness:
        assert found == harness.ask(prompt, max_tokens=60, ignore_eos=True)


def test_idle_contexts_are_given_up(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(model, tmp_path / "s", disk_budget="64MiB") as harness:
        kernel = Kernel(harness, monkeypatch)
        for number in range(3):
            harness.ask(some_tokens(number, 300), session=str(number), max_tokens=2, ignore_eos=True)
        assert harness.engine.stats()["contexts_idle"] == 3
        kernel.left = 0
        harness.engine.turn()
        assert harness.engine.stats()["contexts_idle"] == 2
        harness.run()
        assert len(harness.ask([5], "more", session="0", max_tokens=2, ignore_eos=True)) == 2
