"""Does a decode step take longer by the bytes of its KV and by nothing else, from 2,048 to 65,536 tokens?

SmolLM2-135M, format k8v4, all KV in host memory, one sequence: the median of some steps at each length, all
in one process, medians of 3 such processes. K and V are what lies in memory: the prompt is not computed, and
positions go far beyond what the model was trained for. A line through the times over the bytes of records is
fitted by least squares of the relative errors; the goal is that no length is more than 15 % off it.

What bounds a step: the packed weights and the records over the memory's read rate, or the records' FLOPs over
the rate of a float32 GEMM where that takes longer, measured in the same run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from bench_kernels import model
from harness import Goal, Result, gemm_rate, in_child, in_our_child, main, medians, memory_rate, milliseconds
from numpy.typing import NDArray
from steps import Steps, in_host
from work import Work

from spilld.assembly import use_threads
from spilld.demo.demo import MODEL
from spilld.models.catalog import default_cache, resolve
from spilld.offload.record import Element, Format

Floats = NDArray[np.float64]

BENCH = "length"
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
SPARE = 64
OFF = 15.0
"""Percent."""


def steps_ms() -> dict[str, float]:
    """Milliseconds of a decode step by length."""
    use_threads(None)
    found = model()
    tokens = LENGTHS[-1] + SPARE
    steps = Steps(found, in_host(found, Format.K8V4, Element.BFLOAT16, tokens), tokens, 1)
    steps.feed([1] * tokens)
    times = {}
    for length in LENGTHS:
        steps.skip(length - steps.computed)
        times[str(length)] = milliseconds(lambda: steps.step(1, range(1)))
    return times


def off_line(nbytes: Floats, times: Floats) -> Floats:
    """Percent by which each time exceeds a + b * nbytes, for the a and b that make these percents least."""
    matrix = np.stack([np.ones_like(nbytes), nbytes], axis=1) / times[:, None]
    fit, *_ = np.linalg.lstsq(matrix, np.ones_like(times), rcond=None)
    percent: Floats = 100 * (1 / (matrix @ fit) - 1)
    return percent


def measure() -> tuple[dict[str, float], list[Result]]:
    folder = resolve(MODEL, default_cache(), Element.BFLOAT16)
    limits = {"memory_bytes_s": in_child(memory_rate), "float32_flops": in_child(gemm_rate, "float32")}
    found = medians({"ours": lambda: in_our_child(steps_ms)})["ours"]
    return limits, results(folder, found, limits)


def results(folder: Path, found: Mapping[str, float], limits: Mapping[str, float]) -> list[Result]:
    works = {length: Work.of(folder, length) for length in LENGTHS}
    rows = [
        Result(
            bench=BENCH,
            metric="decode",
            case=f"{length} tokens, {work.record_bytes / 1e6:.0f} MB of records",
            unit="ms/token",
            ours=found[str(length)],
            limit=work.decode_ms(limits),
        )
        for length, work in works.items()
    ]
    nbytes = np.array([float(work.record_bytes) for work in works.values()])
    off = off_line(nbytes, np.array([found[str(length)] for length in LENGTHS]))
    worst = LENGTHS[int(np.abs(off).argmax())]
    rows.append(
        Result(
            bench=BENCH,
            metric="off a line",
            case=f"most, at {worst} tokens",
            unit="%",
            ours=float(np.abs(off).max()),
            goal=Goal("ours", OFF),
        )
    )
    return rows


if __name__ == "__main__":
    main(__doc__ or "", measure)
