"""CUDA kernels of known models, compiled ahead of time: `python -m spilld.cli.cubins`, for the wheel.

What a kernel is compiled with depends on a model's KV heads and head_dim and on the format of its records;
not on the number of queries. Kernels of other models are compiled when they are first used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

from spilld.cuda_ext.compile import build, variant
from spilld.cuda_ext.compile.variant import Variant
from spilld.offload.record import (
    SEALED,
    Element,
    Format,
    Layout,
)

SHAPES = (
    (2, 64),  # Qwen2.5 0.5B
    (3, 64),  # SmolLM2 135M
    (8, 64),  # Llama 3.2 1B
    (2, 128),  # Qwen2.5 1.5B and 3B
    (4, 128),  # Qwen2.5 7B, Qwen3 30B-A3B
    (8, 128),  # Llama 3, Mistral, Qwen2.5 14B and larger, Qwen3
    (10, 128),  # Phi-3 medium, Phi-4
    (16, 128),  # Gemma 2 and 3 27B
    (32, 96),  # Phi-3 mini
    (1, 256),  # Gemma 3 270M and 1B
    (4, 256),  # Gemma 2 2B, Gemma 3 4B
    (8, 256),  # Gemma 2 9B, Gemma 3 12B
)
"""(KV heads, head_dim) of models in bfloat16."""


def kernels(layout: Layout) -> Iterator[Variant]:
    """Yield all kernels that a model with records of this layout launches."""
    yield variant.attend_records(layout.constants)
    yield variant.attend_window(8 * layout.element.nbytes, layout.head_dim)
    yield variant.merge(layout.head_dim, layout.kv_heads)
    yield variant.seal(layout.constants)
    yield variant.dequantise(layout.constants)
    if layout.format is Format.INT4:
        yield variant.rotate(layout.head_dim)


def known() -> Iterator[Layout]:
    """Yield the record layouts of known models in bfloat16, in every sealed format."""
    for shape, form in product(SHAPES, SEALED):
        yield Layout(form, Element.BFLOAT16, *shape)


def ship(layouts: Iterable[Layout], architectures: Iterable[str]) -> list[Path]:
    """Compile the kernels of these layouts into the folder that the wheel takes along.

    Other files there are removed.

    Returns:
        The paths of the compiled kernels.
    """
    note = build.SHIPPED / build.COMPILER
    build.SHIPPED.mkdir(exist_ok=True)
    if not note.exists() or note.read_text() != build.compiler():
        _keep(())
    note.write_text(build.compiler())
    made = dict.fromkeys(kernel for layout in layouts for kernel in kernels(layout))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        paths = list(pool.map(_shipped, *zip(*product(made, architectures), strict=True)))
    _keep((note, *paths))
    return paths


def _keep(paths: Iterable[Path]) -> None:
    for path in set(build.SHIPPED.iterdir()) - set(paths):
        path.unlink()


def _shipped(kernel: Variant, architecture: str) -> Path:
    return build.compiled(kernel, architecture, build.SHIPPED)


def main() -> None:
    """Compile all known kernels, and print how many there are."""
    paths = ship(known(), build.ARCHITECTURES)
    size = sum(path.stat().st_size for path in paths)
    print(f"{len(paths)} kernels, {size / 1e6:.1f} MB, in {build.SHIPPED}")


if __name__ == "__main__":
    main()
