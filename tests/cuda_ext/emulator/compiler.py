"""Compiles a kernel file for the CPU, with the compiler that the package ziglang brings."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from spilld.cuda_ext.compile.variant import KERNELS

HERE = Path(__file__).parent
MACHINE = ("machine.cpp", "detector.cpp")
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\(\w+\)\s+)?(\w+)\(")

# Accesses stay as wide as the source has them, and no operation is fused with another.
FLAGS = (
    *("-std=c++17", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-sanitize=undefined", "-ffp-contract=off"),
    *("-mcpu=baseline", "-fno-vectorize", "-fno-slp-vectorize", "-Wall", "-Wno-unused-function"),
)

# Of these sanitizers only the calls are wanted: detector.cpp answers them.
KERNEL_FLAGS = (
    *("-O1", "-fsanitize=thread", "-fsanitize=array-bounds", "-fsanitize=shift-exponent"),
    "-fstrict-flex-arrays=3",  # or the last array of a struct could have any size
)
MACHINE_FLAGS = ("-O2",)


class Unavailable(Exception):
    """The emulator cannot run on this machine; the message says why."""


def compile_kernel(source: Path, defines: Mapping[str, int | str], cache: Path) -> Path:
    """A shared library of the kernels in source and of the emulator; compiled once for what it is made of.

    Raises Unavailable without ziglang or on another CPU than x86-64, and CalledProcessError with the
    compiler's words if it refuses the source.
    """
    if platform.machine() != "x86_64":
        raise Unavailable(f"the emulator switches fibers in x86-64 assembly; this is {platform.machine()}")
    try:
        compiler = version("ziglang")
    except PackageNotFoundError:
        raise Unavailable("the emulator is compiled by the package ziglang, which is not installed") from None
    options = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    recipe = [compiler, *FLAGS, *KERNEL_FLAGS, *MACHINE_FLAGS, *options]
    recipe += [path.read_text() for path in _parts(source)]
    target = (
        cache
        / f"{source.stem}-{hashlib.blake2b(chr(0).join(recipe).encode(), digest_size=16).hexdigest()}.so"
    )
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _build(source, options, Path(folder), cache / "zig").replace(target)
    return target


def _parts(source: Path) -> list[Path]:
    """Every file that may end up in the library."""
    return [
        source,
        *sorted(source.parent.glob("*.cuh")),
        *sorted(HERE.glob("*.h")),
        *(HERE / name for name in MACHINE),
    ]


def _build(source: Path, options: list[str], folder: Path, zig_cache: Path) -> Path:
    entries = "".join(f"EMULATOR_ENTRY({name})\n" for name in KERNEL.findall(source.read_text()))
    unit = folder / "unit.cpp"
    unit.write_text(f'#include "cuda.h"\n#include "{source}"\n{entries}')
    unit_object = ["-c", str(unit), "-o", str(folder / "unit.o")]
    zig(zig_cache, "c++", *FLAGS, *KERNEL_FLAGS, f"-I{HERE}", f"-I{KERNELS}", *options, *unit_object)
    for name in MACHINE:
        zig(zig_cache, "c++", *FLAGS, *MACHINE_FLAGS, "-c", str(HERE / name), "-o", str(folder / f"{name}.o"))
    library = folder / "library.so"
    objects = [str(folder / f"{name}.o") for name in ("unit", *MACHINE)]
    # The linker alone: the compiler's driver would first build a run-time library for a minute.
    zig(zig_cache, "ld.lld", "-shared", "-Bsymbolic", *objects, "-o", str(library))
    return library


def zig(cache: Path, *arguments: str) -> None:
    folders = {"ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "ziglang", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | folders)
