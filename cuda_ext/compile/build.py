"""Compiles kernels to CUBIN with NVRTC, through cuda.core: without a toolkit, a GPU or a driver.

NVRTC and cuda.core come with the extra `cuda`. A CUBIN lies in a folder under a name derived from what it was
compiled from. A CUBIN that was shipped with spilld is used whether or not NVRTC is installed; a file in its
folder says which version compiled it. The cache has a folder for each version of NVRTC, so that CUBINs of an
older version, perhaps compiled wrongly, are not used after an update.
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
"""Kernels that `make cubins` compiled before the wheel was made; the folder need not exist."""
COMPILER = "nvrtc-version"
"""The file in that folder with the version of the NVRTC that compiled them."""
OPTIONS = ("c++17",)
"""Compiler options, beside the constants of a kernel."""

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
    """Return the machine code of a kernel, compiling it if it is not there yet.

    Args:
        variant: The kernel and its constants.
        architecture: For example sm_90.
        cache: The folder for compiled kernels. On any error it is unchanged.

    Raises:
        CompilerMissing: It has to be compiled, and there is no NVRTC.
        KernelRejected: NVRTC does not compile it.
    """
    return path_of(variant, architecture, cache).read_bytes()


def path_of(variant: Variant, architecture: str, cache: Path) -> Path:
    """Return the file that holds a kernel's machine code, compiling it if it is not there yet.

    Raises:
        CompilerMissing: It has to be compiled, and there is no NVRTC.
        KernelRejected: NVRTC does not compile it.
    """
    shipped = SHIPPED / name_of(variant, architecture)
    return shipped if shipped.exists() else compiled(variant, architecture, cache / f"nvrtc-{compiler()}")


def compiled(variant: Variant, architecture: str, folder: Path) -> Path:
    """Return a kernel's file in the folder of one NVRTC version, compiling it if it is not there yet.

    Raises:
        CompilerMissing: It has to be compiled, and there is no NVRTC.
        KernelRejected: NVRTC does not compile it.
    """
    path = folder / name_of(variant, architecture)
    if not path.exists():
        code = _compile(variant, architecture)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(code)
        Path(file.name).replace(path)
    return path


def name_of(variant: Variant, architecture: str) -> str:
    """Return the name of the file that holds a kernel's machine code."""
    return f"{variant.name}-{architecture}-{recipe(variant, architecture)}.cubin"


def recipe(variant: Variant, architecture: str) -> str:
    """Return a digest of all that goes into the machine code: sources, constants, architecture, options."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (architecture, *OPTIONS, repr(variant)):
        digest.update(part.encode() + b"\0")
    for path in (variant.source, *sorted(KERNELS.glob("*.cuh"))):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def compiler() -> str:
    """Return the version of NVRTC.

    Raises:
        CompilerMissing: There is no NVRTC.
    """
    try:
        return version("nvidia-cuda-nvrtc")
    except PackageNotFoundError:
        raise CompilerMissing(f"NVRTC, NVIDIA's run-time compiler, is not installed: {INSTALL}") from None


def find_driver() -> None:
    """Check that the NVIDIA driver can be loaded, without packages of the extra `cuda`.

    Raises:
        DriverMissing: There is no NVIDIA driver.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverMissing(NO_DRIVER) from error


def check_driver() -> None:
    """Check that the driver is new enough for the kernels.

    Raises:
        DriverMissing: There is no NVIDIA driver, or it does not answer.
        DriverTooOld: It is of an older CUDA than the NVRTC that compiled the kernels.
        CompilerMissing: There is no NVRTC and no shipped kernel, or cuda.bindings is missing.
    """
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
    """List the NVRTC versions whose machine code may be loaded: of shipped kernels, and the installed one."""
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
    """Return the CUDA version of the driver as it counts: 13020 is CUDA 13.2."""
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
