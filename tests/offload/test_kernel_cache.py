"""Processes that compile at the same time: nobody gets another's machine code."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from numba.core.caching import IndexDataCacheFile

import spilld.offload.threads  # noqa: F401 (it guards the cache)


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
