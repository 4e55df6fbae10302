"""How fast do records come to a GPU in batches, and one by one?

Records of k8v4 of SmolLM2, such of a model with 8 KV heads of head_dim 128, and its of int8: some at a time
from anywhere in pinned host memory to anywhere in GPU memory, by one cuMemcpyBatchAsync as the daemon fetches
them, until they are there. The baseline is a cuMemcpyAsync for each. Medians.

What bounds the result: their bytes over the rate of one large copy, measured in the same run. Needs a GPU;
nobody has seen its figures: it has no goal. Batches that are large or scattered crashed some drivers, so a
child measures them, and says before each what it is about to try.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from harness import CALLS, Result, in_child, main, milliseconds, say

from spilld.cuda_ext.compile.build import BuildError
from spilld.cuda_ext.device.base import Copy, Stream
from spilld.cuda_ext.device.cuda import CudaDevice
from spilld.cuda_ext.errors import DeviceError
from spilld.offload.record import Element, Format, Layout
from spilld.offload.system import PAGE, page_aligned

BENCH = "gpu_copies"
LAYOUTS = tuple(
    Layout(form, Element.BFLOAT16, heads, dim)
    for form, heads, dim in ((Format.K8V4, 3, 64), (Format.K8V4, 8, 128), (Format.INT8, 8, 128))
)
COUNTS = (16, 128, 400)

Case = tuple[int, int]
"""Bytes of a record, and how many are copied."""


def in_a_batch(device: CudaDevice, copies: list[Copy]) -> None:
    device.copy(Stream.COPY_IN, copies)
    device.record(Stream.COPY_IN).synchronise()


def one_by_one(device: CudaDevice, copies: list[Copy]) -> None:
    stream = device._streams[Stream.COPY_IN]
    for copy in copies:
        device.driver("cuMemcpyAsync", copy.to, copy.source, copy.nbytes, stream)
    device.record(Stream.COPY_IN).synchronise()


WAYS: Mapping[str, Callable[[CudaDevice, list[Copy]], None]] = {
    "batch": in_a_batch,
    "one by one": one_by_one,
}


def measured(
    device: CudaDevice, counts: tuple[int, ...] = COUNTS, calls: int = CALLS
) -> dict[str, dict[Case, float]]:
    """Milliseconds by way, and of "whole" one large copy of as many bytes as the largest case has."""
    draw, places = np.random.default_rng(0), 2 * max(counts)
    nbytes = -(-places * max(layout.record_bytes for layout in LAYOUTS) // PAGE) * PAGE
    memory = page_aligned(nbytes)
    memory[:] = draw.integers(256, size=nbytes, dtype=np.uint8)
    host, pool = memory.ctypes.data, device.allocate(nbytes)
    device.register(host, nbytes)
    try:
        whole = milliseconds(partial(in_a_batch, device, [Copy(pool, host, nbytes)]), calls)
        found: dict[str, dict[Case, float]] = {"whole": {(nbytes, 1): whole}, **{way: {} for way in WAYS}}
        for size in (layout.record_bytes for layout in LAYOUTS):
            for count in counts:
                to, sources = (size * draw.permutation(places)[:count] for _ in range(2))
                copies = [Copy(pool + int(a), host + int(b), size) for a, b in zip(to, sources, strict=True)]
                for way, work in WAYS.items():
                    say(f"{count} records of {size} bytes, {way}")
                    found[way][size, count] = milliseconds(partial(work, device, copies), calls)
        return found
    finally:
        device.unregister(host)
        device.free(pool)


def ours() -> dict[str, dict[Case, float]]:
    device = CudaDevice()
    try:
        return measured(device)
    finally:
        device.close()


def results(found: dict[str, dict[Case, float]]) -> tuple[dict[str, float], list[Result]]:
    (((nbytes, _), whole_ms),) = found["whole"].items()
    rate = 1e3 * nbytes / whole_ms
    return {"fetch_bytes_s": rate}, [
        Result(
            bench=BENCH,
            metric="fetch records",
            case=f"{count} x {size / 1e3:.0f} KB",
            unit="ms",
            ours=ms,
            baseline=found["one by one"][size, count],
            limit=1e3 * size * count / rate,
        )
        for (size, count), ms in found["batch"].items()
    ]


if __name__ == "__main__":
    try:
        CudaDevice().close()
    except (BuildError, DeviceError) as error:
        sys.exit(f"no GPU to measure: {error}")
    main(__doc__ or "", lambda: results(in_child(ours)))
