"""Compiles kernels to CUBIN with NVRTC, through cuda.core: without a toolkit, a GPU or a driver.

NVRTC and cuda.core come with the extra `cuda`. A CUBIN lies in a folder under a name made of everything that
it depends on: in one that came with spilld, or in a cache.
"""

from __future__ import annotations

import hashlib
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .variant import KERNELS, Variant

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SHIPPED = Path(__file__).parent / "cubins"
"""What `make cubins` compiled before the wheel was made; it need not be there."""
OPTIONS = ("c++17",)
"""What kernels are compiled with, beside their constants."""

INSTALL = "pip install 'spilld[cuda]' brings it"


class BuildError(Exception):
    """Kernels cannot be compiled or run on this machine; the message says why and what helps."""


class CompilerMissing(BuildError):
    """There is no NVRTC."""


class DriverMissing(BuildError):
    """There is no NVIDIA driver."""


class DriverTooOld(BuildError):
    """The driver is of an older CUDA than NVRTC: it cannot load what NVRTC makes."""


class KernelRejected(BuildError):
    """The compiler refused a kernel; the message is the compiler's."""


def cubin(variant: Variant, architecture: str, cache: Path) -> bytes:
    """The machine code of a kernel for one architecture, such as sm_90; compiled unless it is there already.

    Raises CompilerMissing and KernelRejected; on any error the cache is as it was.
    """
    name = name_of(variant, architecture)
    for folder in (SHIPPED, cache):
        if (folder / name).exists():
            return (folder / name).read_bytes()
    code = _compile(variant, architecture)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:
        file.write(code)
    Path(file.name).replace(cache / name)
    return code


def name_of(variant: Variant, architecture: str) -> str:
    """The file that the machine code lies in. Raises CompilerMissing."""
    return f"{variant.name}-{architecture}-{recipe(variant, architecture)}.cubin"


def recipe(variant: Variant, architecture: str) -> str:
    """A name for what the machine code depends on: sources, constants, options and compiler."""
    try:
        compiler = version("nvidia-cuda-nvrtc")
    except PackageNotFoundError:
        raise CompilerMissing(f"NVRTC, NVIDIA's run-time compiler, is not installed: {INSTALL}") from None
    digest = hashlib.blake2b(digest_size=16)
    for part in (compiler, architecture, *OPTIONS, repr(variant)):
        digest.update(part.encode() + b"\0")
    for path in (variant.source, *sorted(KERNELS.glob("*.cuh"))):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def check_driver() -> None:
    """Raises DriverMissing and DriverTooOld."""
    needed, present = _compiler_major(), _driver_version()
    if present // 1000 < needed:
        has = f"{present // 1000}.{present % 1000 // 10}"
        raise DriverTooOld(
            f"the NVIDIA driver is of CUDA {has}; kernels need one of CUDA {needed}.0 or newer: update it"
        )


def _compile(variant: Variant, architecture: str) -> bytes:
    try:
        from cuda.core import Program, ProgramOptions
        from cuda.core._utils.cuda_utils import NVRTCError  # it has no public name
        from cuda.pathfinder import DynamicLibNotFoundError
    except ImportError as error:
        raise CompilerMissing(f"cuda.core, which runs NVRTC, is not installed: {INSTALL}") from error
    options = ProgramOptions(
        arch=architecture,
        std=OPTIONS[0],
        include_path=str(KERNELS),
        define_macro=[(name, str(value)) for name, value in variant.defines],
    )
    try:
        code: bytes = Program(variant.source.read_text(), "c++", options).compile("cubin").code
    except DynamicLibNotFoundError as error:
        raise CompilerMissing(f"NVRTC, NVIDIA's run-time compiler, cannot be loaded: {INSTALL}") from error
    except NVRTCError as error:
        raise KernelRejected(f"{variant.name} for {architecture}: {error}") from error
    return code


def _compiler_major() -> int:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompilerMissing(f"cuda.bindings, which runs NVRTC, is not installed: {INSTALL}") from error
    return int(nvrtc.nvrtcVersion()[1])


def _driver_version() -> int:
    """As the driver counts: 13020 is CUDA 13.2."""
    from cuda.bindings import driver
    from cuda.pathfinder import DynamicLibNotFoundError

    try:
        status, number = driver.cuDriverGetVersion()
    except DynamicLibNotFoundError as error:
        raise DriverMissing("there is no NVIDIA driver (libcuda.so.1) on this machine") from error
    if int(status) != 0:
        raise DriverMissing(f"the NVIDIA driver does not answer: {status.name}")
    return int(number)
