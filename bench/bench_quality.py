"""How much do the stored formats, and packed weights, change what the model says?

SmolLM2-135M in float32 reads 6,000 tokens of Python's documentation in chunks of 512, then one slice of
128 more, given, not sampled. All 128 distributions of the next token are compared with those of format
`exact`: KL(exact || format) in nats, and how often both have the same most likely token.

Float32 compute, so that nothing but the format differs: bfloat16 alone changes 3 % of the choices. Of the
context, the sinks and the newest 256 to 511 tokens are exact in every format. The slice is computed as
prefill is, over dequantised tiles; single tokens read the same numbers. One text, one model.

Packed weights are read by steps of one token, 128 of them, over the same KV in format `exact`. The GGUF file
of this model has Q4_1 weights, which int4 repeats: what is seen is how activations round to 16 bits, and
for int8 that of the weights. A model that was never quantised loses more to int4; none is at hand here.
What bounds the result: the error of rounding K and V to the bits of the format. Times play no part.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from harness import Goal, Result, document, in_child, main, say

from spilld.cuda_ext.cpu import CpuBackend
from spilld.cuda_ext.window import WindowShape
from spilld.daemon.assembly import use_threads
from spilld.daemon.attention import TieredAttention
from spilld.daemon.catalog import default_cache, resolve
from spilld.daemon.model import Model, load
from spilld.daemon.runner import Runner
from spilld.daemon.sequence import Sequence
from spilld.daemon.slices import Slice
from spilld.daemon.visibility import BLOCK, WINDOW_SLOTS, boundary, sealed_by
from spilld.offload.host import HostSlab
from spilld.offload.record import Element, Format, Layout
from spilld.offload.store import Store

BENCH = "quality"
MODEL = "smollm2-135m"
CONTEXT = 6000
POSITIONS = 128
CHUNK = 512
GOALS = {"KV int8": 0.001, "KV k8v4": 0.002, "weights int8": None, "weights int4": None}
"""Nats of the mean, by case."""

Logits = npt.NDArray[np.float32]


def logits(case: str) -> Logits:
    """Float32 [POSITIONS, vocab] after CONTEXT tokens."""
    use_threads(None)
    kind, _, name = case.partition(" ")
    form = Format(name) if kind == "KV" else Format.EXACT
    weights = name if kind == "weights" else "bf16"
    model = load(resolve(MODEL, default_cache(), Element.FLOAT32), Element.FLOAT32, weights=weights)
    tokens = document(model.folder, CONTEXT + POSITIONS)
    store, runner, sequence = serving(model, form)
    sequence.tokens.extend(tokens)
    for start in range(0, CONTEXT, CHUNK):
        step(store, runner, sequence, min(CHUNK, CONTEXT - start), range(0))
    if model.packed is None:
        return step(store, runner, sequence, POSITIONS, range(POSITIONS)).numpy()
    return torch.cat([step(store, runner, sequence, 1, range(1)) for _ in range(POSITIONS)]).numpy()


def serving(model: Model, form: Format) -> tuple[Store, Runner, Sequence]:
    """What an engine drives, with room for one sequence, everything in host memory."""
    g = model.geometry
    shape = WindowShape(
        slots=WINDOW_SLOTS, layers=g.layers, kv_heads=g.kv_heads, head_dim=g.head_dim, dtype=torch.float32
    )
    arena = CpuBackend().windows(shape, shape.nbytes)
    layout = Layout(form, Element.FLOAT32, g.kv_heads, g.head_dim)
    blocks = boundary(CONTEXT + POSITIONS) // BLOCK
    slab = HostSlab(blocks * g.layers * layout.record_bytes, layout.record_bytes)
    store = Store(layout, g.layers, slab, run_blocks=blocks)
    sequence = Sequence(store.open(), arena.take(), bytes(32))
    store.promise(sequence.table, blocks)
    return store, Runner(model, TieredAttention(CpuBackend(), arena, store), store, CHUNK), sequence


def step(store: Store, runner: Runner, sequence: Sequence, count: int, keep: range) -> torch.Tensor:
    """Compute the next tokens of the sequence; float32 logits [len(keep), vocab]."""
    position = sequence.computed
    known = len(sequence.table.chain)
    store.grow(sequence.table, sequence.hashes(known, sealed_by(position + count - 1)))
    [found] = runner.run([Slice(sequence, count, position)], [keep])
    sequence.computed += count
    return found


def divergence(exact: Logits, other: Logits) -> npt.NDArray[np.float64]:
    """KL(exact || other) in nats, float64 [positions]."""
    p, q = log_softmax(exact), log_softmax(other)
    found: npt.NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return found


def log_softmax(values: Logits) -> npt.NDArray[np.float64]:
    shifted: npt.NDArray[np.float64] = values.astype(np.float64) - values.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def measure() -> tuple[dict[str, float], list[Result]]:
    found = {}
    for name in ("KV exact", *GOALS):
        say(f"{name}: {CONTEXT} + {POSITIONS} tokens")
        found[name] = in_child(logits, name)
    exact = found["KV exact"]
    results = []
    for name, at_most in GOALS.items():
        kl = divergence(exact, found[name])
        same = (exact.argmax(-1) == found[name].argmax(-1)).mean()
        case = f"{name}, {CONTEXT} tokens"
        results += [
            Result(
                bench=BENCH,
                metric="KL mean",
                case=case,
                unit="nats",
                ours=float(kl.mean()),
                goal=None if at_most is None else Goal("ours", at_most),
            ),
            Result(bench=BENCH, metric="KL max", case=case, unit="nats", ours=float(kl.max())),
            Result(bench=BENCH, metric="same argmax", case=case, unit="share", ours=float(same), limit=1.0),
        ]
    return {}, results


if __name__ == "__main__":
    main(__doc__, measure)
