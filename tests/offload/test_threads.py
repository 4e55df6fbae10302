"""Threads that share a kernel's units: each runs once, whoever calls and however many threads there are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numba import njit

from spilld.offload.kernels import threads
from spilld.offload.kernels.threads import check, spreading

MORE_THREADS = 4
HUGE = 1 << 60


@njit(nogil=True)
def _unit(number: Any, factor: Any, room: Any, out: Any) -> None:
    scratch = np.empty(room[number], np.uint8)
    out[number] += factor * (len(scratch) + number)


_spread = spreading(lambda: _unit)


@njit(nogil=True)
def loop(factor: Any, room: Any, out: Any) -> Any:
    return _spread(len(out), factor, room, out)


def _scaled(by: int) -> Any:
    @njit(nogil=True)
    def unit(number: Any, out: Any) -> None:
        out[number] = by * number

    return unit


_spread_scaled = spreading(_scaled, literals=1)
THREE = 3


@njit(nogil=True)
def scaled_loop(out: Any) -> Any:
    return _spread_scaled(len(out), THREE, out)


@pytest.fixture(params=[1, 2, MORE_THREADS])
def shared_by(request: pytest.FixtureRequest) -> Iterator[int]:
    threads.use(request.param)
    yield request.param
    threads.use(1)


@pytest.mark.parametrize("units", [0, 1, 2, 3, 100])
def test_each_unit_runs_once(units: int, shared_by: int) -> None:
    assert threads.used() == shared_by
    room = np.ones(units, np.int64)
    for factor in range(200):
        out = np.zeros(units, np.int64)
        assert loop(factor, room, out) == 0
        np.testing.assert_array_equal(out, factor * np.arange(1, units + 1))


def test_callers_at_the_same_time(shared_by: int) -> None:
    room = np.ones(17, np.int64)

    def caller(factor: int) -> bool:
        found = []
        for _ in range(2000):
            out = np.zeros(17, np.int64)
            loop(factor, room, out)
            found.append(bool((out == factor * np.arange(1, 18)).all()))
        return all(found)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(caller, range(1, 4)))


def test_units_without_memory_are_counted(shared_by: int) -> None:
    room = np.array([1, HUGE, 1, HUGE, HUGE, 1], np.int64)
    out = np.zeros(6, np.int64)
    failed = loop(1, room, out)
    assert failed == 3
    np.testing.assert_array_equal(out, [1, 0, 3, 0, 0, 6])
    with pytest.raises(MemoryError, match="3 parts"):
        check(failed)
    assert loop(1, np.ones(6, np.int64), out) == 0, "the next loop starts anew"


def test_numbers_choose_the_unit(shared_by: int) -> None:
    out = np.zeros(5, np.int64)
    scaled_loop(out)
    np.testing.assert_array_equal(out, 3 * np.arange(5))


def test_threads_without_work_sleep() -> None:
    threads.use(MORE_THREADS)
    loop(1, np.ones(100, np.int64), np.zeros(100, np.int64))
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    threads.use(1)
    assert time.process_time() - before < 0.25, "a thread that spins would take half a second"


def test_a_loop_needs_a_thread() -> None:
    with pytest.raises(ValueError, match="0 threads"):
        threads.use(0)
