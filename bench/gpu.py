"""How far are the CUDA kernels from what bounds them on this GPU?

Attention of M queries over 65,536 tokens of one layer, 32 heads on 8 of head_dim 128, records in GPU memory;
the same records fetched from pinned host memory; and sealing 256 blocks. The baseline is the CPU's kernel
over the same records in host memory, a process of its own that takes turns with ours, medians of 3.
Where torch finds the GPU, also 256 queries of a prompt by its flash attention over records that are unpacked
first; there the baseline is what our kernels for few queries take.

What bounds the result: bytes over the rate of a copy within GPU memory, measured in the same run; of a prompt
FLOPs over the rate of torch's products; the rate of copies from host memory is a limit itself. Needs a
GPU; nobody has seen its figures: it has no goal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from harness import CALLS, Result, in_child, main, medians, milliseconds

from spilld.cuda_ext.compile.build import BuildError
from spilld.cuda_ext.device.base import Copy, Device, Stream
from spilld.cuda_ext.device.cuda import CudaDevice
from spilld.cuda_ext.device.tensors import Array
from spilld.cuda_ext.errors import DeviceError
from spilld.cuda_ext.flash import Flash
from spilld.cuda_ext.memory.staging import Staging
from spilld.cuda_ext.memory.windows import KVWindowShape
from spilld.cuda_ext.ops import (
    Load,
    Ops,
    Queries,
    Records,
)
from spilld.cuda_ext.transfer_costs import PROMPT
from spilld.kv.attention_span import WINDOW_TOKENS
from spilld.models.catalog import default_cache
from spilld.offload.kernels.attention.partial import Partial
from spilld.offload.kernels.codec import samples
from spilld.offload.record import (
    BLOCK,
    Element,
    Format,
    Layout,
)
from spilld.offload.system import PAGE, page_aligned

BENCH = "gpu"
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
TOKENS = 65536
SEALED = 256
QUERIES = (1, 4, 16)
SIZE = 4096
"""Of square matrices, for the rate of products."""

Numbers = dict[str, float]


class Size(NamedTuple):
    """What is measured; smaller where an emulator computes."""

    blocks: int = TOKENS // BLOCK
    sealed: int = SEALED
    calls: int = CALLS


def layouts() -> dict[Format, Layout]:
    forms = (Format.EXACT, Format.INT8, Format.K8V4, Format.INT4)
    return {form: Layout(form, Element.BFLOAT16, KV_HEADS, HEAD_DIM) for form in forms}


@contextmanager
def pinned(device: Device[Any], form: Layout, blocks: int) -> Iterator[int]:
    """The address of random records in registered host memory."""
    memory = page_aligned(-(-blocks * form.record_bytes // PAGE) * PAGE)
    samples.fill(form, memory[: blocks * form.record_bytes].reshape(blocks, -1))
    device.register(memory.ctypes.data, memory.nbytes)
    try:
        yield memory.ctypes.data
    finally:
        device.unregister(memory.ctypes.data)


@contextmanager
def allocated(device: Device[Any], nbytes: int) -> Iterator[int]:
    address = device.allocate(nbytes)
    try:
        yield address
    finally:
        device.free(address)


def random(*shape: int) -> npt.NDArray[np.float32]:
    """Normal numbers: zeros are multiplied faster."""
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


def done(device: Device[Any], stream: Stream, work: Callable[[], object]) -> None:
    work()
    device.record(stream).synchronise()


def measured(device: Device[Any], load: Load, form: Layout, size: Size) -> Numbers:
    """Milliseconds, and the rates of copies, bytes/s, of one format."""
    shape = KVWindowShape.uniform(WINDOW_TOKENS, 1, form.kv_heads, form.head_dim, torch.bfloat16)
    ops, nbytes = Ops(load, form.constants, shape, HEADS), size.blocks * form.record_bytes
    rows = 3 * PROMPT * HEADS + ops.partial_rows(PROMPT)
    landing = Staging(device, 4 * rows * (HEAD_DIM + 1) + 32 * size.blocks + PAGE)
    found: Numbers = {}
    with (
        pinned(device, form, size.blocks) as host,
        allocated(device, nbytes) as pool,
        allocated(device, max(nbytes, shape.layer_bytes)) as other,
    ):
        fetch = partial(device.copy, Stream.COPY_IN, [Copy(pool, host, nbytes)])
        within = partial(device.copy, Stream.COMPUTE, [Copy(other, pool, nbytes)])
        found["fetch"] = milliseconds(partial(done, device, Stream.COPY_IN, fetch), size.calls)
        found["copy"] = milliseconds(partial(done, device, Stream.COMPUTE, within), size.calls)
        for m in QUERIES:
            with landing.turn():
                attend = attention(ops, landing, form, pool, size.blocks, m)
                found[f"M={m}"] = milliseconds(partial(done, device, Stream.COMPUTE, attend), size.calls)
        if torch.cuda.is_available():
            flash = Flash(device, load, form.constants, shape, HEADS)
            found |= prompt(device, ops, flash, landing, form, pool, size)
        with landing.turn():
            planes = random(2, form.kv_heads, shape.tokens, HEAD_DIM)
            landing.send(torch.from_numpy(planes).bfloat16().view(torch.int16).numpy(), other)
            seal = sealing(ops, landing, form, pool, other, size.sealed)
            found["seal"] = milliseconds(partial(done, device, Stream.COMPUTE, seal), size.calls)
    landing.close()
    return found


def attention(ops: Ops, landing: Staging, form: Layout, pool: int, blocks: int, m: int) -> Callable[[], None]:
    numbers = np.arange(blocks)
    low, high = np.zeros(m, np.int64), np.full(m, (blocks + 1) * BLOCK)
    q = random(m, HEADS, HEAD_DIM)
    at = landing.bring(q, numbers * form.record_bytes, (numbers + 1) * BLOCK, low, high)
    to = ops.room(landing, ops.parts(blocks, m), m)
    records = Records(pool, at[1], at[2], blocks)
    return partial(ops.attend_records, to, Queries(at[0], m), records, at[3], at[4], HEAD_DIM**-0.5, 0.0)


def prompt(
    device: Device[Any], ops: Ops, flash: Flash, landing: Staging, form: Layout, pool: int, size: Size
) -> Numbers:
    """Milliseconds of PROMPT queries by the kernels for few and by torch, and of a product of torch's."""
    found: Numbers = {}
    with landing.turn():
        attend = attention(ops, landing, form, pool, size.blocks, PROMPT)
        found["prompt by kernels"] = milliseconds(partial(done, device, Stream.COMPUTE, attend), size.calls)
    with landing.turn():
        numbers = np.arange(size.blocks)
        q = random(PROMPT, HEADS, HEAD_DIM)
        at = landing.bring(q, numbers * form.record_bytes, (numbers + 1) * BLOCK)
        records = Records(pool, at[1], at[2], size.blocks)
        to = ops.room(landing, 1, PROMPT)
        attend = partial(flash.attend, to, Queries(at[0], PROMPT), records, HEAD_DIM**-0.5)
        found["prompt by flash"] = milliseconds(partial(done, device, Stream.COMPUTE, attend), size.calls)
    square = Array(device.allocate(2 * SIZE**2), (SIZE, SIZE), torch.bfloat16)
    device.compute(Stream.COMPUTE, lambda x: x.normal_(), square)
    multiply = partial(device.compute, Stream.COMPUTE, lambda x: x @ x, square)
    found["product"] = milliseconds(partial(done, device, Stream.COMPUTE, multiply), size.calls)
    device.free(square.address)
    return found


