"""What the benchmarks share: one result record, child processes, interleaved repeats, measured limits.

Run a benchmark as `python bench/bench_x.py [--json]`: a table, or JSON lines, the first of which is
{"environment": {...}} and every other one a Result with exactly the fields of Result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal, ParamSpec, TypeVar
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from spilld.offload.system import (
    SystemCalls,
    page_aligned,
    read_fully,
    write_fully,
)

P = ParamSpec("P")
T = TypeVar("T")

REPEATS = int(os.environ.get("REPEATS", "3"))
"""Turns of each contender, whose medians count; from the environment, to hold for `make bench`, too."""

TRIES = 5
"""A limit is the best of so many tries: what the machine can do, not what it did on average."""

CALLS = 15
"""Of which the median counts, where one takes milliseconds."""

READ_BYTES = 1 << 20
FILE_BYTES = 512 << 20
GEMM_SIZE = 2048
MEMORY_BYTES = 512 << 20
TABLE_WIDTH = 170

_progress = Console(stderr=True, style="dim")


@dataclass(frozen=True)
class Goal:
    """A bound on what is ours, or on its ratio to the baseline."""

    of: Literal["ours", "ratio"]
    at_most: float


@dataclass(kw_only=True)
class Result:
    """One number. limit is the best that the hardware or the model allows, in the same unit, as measured in
    the same run; None where nothing of the kind bounds it. ratio is ours / baseline, met whether the goal is.

    Raises ValueError for a goal on a ratio without a baseline.
    """

    bench: str
    metric: str
    case: str
    unit: str
    ours: float
    baseline: float | None = None
    ratio: float | None = field(init=False, default=None)
    limit: float | None = None
    goal: Goal | None = None
    met: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.baseline is not None:
            self.ratio = self.ours / self.baseline
        if self.goal is not None:
            judged = self.ours if self.goal.of == "ours" else self.ratio
            if judged is None:
                raise ValueError(f"{self.metric} has a goal for its ratio and no baseline")
            self.met = judged <= self.goal.at_most


def main(question: str, measure: Callable[[], tuple[Mapping[str, float], Sequence[Result]]]) -> None:
    """A benchmark's command line. question: its docstring; measure: returns (limits, results)."""
    as_json = command_line(question).parse_args().json
    started = environment()
    limits, results = measure()
    report(as_json, {**started, "limits": dict(limits)}, results)


