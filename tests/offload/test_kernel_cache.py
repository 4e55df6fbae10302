"""Processes that compile at the same time: nobody gets another's machine code."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from numba.core.caching import IndexDataCacheFile

from spilld.offload.kernels import kernel_cache
from spilld.offload.kernels.attention import softmax


def in_order(
    cache: Any, loaded: threading.Barrier, before_data: threading.Event, done: threading.Event
) -> None:
    """Let a cache file's `save` read the index when another's does too, and write the code when it may."""
    load_index, save_data = cache._load_index, cache._save_data

    def load() -> Any:
        found = load_index()
        with suppress(threading.BrokenBarrierError):
            loaded.wait(0.5)
        return found

    def save(name: str, data: Any) -> None:
        before_data.wait(0.5)
        save_data(name, data)
        done.set()

    cache._load_index, cache._save_data = load, save


def test_two_that_save_at_once(tmp_path: Path) -> None:
    """numba alone gives both one file: the second in the index, the first in the file."""
    first, second = (IndexDataCacheFile(str(tmp_path), "kernel", "stamp") for _ in range(2))
    loaded, free, second_done = threading.Barrier(2), threading.Event(), threading.Event()
    free.set()
    in_order(first, loaded, before_data=second_done, done=threading.Event())
    in_order(second, loaded, before_data=free, done=second_done)
    threads = [
        threading.Thread(target=cache.save, args=(key, f"code of {key}"))
        for cache, key in ((first, "one"), (second, "two"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = IndexDataCacheFile(str(tmp_path), "kernel", "stamp")
    assert [found.load(key) for key in ("one", "two")] == ["code of one", "code of two"]


def test_a_folder_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = IndexDataCacheFile(str(tmp_path), "kernel", "stamp")
    cache.save("one", "code of one")

    def refuse(*_: object) -> int:
        raise PermissionError("read only")

    monkeypatch.setattr(os, "open", refuse)
    assert cache.load("one") == "code of one"
    assert cache.load("two") is None


KERNEL = """
from numba import njit

@njit(cache=True)
def kernel(x):
    return x + 1
"""

COMPILE = """
import sys
import numba
import spilld.offload.kernels.kernel_cache
from kernel import kernel

print("ready", flush=True)
sys.stdin.readline()
assert kernel(1) == 2
print(*map(sum, (kernel.stats.cache_misses.values(), kernel.stats.cache_hits.values())))
"""


def test_of_two_processes_one_compiles(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", COMPILE],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    missed_and_hit = [process.communicate(timeout=60)[0].split() for process in both]
    assert sorted(missed_and_hit) == [["0", "1"], ["1", "0"]]


TIMES = """
from numba import njit

def times(factor):
    @njit(cache=True)
    def kernel(x):
        return x * factor

    return kernel
"""

NAMES = """
import sys
import spilld.offload.kernels.kernel_cache
from kernel import times

for factor in map(int, sys.argv[1:]):
    kernel = times(factor)
    assert kernel(10) == 10 * factor
    print(*(compiled.fndesc.mangled_name for compiled in kernel.overloads.values()))
"""


def test_what_two_processes_compile_has_two_names(tmp_path: Path) -> None:
    """numba names machine code by counting. What two processes compiled first would have one name, and who
    loads both calls the one for the other."""
    (tmp_path / "kernel.py").write_text(TIMES)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    names = []
    for factors in (["2"], ["3"], ["2", "3"]):
        command = [sys.executable, "-c", NAMES, *factors]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        names += done.stdout.split()
    assert names[:2] == names[2:], "the third compiles nothing"
    assert len(set(names)) == 2


def test_an_update_of_what_is_inlined_is_noticed(tmp_path: Path) -> None:
    _, made_of = softmax.join._cache._cache_file._source_stamp
    assert made_of == kernel_cache.sources(kernel_cache.KERNELS, kernel_cache.CONSTANTS)
    inlined, constants = tmp_path / "room" / "inlined.py", tmp_path / "constants" / "record.py"
    for path in (inlined, constants, tmp_path / "other.txt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    stamps = []
    for edited in (None, inlined, constants, tmp_path / "other.txt"):
        if edited is not None:
            edited.write_text("X = 1")
        kernel_cache.sources.cache_clear()
        stamps.append(kernel_cache.sources(tmp_path / "room", constants))
    assert len(set(stamps)) == 3
    assert stamps[2] == stamps[3], "no kernel has anything of it"
