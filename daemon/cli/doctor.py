"""spilld doctor: what this machine has that spilld can use, how fast it is, and what to change."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spilld.config.config import Config
from spilld.cuda_ext.compile.build import (
    ARCHITECTURES,
    BuildError,
    DriverMissing,
    cubin,
    find_driver,
)
from spilld.cuda_ext.compile.variant import rotate
from spilld.cuda_ext.device.base import Copy, Device, Stream
from spilld.cuda_ext.device.cuda import CudaDevice
from spilld.cuda_ext.errors import DeviceError
from spilld.cuda_ext.transfer_costs import Rates, to_fetch
from spilld.errors import ModelError
from spilld.models.catalog import parameters
from spilld.offload.record import Element
from spilld.offload.system import (
    SystemCalls,
    page_aligned,
    read_fully,
    write_fully,
)
from spilld.runner.placement import Placement, place

MIB, GIB = 1 << 20, 1 << 30
COPIED, READ = 256 * MIB, 128 * MIB
"""Bytes that the rates of memory and PCIe, and of the disk, are measured with."""
PIECE = 4 * MIB
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Finding(NamedTuple):
    """One fact about this machine."""

    what: str
    found: str
    advice: str = ""
    """What to change; empty where nothing is."""
    bytes_s: float = 0.0
    """The measured rate, where that decides how the tiers are used."""


def examine(config: Config) -> Iterator[Finding]:
    """Yield findings one after another, as they are found: measuring takes seconds.

    What decides the speed comes first, what concerns only a GPU last.
    """
    gpu_found = list(gpu(CudaDevice)) if gpu_matters(config) else [Finding("GPU", "none: the CPU computes")]
    yield (host := memory(len(os.sched_getaffinity(0))))
    *_, stored = disk(config.state)
    yield stored
    yield choices(host.bytes_s, stored.bytes_s, gpu_found[-1].bytes_s)
    yield huge_pages(HUGE_PAGES.read_text() if HUGE_PAGES.exists() else "")
    yield weights(config, place(config))
    yield from gpu_found
    if gpu_matters(config):
        yield compiler()
        yield locked_memory(config.host_budget, resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])


def gpu_matters(config: Config) -> bool:
    """Whether there is an NVIDIA driver, or a GPU is configured."""
    try:
        find_driver()
    except DriverMissing:
        return config.device == "cuda"
    return True


def choices(host: float, disk: float, link: float) -> Finding:
    """Estimate what the measured rates mean for KV outside the window, at best.

    Args:
        host: Rate of copies in memory, in bytes/s, read and written ones together; attention only reads.
        disk: Rate of reads from disk, in bytes/s; 0 if there is none.
        link: Rate from host memory to the GPU, in bytes/s; 0 if there is none.
    """
    what = "KV outside the window"
    found = f"each token reads it: {1e3 * GIB / host:.0f} ms for each GiB in host memory"
    if link:
        fetched = to_fetch(100, MIB, Rates(link, 0.0, host, 0.0), 100)
        found += f" (the GPU fetches {fetched} % of it, the CPU attends to the rest)"
    if not disk:
        return Finding(what, found)
    advice = f"what lies on disk costs {host / disk:.0f} times as much: give host_budget what can be spared"
    return Finding(
        what, f"{found}, {1e3 * GIB / disk:.0f} ms for each on disk", advice if host > 2 * disk else ""
    )


def compiler() -> Finding:
    """Find out whether kernels can be compiled here, by compiling one for each architecture."""
    try:
        with tempfile.TemporaryDirectory(prefix="spilld-doctor-") as cache:
            for architecture in ARCHITECTURES:
                cubin(rotate(64), architecture, Path(cache))
    except BuildError as error:
        return Finding("kernels", "cannot be compiled", str(error))
    return Finding("kernels", f"can be compiled for {', '.join(ARCHITECTURES)}")


def gpu(find: Callable[[], Device[Any]]) -> Iterator[Finding]:
    """Yield the GPU's name, and the rates between it and host memory."""
    try:
        device = find()
    except (BuildError, DeviceError) as error:
        yield Finding("GPU", "none that spilld can use: the CPU computes", str(error))
        return
    try:
        yield Finding("GPU", device.name)
        to, back = copy_rates(device)
        yield Finding("host to GPU and back", f"{_rate(to)}, {_rate(back)}", bytes_s=to)
    except DeviceError as error:
        yield Finding("host to GPU and back", "not measured", str(error))
    finally:
        device.close()


