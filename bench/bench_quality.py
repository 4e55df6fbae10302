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
from steps import Steps, in_host

from spilld.assembly import use_threads
from spilld.models.catalog import default_cache, resolve
from spilld.models.model import load
from spilld.offload.record import Element, Format

BENCH = "quality"
MODEL = "smollm2-135m"
CONTEXT = 6000
POSITIONS = 128
CHUNK = 512
GOALS = {"KV int8": 0.001, "KV k8v4": 0.002, "KV int4": None, "weights int8": None, "weights int4": None}
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
    store = in_host(model, form, Element.FLOAT32, CONTEXT + POSITIONS)
    steps = Steps(model, store, CONTEXT + POSITIONS, CHUNK)
    steps.feed(tokens)
    for start in range(0, CONTEXT, CHUNK):
        steps.step(min(CHUNK, CONTEXT - start), range(0))
    if model.packed is None:
        return steps.step(POSITIONS, range(POSITIONS)).numpy()
    return torch.cat([steps.step(1, range(1)) for _ in range(POSITIONS)]).numpy()


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
