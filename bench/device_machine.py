"""What this machine is: its GPU and its versions of what spilld uses. Exit status 3: there is no GPU."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from device_check import NO_GPU

PACKAGES = (
    *("torch", "transformers", "tokenizers", "numpy", "numba", "llvmlite", "cuda-core", "cuda-bindings"),
    *("nvidia-cuda-nvrtc", "pyzmq", "msgpack", "safetensors", "xxhash", "gguf", "pytest", "pytest-timeout"),
    *("hypothesis", "ziglang"),
)
ASKED = (
    *("name", "driver_version", "compute_cap", "memory.total", "memory.used", "utilization.gpu"),
    *("power.limit", "power.max_limit", "power.draw", "temperature.gpu", "pstate", "clocks.sm"),
    *("clocks.max.sm", "clocks.max.mem", "pcie.link.gen.max", "pcie.link.width.max", "ecc.mode.current"),
)
SMI_S = 15


def package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def show_host() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line for line in lines if line.startswith("model name")), "").partition(": ")[2]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    print(f"{model}, {len(os.sched_getaffinity(0))} cores, {memory} GiB, {platform.release()}")
    print(f"locked memory: {'no limit' if locked == resource.RLIM_INFINITY else f'{locked >> 10} KiB'}")
    print(f"Python {platform.python_version()}, {sys.executable}")
    for name in PACKAGES:
        print(f"{name} {package(name)}")


def show_smi() -> None:
    """What nvidia-smi says, if it is there and answers."""
    for options in ((f"--query-gpu={','.join(ASKED)}", "--format=csv"), ("topo", "-m")):
        try:
            done = subprocess.run(
                ["nvidia-smi", *options], capture_output=True, text=True, timeout=SMI_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"nvidia-smi: {error}")
            return
        print(done.stdout, done.stderr)


def gpu() -> str:
    """In a line. Raises BuildError and DeviceError."""
    from spilld.cuda_ext.device.cuda import CudaDevice

    device = CudaDevice()
    try:
        free, total = device.driver("cuMemGetInfo")
        number = int(device.driver("cuDriverGetVersion"))
        cuda = f"{number // 1000}.{number % 1000 // 10}"
        memory = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free, pages of {device.page_bytes}"
        return f"{device.name}, {device.architecture}, driver of CUDA {cuda}, {memory}"
    finally:
        device.close()


def main() -> int:
    show_host()
    show_smi()
    from spilld.cuda_ext.compile.build import BuildError
    from spilld.cuda_ext.errors import DeviceError

    try:
        print(f"== {gpu()}")
    except (BuildError, DeviceError) as error:
        print(f"== {error}")
        return NO_GPU
    return 0


if __name__ == "__main__":
    sys.exit(main())
