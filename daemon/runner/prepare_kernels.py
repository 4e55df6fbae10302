"""Compiles the numba kernels that a model needs, once, in a child process whose memory is freed with it.

`python -m spilld.runner.prepare_kernels FORMAT ELEMENT HEADS KV_HEADS HEAD_DIM [FORM ...]` runs each of them
on one block, which leaves its machine code in numba's cache beside the sources, and prints a line after each
part of the work. Without it the first request would wait for the compiler, and the daemon would keep the
compiler's 130 MiB.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
import torch

from spilld.cuda_ext.memory.cpu_windows import element_view
from spilld.errors import ConfigError, InternalError
from spilld.models.child_output import lines_to
from spilld.offload.kernels import kernel_cache
from spilld.offload.kernels.attention.partial import Partial, merge
from spilld.offload.kernels.attention.rows import DecodeRow, DecodeRows, RowAttention, WindowPlanes
from spilld.offload.kernels.attention.tiles import MAX_TILE
from spilld.offload.kernels.codec.codec import Codec
from spilld.offload.kernels.linear.forms import GROUP, LANES
from spilld.offload.kernels.linear.forms import Form as PackedForm
from spilld.offload.kernels.linear.grouped import Experts, copy_rows, multiply_grouped
from spilld.offload.kernels.linear.layer import (
    Activations,
    Layer,
    after_attention,
    before_attention,
)
from spilld.offload.kernels.linear.packed import Packed
from spilld.offload.kernels.linear.products import Matrix, multiply_rows
from spilld.offload.kernels.linear.row_operations import NOTHING, TOGETHER, take_normed
from spilld.offload.kernels.linear.tile_kernels import kernel_address
from spilld.offload.record import (
    BLOCK,
    Element,
    Format,
    Layout,
)
from spilld.offload.system import page_aligned

FOLDER = kernel_cache.KERNELS
"""Folder of the sources of everything that is compiled."""

COMMON_PARTS, PACKED_PARTS = 2 + MAX_TILE, 3
"""Number of parts of the work, each of which takes some seconds."""


def prepare(
    layout: Layout,
    heads: int,
    cache: Path,
    forms: Collection[PackedForm] = (),
    tell: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Compile the kernels, unless a note in `cache/kernels` says that it was done.

    The note is of these sources on this CPU.

    Args:
        layout: Layout of the records.
        heads: Query heads.
        cache: The cache folder.
        forms: The forms of its packed weights: those of steps over them are compiled, too.
        tell: Called with the number of parts that are done, and the number of all parts.

    Raises:
        ConfigError: The note cannot be written.
        InternalError: The child fails; the error has its last words.
    """
    words = [layout.format, layout.element, str(heads), str(layout.kv_heads), str(layout.head_dim)]
    words += sorted(forms)
    note = cache / "kernels" / _key(words)
    if note.exists():
        return
    parts = COMMON_PARTS + (PACKED_PARTS + len(forms) if forms else 0)
    tell(0, parts)
    done = itertools.count(1)
    with lines_to(lambda _: tell(next(done), parts)) as output:
        child = subprocess.run(
            [sys.executable, "-m", __name__, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    if child.returncode != 0:
        raise InternalError(f"the kernels cannot be compiled: {child.stderr[-1000:]}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    except OSError as error:
        raise ConfigError(f"the cache folder {cache} cannot be written: {error}") from error


def _key(words: list[str]) -> str:
    """Return a digest that changes with whatever numba's cache depends on."""
    hasher = blake2b(digest_size=16)
    for text in (*words, numba.__version__, sys.version, llvmlite.binding.get_host_cpu_name()):
        hasher.update(text.encode() + b"\0")
    for source in (*sorted(FOLDER.rglob("*.py")), kernel_cache.CONSTANTS, Path(__file__)):
        hasher.update(f"{source} {source.stat().st_mtime_ns}\0".encode())
    return hasher.hexdigest()


def compile_all(layout: Layout, heads: int) -> Iterator[None]:
    """Run every kernel of the layout on one block, for each number of queries that reads records directly.

    Yields:
        COMMON_PARTS times, after each part of the work.
    """
    dtype = getattr(torch, layout.element)
    k, v = torch.zeros(2, layout.kv_heads, BLOCK, layout.head_dim, dtype=dtype)
    records, rows = page_aligned(layout.record_bytes).reshape(1, -1), np.zeros(1, np.int64)
    codec, partial = Codec(layout), Partial(layout)
    codec.seal(element_view(k), element_view(v), records, rows)
    yield
    for queries in range(1, MAX_TILE + 1):
        q, out = np.zeros((2, queries, heads, layout.head_dim), np.float32)
        low, high = np.zeros(queries, np.int64), np.full(queries, BLOCK)
        lse = np.zeros(out.shape[:2], np.float32)
        partial.attend(q, records.reshape(-1), rows, rows, low, high, 1.0, 0.0, out, lse)
        merge(out, lse, out.copy(), lse.copy())
        yield
    numbers = element_view(torch.stack([k, v])).reshape(-1)
    planes = WindowPlanes(numbers, numbers.size, 0, BLOCK)
    row = DecodeRow(0, (0,), [(0, 1)], np.zeros((1, 1), np.int64), np.zeros(1, np.int64), 0, BLOCK)
    attention = RowAttention(layout, heads // layout.kv_heads)
    given, kept = (
        np.zeros((1, n, layout.head_dim), np.float32) for n in (heads + 2 * layout.kv_heads, heads)
    )
    views, scan = attention.views(records.reshape(-1)), DecodeRows.of([row])
    attention.attend(given, planes, 0, scan, views, 1.0, 0.0, kept, lse[:1])
    yield


def compile_packed(layout: Layout, heads: int, forms: Sequence[PackedForm]) -> Iterator[None]:
    """Run every kernel of a step over packed weights, on a narrow layer, and compile those of the forms.

    Yields:
        Once for each form and PACKED_PARTS times, after each part of the work.
    """
    for form in forms:
        kernel_address(form)
        yield
    kv_heads, head_dim, eps = layout.kv_heads, layout.head_dim, np.float32(1)
    rows = Activations.of(TOGETHER, GROUP, heads, kv_heads, head_dim, GROUP)

    def packed(outputs: int) -> Packed:
        # Of no block: nothing is multiplied, whatever inputs the form's blocks have.
        return Packed(forms[0], np.zeros((outputs // LANES, 0, forms[0].words), np.uint16))

    def weights(outputs: int) -> Matrix:
        return Matrix.of(packed(outputs))

    norm = np.ones(GROUP, np.float32)
    layer = Layer(
        qkv=(weights(heads * head_dim), weights(kv_heads * head_dim), weights(kv_heads * head_dim)),
        bias=NOTHING,
        out=weights(GROUP),
        gate_up=(weights(GROUP), weights(GROUP)),
        down=weights(GROUP),
        before_attention=norm,
        after_attention=NOTHING,
        before_mlp=norm,
        after_mlp=NOTHING,
        q_norm=NOTHING,
        k_norm=NOTHING,
    )
    angles = np.zeros((2, 1, head_dim), np.float32)
    before_attention(layer, rows, *angles, eps)
    yield
    after_attention(layer, rows, 1, eps, False)
    yield
    take_normed(rows.x[:1], norm, eps, rows.inputs)
    for out in (rows.x, rows.gate_up[:, :GROUP]):  # numba compiles a range of columns apart
        multiply_rows(rows.inputs, layer.down, out, 1)
    groups = np.zeros(1, np.int64)
    copy_rows(rows.inputs, groups, GROUP, rows.inputs)
    multiply_grouped(rows.inputs, Experts.of([packed(GROUP)]), groups, groups, groups + 1, rows.x)
    yield


def _main(form: str, element: str, heads: str, kv_heads: str, head_dim: str, *packed: str) -> None:
    layout = Layout(Format(form), Element(element), int(kv_heads), int(head_dim))
    common = compile_all(layout, int(heads))
    forms = [PackedForm(name) for name in packed]
    for _ in itertools.chain(common, compile_packed(layout, int(heads), forms) if forms else ()):
        print("done", flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