def command_line(question: str) -> argparse.ArgumentParser:
    """What every benchmark takes."""
    parser = argparse.ArgumentParser(description=question.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    return parser


def report(as_json: bool, stamp: Mapping[str, object], results: Sequence[Result]) -> None:
    """Print the results. stamp: the environment they were measured in."""
    stamp = {**stamp, "load_after": os.getloadavg()[0]}
    if as_json:
        for line in ({"environment": stamp}, *map(asdict, results)):
            print(json.dumps(line))
    else:
        show(results[0].bench, results)
        Console().print(json.dumps(stamp), style="dim", highlight=False)


def environment() -> dict[str, object]:
    """Where and when: memory in bytes, load of the last minute."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _proc_field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory": int(_proc_field("/proc/meminfo", "MemTotal").split()[0]) * 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numba", "transformers", "numpy", "spilld")},
        "load_before": os.getloadavg()[0],
    }


def say(what: str) -> None:
    """Progress, on stderr."""
    _progress.print(what, markup=False, highlight=False)


def in_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What the function returns in a fresh process; it and its arguments must pickle.

    Raises the exception that the function raised, or EOFError if the process died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_call, args=(sender, function, args, kwargs))
    child.start()
    sender.close()  # so that the child's end is the only one, and its death is seen
    try:
        result, error = receiver.recv()
    finally:
        receiver.close()
        child.join()
    if error is not None:
        raise error
    value: T = result
    return value


def in_our_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """in_child, torch's threads waiting as they do in the daemon."""
    with mock.patch.dict(os.environ, OMP_WAIT_POLICY="passive"):
        return in_child(function, *args, **kwargs)


def _call(
    sender: Connection, function: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> None:
    try:
        sender.send((function(*args, **kwargs), None))
    except Exception as error:  # noqa: BLE001 (it is raised again in the parent)
        sender.send((None, error))


def milliseconds(run: Callable[[], object], calls: int = CALLS) -> float:
    """Of one call, the median of some after two that warm up."""
    times = []
    for _ in range(calls + 2):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times[2:])


def medians(
    contenders: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int = REPEATS
) -> dict[str, dict[str, float]]:
    """Per contender, the median of each of its numbers. They take turns, so that a slow spell of the machine
    meets all of them."""
    seen: dict[str, list[Mapping[str, float]]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name, run in contenders.items():
            numbers = run()
            seen[name].append(numbers)
            shown = ", ".join(f"{metric} {number:.4g}" for metric, number in numbers.items())
            say(f"{repeat + 1}/{repeats} {name}: {shown}")
    return {
        name: {metric: statistics.median(run[metric] for run in runs) for metric in runs[0]}
        for name, runs in seen.items()
    }


def document(folder: Path, tokens: int) -> list[int]:
    """The first tokens of Python's own documentation, for the tokenizer in a model folder."""
    from spilld.tokenizer.tokenizer import Tokenizer

    found = Tokenizer.load(folder).encode("".join(topics[name] for name in sorted(topics)))
    if len(found) < tokens:
        raise ValueError(f"the text has {len(found)} tokens, not {tokens}")
    return found[:tokens]


# Limits. Call those that use torch in a child.


def disk_rates(
    threads: Sequence[int] = (1, 2, 4), read_bytes: int = READ_BYTES, file_bytes: int = FILE_BYTES
) -> dict[int, float]:
    """Bytes/s of O_DIRECT reads in order, by number of threads, each with its stretch of one temporary file.

    The file was read once before: the first read of fresh blocks can be several times slower.
    Raises OSError where the file system has no O_DIRECT.
    """
    system = SystemCalls()
    with tempfile.TemporaryDirectory(prefix="spilld-bench-") as folder:
        path = Path(folder) / "file"
        file = system.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        try:
            data = page_aligned(READ_BYTES)
            data[:] = np.random.default_rng(0).integers(256, size=len(data))  # zeros need not be stored
            for offset in range(0, file_bytes, len(data)):
                write_fully(system, file, data, offset)
            system.fdatasync(file)
            _read(system, file, 1, read_bytes, file_bytes)
            return {
                count: max(_read(system, file, count, read_bytes, file_bytes) for _ in range(TRIES))
                for count in threads
            }
        finally:
            system.close(file)


def _read(system: SystemCalls, file: int, threads: int, read_bytes: int, file_bytes: int) -> float:
    reads = file_bytes // read_bytes // threads
    start = threading.Barrier(threads + 1)

    def stretch(number: int) -> None:
        buffer = page_aligned(read_bytes)
        buffer[:] = 0
        start.wait()
        for i in range(number * reads, (number + 1) * reads):
            read_fully(system, file, buffer, i * read_bytes)

    with ThreadPoolExecutor(threads) as pool:
        pending = [pool.submit(stretch, number) for number in range(threads)]
        start.wait()
        began = time.perf_counter()
        for future in pending:
            future.result()
        return threads * reads * read_bytes / (time.perf_counter() - began)


def memory_rate() -> float:
    """Bytes/s at which all threads together read memory, far more of it than the caches hold."""
    import torch

    numbers = torch.ones(MEMORY_BYTES // 4)
    return numbers.nbytes / _best(numbers.sum)


def gemm_rate(dtype: str) -> float:
    """FLOP/s of a square linear layer of all threads in "float32" or "bfloat16"."""
    import torch

    a, b = (torch.rand(GEMM_SIZE, GEMM_SIZE).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * GEMM_SIZE**3 / _best(lambda: torch.nn.functional.linear(a, b))


def int8_gemm_rate() -> float:
    """Operations/s of the same layer, 8-bit numbers in and out."""
    import torch

    scale = 0.1  # any: the work is the same
    warnings.filterwarnings("ignore", message=".*quantized tensor creation.*")
    torch.backends.quantized.engine = "onednn"
    a, b = (
        torch.quantize_per_tensor(torch.randn(GEMM_SIZE, GEMM_SIZE), scale, 0, dtype)
        for dtype in (torch.quint8, torch.qint8)
    )
    packed = torch.ops.quantized.linear_prepack(b, None)
    return 2 * GEMM_SIZE**3 / _best(lambda: torch.ops.quantized.linear(a, packed, scale, 0))


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest try, after one that warms up."""
    times = []
    for _ in range(TRIES + 1):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _proc_field(path: str, name: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(name))


def show(title: str, results: Sequence[Result]) -> None:
    """A table."""
    table = Table("metric", "case", "unit", "ours", "baseline", "ratio", "limit", "goal", "met")
    table.title = title
    for result in results:
        numbers = (result.ours, result.baseline, result.ratio, result.limit)
        goal = f"{result.goal.of} <= {result.goal.at_most:.4g}" if result.goal else ""
        met = {None: "", True: "yes", False: "NO"}[result.met]
        table.add_row(result.metric, result.case, result.unit, *map(_number, numbers), goal, met)
    for column in table.columns:
        column.no_wrap = True
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)  # a pipe would be taken for 80 columns
    console.print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
