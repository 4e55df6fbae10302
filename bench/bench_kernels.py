"""How far are the kernels of a decode step from what bounds them?

Attention of M queries over records of SmolLM2's shape (9 heads on 3, head_dim 64) at 65,536 tokens in host
memory, one layer. The baseline is what torch does with the same K and V in float32, of which nothing is
quantised: its flash kernel. Products: all matrices of SmolLM2-135M as packed from its GGUF file, for M rows;
the baseline is torch's bfloat16 linear layers. A step: a whole decode step at 512 tokens, the KV in host
memory; "the rest" is what is neither products nor attention, each measured alone in the same process.
Baselines and ours are processes of their own that take turns, medians of 3, each the median of its calls.

What bounds the result: bytes over the memory's read rate, or FLOPs over the rate of a float32 GEMM,
whichever takes longer, both measured in the same run. Attention at M = 1 may take 1.6 times that, at M = 8
twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from harness import Goal, Result, gemm_rate, in_child, in_our_child, main, medians, memory_rate, milliseconds
from steps import Steps, in_host

from spilld.assembly import use_threads
from spilld.demo.demo import MODEL
from spilld.kv.attention_span import (
    WINDOW_TOKENS,
    boundary,
    window_offsets,
    window_ranges,
)
from spilld.models.catalog import default_cache, resolve
from spilld.models.model import Model, load
from spilld.models.wide_linear import WideLinear, widen
from spilld.offload.kernels.attention.partial import Partial
from spilld.offload.kernels.attention.rows import DecodeRow, DecodeRows, RowAttention, WindowPlanes
from spilld.offload.kernels.codec.codec import Codec
from spilld.offload.kernels.linear.products import Matrix, multiply_rows
from spilld.offload.kernels.linear.row_operations import Inputs
from spilld.offload.record import (
    BLOCK,
    Element,
    Format,
    Layout,
)
from spilld.offload.system import page_aligned

BENCH = "kernels"
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
TOKENS = 65536
FORMATS = (Format.INT8, Format.K8V4, Format.INT4)
QUERIES = {1: 1.6, 8: 2.0}
"""M, and how many times the limit a call may take."""
ROWS = (1, 8, 64, 512)
"""Of products: a decode step, eight, and chunks of a prompt."""
CONTEXT = 512
REST_MS = 2.0

Numbers = dict[str, float]


def layout(form: Format) -> Layout:
    return Layout(form, Element.BFLOAT16, KV_HEADS, HEAD_DIM)


def records(form: Format, blocks: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Records of random numbers, one after another."""
    shape = layout(form)
    memory = page_aligned(blocks * shape.record_bytes, huge=True)
    k, v = torch.randn(2, KV_HEADS, BLOCK, HEAD_DIM).to(torch.bfloat16).view(torch.uint16).numpy()
    rows = memory.reshape(blocks, -1)
    Codec(shape).seal(k, v, rows, np.zeros(1, np.int64))
    rows[1:] = rows[0]
    return memory


def our_attention() -> Numbers:
    """Milliseconds by format and M."""
    use_threads(None)
    found, blocks = {}, TOKENS // BLOCK
    for form in FORMATS:
        memory, kernel = records(form, blocks), Partial(layout(form))
        offsets, positions = np.arange(blocks) * layout(form).record_bytes, np.arange(blocks) * BLOCK
        for m in QUERIES:
            q = np.random.default_rng(m).standard_normal((m, HEADS, HEAD_DIM), np.float32)
            out, lse = np.empty_like(q), np.empty((m, HEADS), np.float32)
            low, high = np.zeros(m, np.int64), np.full(m, TOKENS)
            arguments = (q, memory, offsets, positions, low, high, HEAD_DIM**-0.5, 0.0, out, lse)
            found[f"{form} M={m}"] = milliseconds(partial(kernel.attend, *arguments))
    return found


