"""Compiles the numba kernels that a model needs, once, in a child whose memory leaves with it.

`python -m spilld.daemon.kernels FORMAT ELEMENT HEADS KV_HEADS HEAD_DIM` runs each of them on one block, which
leaves its machine code in numba's cache beside the sources. Without it the first request would wait for the
compiler, and the daemon would keep the compiler's 130 MiB.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
import torch

import spilld.cuda_ext
import spilld.offload
from spilld.cuda_ext.cpu import CpuBackend, element_view
from spilld.offload.codec import Codec
from spilld.offload.partial import Partial, merge
from spilld.offload.record import BLOCK, Element, Format, Layout
from spilld.offload.system import page_aligned

from .attention import FEW
from .errors import ConfigError, InternalError

log = logging.getLogger(__name__)


def prepare(layout: Layout, heads: int, cache: Path) -> None:
    """Compile unless a note in `cache/kernels` says that it was done for these sources on this CPU.

    Raises ConfigError if the note cannot be written, InternalError with the child's last words if it fails.
    """
    words = [layout.format, layout.element, str(heads), str(layout.kv_heads), str(layout.head_dim)]
    note = cache / "kernels" / _key(words)
    if note.exists():
        return
    log.info("compiling kernels for %s, once", " ".join(words[:2]))
    done = subprocess.run(
        [sys.executable, "-m", __name__, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise InternalError(f"the kernels cannot be compiled: {done.stderr[-1000:]}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    except OSError as error:
        raise ConfigError(f"the cache folder {cache} cannot be written: {error}") from error


def _key(words: list[str]) -> str:
    """Changes with whatever numba's cache depends on."""
    hasher = blake2b(digest_size=16)
    for text in (*words, numba.__version__, sys.version, llvmlite.binding.get_host_cpu_name()):
        hasher.update(text.encode() + b"\0")
    for package in (spilld.offload, spilld.cuda_ext):
        for source in sorted(Path(str(package.__file__)).parent.glob("*.py")):
            hasher.update(f"{source} {source.stat().st_mtime_ns}\0".encode())
    return hasher.hexdigest()


def compile_all(layout: Layout, heads: int) -> None:
    """Run every kernel of the layout on one block, for each number of queries that reads records directly."""
    dtype = getattr(torch, layout.element)
    k, v = torch.zeros(2, layout.kv_heads, BLOCK, layout.head_dim, dtype=dtype)
    records, rows = page_aligned(layout.record_bytes).reshape(1, -1), np.zeros(1, np.int64)
    codec, partial, backend = Codec(layout), Partial(layout), CpuBackend()
    codec.seal(element_view(k), element_view(v), records, rows)
    codec.open(records.reshape(-1), rows, k.float().numpy(), v.float().numpy())
    for queries in range(1, FEW + 1):
        q, out = np.zeros((2, queries, heads, layout.head_dim), np.float32)
        low, high = np.zeros(queries, np.int64), np.full(queries, BLOCK)
        lse = np.zeros(out.shape[:2], np.float32)
        partial.attend(q, records.reshape(-1), rows, rows, low, high, 1.0, 0.0, out, lse)
        merge(out, lse, out.copy(), lse.copy())
    backend.attend_one(torch.zeros(heads, layout.head_dim), k, v, np.array([[0, BLOCK]]), 1.0, 0.0)


def _main(form: str, element: str, *sizes: str) -> None:
    heads, kv_heads, head_dim = map(int, sizes)
    numba.config.THREADING_LAYER = "omp"
    compile_all(Layout(Format(form), Element(element), kv_heads, head_dim), heads)


if __name__ == "__main__":
    _main(*sys.argv[1:])
