"""Compiles libcuda.so.1, with the compiler that the package ziglang brings."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from ..emulator.compiler import FLAGS, zig

SOURCE = Path(__file__).with_name("libcuda.cpp")
NAME = "libcuda.so.1"


def compile_driver(cache: Path) -> Path:
    """The folder that has it: what LD_LIBRARY_PATH must name. Raises Unavailable and CalledProcessError."""
    target = cache / f"driver-{hashlib.blake2b(SOURCE.read_bytes(), digest_size=16).hexdigest()}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as name:
            folder = Path(name, "driver")
            folder.mkdir()
            compiled = str(Path(name, "driver.o"))
            zig(cache / "zig", "c++", *FLAGS, "-O1", "-c", str(SOURCE), "-o", compiled)
            link = ("-shared", "-Bsymbolic", "-soname", NAME, compiled, "-o", str(folder / NAME))
            zig(cache / "zig", "ld.lld", *link)
            folder.rename(target)
    return target