def torch_attention() -> Numbers:
    """Milliseconds by M: float32 K and V, the heads of a group folded into rows."""
    use_threads(None)
    k, v = torch.randn(2, 1, KV_HEADS, TOKENS, HEAD_DIM)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found = {}
    for m in QUERIES:
        q = torch.randn(1, KV_HEADS, m * HEADS // KV_HEADS, HEAD_DIM)
        found[f"M={m}"] = milliseconds(partial(flash, q, k, v))
    return found


def model() -> Model:
    folder = resolve(MODEL, default_cache(), Element.BFLOAT16)
    return load(folder, Element.BFLOAT16, weights="auto", cache=default_cache())


def our_products() -> Numbers:
    """Milliseconds of all matrices by rows, and the whole step and its parts."""
    use_threads(None)
    found = model()
    assert found.packed is not None
    matrices = [
        (Matrix.of(packed), np.zeros((ROWS[-1], packed.outputs), np.float32))
        for packed in found.packed.values()
    ]
    inputs = Inputs.of(ROWS[-1], max(packed.inputs for packed in found.packed.values()))

    def products(rows: int) -> None:
        for matrix, out in matrices:
            multiply_rows(inputs, matrix, out, rows)

    numbers = {f"products M={m}": milliseconds(partial(products, m)) for m in ROWS}
    tokens = CONTEXT + 64
    steps = Steps(found, in_host(found, Format.K8V4, Element.BFLOAT16, tokens), tokens, CONTEXT)
    steps.feed([1] * tokens)
    steps.skip(CONTEXT)
    numbers["step"] = milliseconds(lambda: steps.step(1, range(1)))
    numbers["attention"] = len(found.geometry.layers) * layer_attention()
    return numbers


def layer_attention() -> float:
    """Milliseconds of a layer's attention in a step at CONTEXT tokens."""
    blocks = boundary(CONTEXT) // BLOCK
    memory = records(Format.K8V4, blocks)
    numbers = np.zeros(2 * KV_HEADS * WINDOW_TOKENS * HEAD_DIM, np.uint16)
    planes = WindowPlanes(numbers, numbers.size, 0, WINDOW_TOKENS)
    offsets = np.arange(blocks)[None] * layout(Format.K8V4).record_bytes
    seen = (window_offsets(CONTEXT), window_ranges(CONTEXT, None), offsets, np.arange(blocks) * BLOCK)
    scan = DecodeRows.of([DecodeRow(0, *seen, BLOCK, CONTEXT)])
    attention = RowAttention(layout(Format.K8V4), HEADS // KV_HEADS)
    heads, views = np.zeros((1, HEADS + 2 * KV_HEADS, HEAD_DIM), np.float32), attention.views(memory)
    out, lse = np.zeros((1, HEADS, HEAD_DIM), np.float32), np.zeros((1, HEADS), np.float32)
    return milliseconds(
        lambda: attention.attend(heads, planes, 0, scan, views, HEAD_DIM**-0.5, 0.0, out, lse)
    )


def torch_products() -> Numbers:
    """Milliseconds of all linear layers by rows, in bfloat16."""
    use_threads(None)
    module = model().module
    widen(module)
    linears = [part for part in module.modules() if isinstance(part, torch.nn.Linear | WideLinear)]
    found = {}
    widths = {part.weight.shape[1] for part in linears}

    def products(rows: Mapping[int, torch.Tensor]) -> None:
        for part in linears:
            part(rows[part.weight.shape[1]])

    with torch.inference_mode():
        for m in ROWS:
            rows = {width: torch.randn(m, width).to(torch.bfloat16) for width in widths}
            found[f"products M={m}"] = milliseconds(partial(products, rows))
    return found


def packed_size() -> Numbers:
    packed = model().packed
    assert packed is not None
    return {
        "weight_bytes": float(sum(part.tiles.nbytes for part in packed.values())),
        "weights": float(sum(part.outputs * part.inputs for part in packed.values())),
    }


def measure() -> tuple[dict[str, float], list[Result]]:
    limits = {
        "memory_bytes_s": in_child(memory_rate),
        "float32_flops": in_child(gemm_rate, "float32"),
        **in_child(packed_size),
    }
    found = medians(
        {
            "our attention": lambda: in_our_child(our_attention),
            "torch attention": lambda: in_child(torch_attention),
            "our products": lambda: in_our_child(our_products),
            "torch products": lambda: in_child(torch_products),
        }
    )
    return limits, attention_rows(found, limits) + step_rows(found, limits)


def attention_rows(found: Mapping[str, Numbers], limits: Mapping[str, float]) -> list[Result]:
    results = []
    for form in FORMATS:
        nbytes = TOKENS // BLOCK * layout(form).record_bytes
        for m, times in QUERIES.items():
            flops = 4 * m * HEADS * HEAD_DIM * TOKENS
            limit = 1e3 * max(nbytes / limits["memory_bytes_s"], flops / limits["float32_flops"])
            results.append(
                Result(
                    bench=BENCH,
                    metric="attention",
                    case=f"{form}, {TOKENS} tokens, M = {m}",
                    unit="ms",
                    ours=found["our attention"][f"{form} M={m}"],
                    baseline=found["torch attention"][f"M={m}"],
                    limit=limit,
                    goal=Goal("ours", times * limit),
                )
            )
    return results


def step_rows(found: Mapping[str, Numbers], limits: Mapping[str, float]) -> list[Result]:
    ours, theirs = found["our products"], found["torch products"]
    read_s = limits["weight_bytes"] / limits["memory_bytes_s"]
    limit = 1e3 * read_s
    results = [
        Result(
            bench=BENCH,
            metric="products",
            case=f"all matrices, M = {m}",
            unit="ms",
            ours=ours[f"products M={m}"],
            baseline=theirs[f"products M={m}"],
            limit=1e3 * max(read_s, 2 * m * limits["weights"] / limits["float32_flops"]),
        )
        for m in ROWS
    ]
    case = f"a decode step, {CONTEXT} tokens"
    rest = ours["step"] - ours["products M=1"] - ours["attention"]
    results.append(Result(bench=BENCH, metric="all", case=case, unit="ms", ours=ours["step"], limit=limit))
    results.append(
        Result(bench=BENCH, metric="the rest", case=case, unit="ms", ours=rest, goal=Goal("ours", REST_MS))
    )
    return results


if __name__ == "__main__":
    main(__doc__ or "", measure)
