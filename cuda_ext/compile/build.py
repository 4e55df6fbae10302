"""Compiles kernels to CUBIN with NVRTC, through cuda.core: without a toolkit, a GPU or a driver.

NVRTC and cuda.core come with the extra `cuda`. A CUBIN lies in a folder under a name made of what it was
compiled from. One that came with spilld is used beside any NVRTC, or none; its folder says which compiled it.
The cache has a folder for each version, so that what an older one compiled, perhaps wrongly, goes with it.
"""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .variant import KERNELS, Variant

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SHIPPED = Path(__file__).parents[1] / "cubins"
"""What `make cubins` compiled before the wheel was made; it need not be there."""
COMPILER = "nvrtc-version"
"""The file in it that says by which NVRTC."""
OPTIONS = ("c++17",)
"""What kernels are compiled with, beside their constants."""

INSTALL = "pip install 'spilld[cuda]' brings it"
NO_DRIVER = 'there is no NVIDIA driver (libcuda.so.1) on this machine: install it, or take device = "cpu"'


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
    return path_of(variant, architecture, cache).read_bytes()


def path_of(variant: Variant, architecture: str, cache: Path) -> Path:
    """The file that has it. Raises as cubin."""
    shipped = SHIPPED / name_of(variant, architecture)
    return shipped if shipped.exists() else compiled(variant, architecture, cache / f"nvrtc-{compiler()}")


def compiled(variant: Variant, architecture: str, folder: Path) -> Path:
    """Its file in this folder of one compiler's, compiled unless it is there already. Raises as cubin."""
    path = folder / name_of(variant, architecture)
    if not path.exists():
        code = _compile(variant, architecture)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(code)
        Path(file.name).replace(path)
    return path


def name_of(variant: Variant, architecture: str) -> str:
    """The name of the file that the machine code lies in."""
    return f"{variant.name}-{architecture}-{recipe(variant, architecture)}.cubin"


def recipe(variant: Variant, architecture: str) -> str:
    """A name for what is compiled, and how: sources, constants, architecture and options."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (architecture, *OPTIONS, repr(variant)):
        digest.update(part.encode() + b"\0")
    for path in (variant.source, *sorted(KERNELS.glob("*.cuh"))):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def compiler() -> str:
    """The version of NVRTC. Raises CompilerMissing."""
    try:
        return version("nvidia-cuda-nvrtc")
    except PackageNotFoundError:
        raise CompilerMissing(f"NVRTC, NVIDIA's run-time compiler, is not installed: {INSTALL}") from None


def find_driver() -> None:
    """Raises DriverMissing. Takes nothing of the extra `cuda`, which is of no use without a driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverMissing(NO_DRIVER) from error


def check_driver() -> None:
    """Raises DriverMissing, DriverTooOld and, where there are no kernels at all, CompilerMissing."""
    needed, present = max(map(_major, _compilers())), _driver_version()
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


def _compilers() -> list[str]:
    """The versions of NVRTC whose machine code may be loaded: of what came with spilld, and the one here."""
    note = SHIPPED / COMPILER
    shipped = [note.read_text().strip()] if note.exists() else []
    try:
        return [*shipped, compiler()]
    except CompilerMissing:
        if not shipped:
            raise
        return shipped


def _major(release: str) -> int:
    return int(release.partition(".")[0])


def _driver_version() -> int:
    """As the driver counts: 13020 is CUDA 13.2."""
    try:
        from cuda.bindings import driver
        from cuda.pathfinder import DynamicLibNotFoundError
    except ImportError as error:
        raise CompilerMissing(f"cuda.bindings, which loads kernels, is not installed: {INSTALL}") from error
    try:
        status, number = driver.cuDriverGetVersion()
    except DynamicLibNotFoundError as error:
        raise DriverMissing(NO_DRIVER) from error
    if int(status) != 0:
        raise DriverMissing(f"the NVIDIA driver does not answer: {status.name}")
    return int(number)
