"""Compiles what tests and benchmarks launch on a GPU, in as many processes as there are cores, not one after
another: `python -m tests.cuda_ext.compile_matrix`.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product, repeat
from pathlib import Path

from spilld.cli.cubins import kernels
from spilld.cuda_ext.compile import build
from spilld.cuda_ext.compile.variant import Variant
from spilld.cuda_ext.device.cuda import CudaDevice
from spilld.cuda_ext.errors import DeviceError
from spilld.models.catalog import default_cache
from spilld.offload.record import SEALED, Element, Layout

from .cases import cases

WITHOUT_GPU = "sm_90"
SHAPES = ((Element.FLOAT32, 1, 64), (Element.BFLOAT16, 2, 64), (Element.BFLOAT16, 8, 128))
"""Of the tiny models of the engine's tests, and of bench/gpu.py."""


def variants() -> list[Variant]:
    layouts = [Layout(form, *shape) for shape, form in product(SHAPES, SEALED)]
    return list(
        dict.fromkeys([*(case.variant for case in cases()), *(x for y in layouts for x in kernels(y))])
    )


def architecture() -> str:
    try:
        device = CudaDevice()
    except (DeviceError, build.BuildError):
        return WITHOUT_GPU
    device.close()
    return device.architecture


def compile_one(made: Variant, architecture: str, cache: Path) -> None:
    build.cubin(made, architecture, cache)


def main() -> None:
    began, made, target = time.monotonic(), variants(), architecture()
    processes = len(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")  # this one may have called the driver
    with ProcessPoolExecutor(processes, spawn) as pool:
        list(pool.map(compile_one, made, repeat(target), repeat(default_cache() / "cubins"), chunksize=2))
    seconds = time.monotonic() - began
    print(f"== {len(made)} kernels for {target} in {seconds:.0f} s by {processes} processes")


if __name__ == "__main__":
    main()