def copy_rates(device: Device[Any]) -> tuple[float, float]:
    """Measure copies from registered host memory to the device, and back.

    Returns:
        Bytes a second in each direction, of the second of two rounds.
    """
    host = page_aligned(COPIED)
    host[:] = 1
    here, there = host.ctypes.data, device.allocate(COPIED)
    device.register(here, COPIED)
    seconds = []
    for _ in range(2):
        for stream, to, source in ((Stream.COPY_IN, there, here), (Stream.COPY_OUT, here, there)):
            began = time.perf_counter()
            device.copy(stream, [Copy(to + at, source + at, PIECE) for at in range(0, COPIED, PIECE)])
            device.record(stream).synchronise()
            seconds.append(time.perf_counter() - began)
    device.unregister(here)
    device.free(there)
    return COPIED / seconds[2], COPIED / seconds[3]


def weights(config: Config, placement: Placement) -> Finding:
    """Say where the weights are, and on a GPU how much of its memory they take."""
    if placement.device == "cpu":
        return Finding("weights", "in host memory: the CPU multiplies", placement.missing)
    size = Element(config.dtype).nbytes
    try:
        count = parameters(config.model)
    except ModelError as error:
        return Finding("weights", "on the GPU", str(error))
    taken = f"{size} bytes a parameter" if count is None else _size(size * count)
    return Finding(
        "weights", f"on the GPU: {taken} of its memory, and what a step takes, beside device_budget"
    )


def locked_memory(host_budget: int, limit: int) -> Finding:
    """Say whether the host budget may be locked in memory.

    Args:
        host_budget: The budget, in bytes.
        limit: How much memory a process may lock, in bytes; -1 for no limit.
    """
    if limit == resource.RLIM_INFINITY or limit >= host_budget:
        return Finding("locked memory", "host_budget may be pinned")
    advice = "for a GPU: LimitMEMLOCK=infinity in the unit, or ulimit -l unlimited in the shell"
    return Finding(
        "locked memory", f"{_size(limit)} may be pinned, host_budget is {_size(host_budget)}", advice
    )


def huge_pages(enabled: str) -> Finding:
    """Say whether huge pages are on.

    Args:
        enabled: What the kernel says, such as "always [madvise] never".
    """
    if "[always]" in enabled or "[madvise]" in enabled:
        return Finding("huge pages", "on")
    return Finding("huge pages", "off", f"as root: echo madvise > {HUGE_PAGES}")


def memory(threads: int) -> Finding:
    """Measure copies between parts of memory that are larger than caches, with so many threads."""
    source, target = np.ones((threads, COPIED), np.uint8), np.zeros((threads, COPIED), np.uint8)
    with ThreadPoolExecutor(threads) as pool:
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            list(pool.map(np.copyto, target, source))
            seconds.append(time.perf_counter() - began)
    rate = 2 * threads * COPIED / min(seconds)  # each byte is read and written
    return Finding("memory", f"{_rate(rate)} read and written, {threads} threads", bytes_s=rate)


def disk(state: Path) -> Iterator[Finding]:
    """Measure the file system of the state folder, or of the nearest existing folder above it."""
    folder = next(path for path in (state, *state.parents) if path.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="spilld-doctor-") as name:
            yield _measure(Path(name, "file"), folder)
    except OSError as error:
        yield Finding("disk", f"{folder}: {error.strerror}", "name a folder that can be written with `state`")


def _measure(path: Path, folder: Path) -> Finding:
    """Write a file and read it twice; the second time counts.

    On some disks the first read of new data is slower.
    """
    system, buffer = SystemCalls(), page_aligned(PIECE)
    buffer[:] = np.random.default_rng().integers(0, 256, PIECE, np.uint8)  # random: disks may compress
    advice, direct = "", os.O_DIRECT
    try:
        file = system.open(path, os.O_RDWR | os.O_CREAT | direct)
    except OSError:
        advice, direct = "no O_DIRECT there, and the page cache answers: another file system helps", 0
        file = system.open(path, os.O_RDWR | os.O_CREAT)
    try:
        began = time.perf_counter()
        for at in range(0, READ, PIECE):
            write_fully(system, file, buffer, at)
        system.fdatasync(file)
        wrote = time.perf_counter() - began
        for _ in range(2):
            began = time.perf_counter()
            for at in range(0, READ, PIECE):
                read_fully(system, file, buffer, at)
            read = time.perf_counter() - began
    finally:
        system.close(file)
    found = f"{folder}: {_rate(READ / read)} read, {_rate(READ / wrote)} written"
    return Finding("disk", found + (", O_DIRECT" if direct else ""), advice, READ / read)


def _rate(bytes_s: float) -> str:
    return f"{bytes_s / 1e9:.2f} GB/s"


def _size(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f} MiB"