def sealing(
    ops: Ops, landing: Staging, form: Layout, pool: int, planes: int, blocks: int
) -> Callable[[], None]:
    """Of blocks that all lie in one window's first slots: where does not matter."""
    places, firsts = landing.bring(np.arange(blocks) * form.record_bytes, np.zeros(blocks, np.int64))
    return partial(ops.seal, pool, places, planes, firsts, blocks)


def loader(device: CudaDevice) -> Load:
    return partial(device.compiled, cache=default_cache() / "cubins")


def ours() -> Numbers:
    device = CudaDevice()
    try:
        found: Numbers = {}
        for form, layout in layouts().items():
            numbers = measured(device, loader(device), layout, Size())
            found |= {f"{form} {name}": number for name, number in numbers.items()}
        return found
    finally:
        device.close()


def on_cpu() -> Numbers:
    """The same attention where records lie in host memory."""
    found: Numbers = {}
    blocks = TOKENS // BLOCK
    for form, layout in layouts().items():
        memory = page_aligned(blocks * layout.record_bytes, huge=True)
        samples.fill(layout, memory.reshape(blocks, -1))
        kernel, numbers = Partial(layout), np.arange(blocks)
        for m in QUERIES:
            q = random(m, HEADS, HEAD_DIM)
            out, lse = np.empty_like(q), np.empty((m, HEADS), np.float32)
            low, high = np.zeros(m, np.int64), np.full(m, (blocks + 1) * BLOCK)
            places, positions = numbers * layout.record_bytes, (numbers + 1) * BLOCK
            call = partial(kernel.attend, q, memory, places, positions, low, high)
            found[f"{form} M={m}"] = milliseconds(partial(call, HEAD_DIM**-0.5, 0.0, out, lse))
    return found


