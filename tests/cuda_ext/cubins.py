"""What is in a CUBIN, as NVIDIA's own tools read it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import nvidia

from spilld.cuda_ext.compile import build
from spilld.cuda_ext.compile.variant import KERNELS

RESOURCES = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")


def tool(name: str) -> Path:
    """A program of the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    (path,) = (path for folder in nvidia.__path__ for path in Path(folder).glob(f"*/bin/{name}"))
    return path


def resources(cubin: Path) -> dict[str, int]:
    """Registers, bytes of stack, of static shared memory and of local memory of its one kernel."""
    words = _run("cuobjdump", "-res-usage", cubin)
    (found,) = RESOURCES.findall(words)
    return dict(zip(("registers", "stack", "shared", "local"), map(int, found[1:]), strict=True))


def instructions(cubin: Path) -> Counter[str]:
    """How often each opcode stands in its code, with modifiers: LDGSTS.E.BYPASS.128."""
    return Counter(INSTRUCTION.findall(disassembly(cubin)))


def disassembly(cubin: Path) -> str:
    return _run("nvdisasm", "-c", cubin)


def _run(program: str, option: str, cubin: Path) -> str:
    command = [str(tool(program)), option, str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compiled(source: Path, architecture: str) -> bytes:
    """A test's own kernels, as build.py compiles spilld's."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(arch=architecture, std=build.OPTIONS[0], include_path=str(KERNELS))
    code: bytes = Program(source.read_text(), "c++", options).compile("cubin").code
    return code