def measure() -> tuple[Mapping[str, float], list[Result]]:
    found = medians({"GPU": partial(in_child, ours), "CPU": partial(in_child, on_cpu)})
    gpu, cpu = found["GPU"], found["CPU"]
    exact = layouts()[Format.EXACT].record_bytes * TOKENS // BLOCK
    dram = 2e3 * exact / gpu["exact copy"]  # each byte is read and written
    limits = {"gpu_memory_bytes_s": dram, "fetch_bytes_s": 1e3 * exact / gpu["exact fetch"]}
    return limits, [
        line for form, layout in layouts().items() for line in results(form, layout, gpu, cpu, dram)
    ]


def results(form: Format, layout: Layout, gpu: Numbers, cpu: Numbers, dram: float) -> Iterator[Result]:
    blocks = TOKENS // BLOCK
    read = layout.record_bytes * blocks
    for m in QUERIES:
        case = f"{form} M={m}"
        yield Result(
            bench=BENCH,
            metric="attention at 65,536 tokens",
            case=case,
            unit="ms",
            ours=gpu[case],
            baseline=cpu[case],
            limit=1e3 * read / dram,
        )
    if (by_flash := gpu.get(f"{form} prompt by flash")) is not None:
        flop_ms = 2 * SIZE**3 / gpu[f"{form} product"]
        yield Result(
            bench=BENCH,
            metric=f"{PROMPT} queries of a prompt, against kernels for few",
            case=str(form),
            unit="ms",
            ours=by_flash,
            baseline=gpu[f"{form} prompt by kernels"],
            limit=4 * PROMPT * HEADS * HEAD_DIM * TOKENS / flop_ms,
        )
    sealed = SEALED * (layout.record_bytes + 2 * 2 * layout.kv_heads * layout.head_dim * BLOCK)
    for name, metric, nbytes in (
        ("seal", f"seal {SEALED} blocks", sealed),
        ("fetch", "fetch all records in one copy", None),
    ):
        limit = None if nbytes is None else 1e3 * nbytes / dram
        yield Result(
            bench=BENCH, metric=metric, case=str(form), unit="ms", ours=gpu[f"{form} {name}"], limit=limit
        )


if __name__ == "__main__":
    try:
        CudaDevice().close()
    except (BuildError, DeviceError) as error:
        sys.exit(f"no GPU to measure: {error}")
    main(__doc__ or "", measure)
