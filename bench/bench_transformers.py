"""Is a request to spilld faster than plain transformers with the same weights?

SmolLM2-135M in bfloat16 on the CPU, a prompt of 7,500 tokens (Python's documentation), then 32 more, greedy.
Ours is a daemon with default budgets, format k8v4 and its whole KV in host memory, timed at the client:
prefill is until the first token arrives, decode the mean time between tokens after it. A second daemon has
the demo's budgets (one window on the device, 25 % of the KV in host memory, the rest on disk). The baseline
is a process that does nothing but transformers' forward passes over its own KV cache, each one timed.
They take turns after a warm-up; medians of 3. Every request is another stretch of the text, so that none
goes on from what an earlier one stored.

What bounds the result. Prefill: the FLOPs of the linear layers at the measured rate of bfloat16 or float32
products, whichever is faster here, plus those of causal attention at that of float32. Decode: all weights,
once, at the measured rate of memory, plus the records, by bytes or by FLOPs, whichever takes longer. With
records on disk see bench_scan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from harness import Goal, Result, document, gemm_rate, in_child, main, medians, memory_rate, say
from ours import Prompts
from work import Work

from spilld import Client, Token
from spilld.demo.demo import MODEL, budgets
from spilld.demo.plain_transformers import greedy
from spilld.demo.spawn import spawned
from spilld.models.catalog import default_cache, resolve
from spilld.offload.record import Element, Format

BENCH = "transformers"
TOKENS = 7500
COUNT = 33
"""Tokens to generate: the first ends the prefill, the others are decode steps."""

WARM_UP = 1500
TEXT_TOKENS = 20_000


def ask(client: Client, prompt: Sequence[int]) -> dict[str, float]:
    """Times of one request, as its client sees them."""
    asked = time.perf_counter()
    stream = client.generate(prompt, max_tokens=COUNT, ignore_eos=True)
    arrivals = [time.perf_counter() for event in stream if isinstance(event, Token)]
    if stream.result.usage.cached_tokens or len(arrivals) != COUNT:
        raise RuntimeError(f"not a whole prefill and {COUNT} tokens: {stream.result.usage}")
    return {
        "prefill_s": arrivals[0] - asked,
        "decode_ms": 1e3 * (arrivals[-1] - arrivals[0]) / (COUNT - 1),
    }


def plain(folder: Path, prompt: Sequence[int]) -> dict[str, float]:
    """The same of transformers."""
    found = greedy(folder, Element.BFLOAT16, prompt, COUNT)
    return {"prefill_s": found.prefill_s, "decode_ms": sum(found.decode_ms) / len(found.decode_ms)}


def anew(run: Callable[[Sequence[int]], dict[str, float]], prompts: Prompts) -> dict[str, float]:
    """A run over a prompt that none has seen."""
    return run(prompts.next(TOKENS))


def measure() -> tuple[dict[str, float], list[Result]]:
    folder = resolve(MODEL, default_cache(), Element.BFLOAT16)
    prompts = Prompts(document(folder, TEXT_TOKENS))
    limits = {
        "memory_bytes_s": in_child(memory_rate),
        "float32_flops": in_child(gemm_rate, "float32"),
        "bfloat16_flops": in_child(gemm_rate, "bfloat16"),
    }
    cases = {
        "all in host": {"model": MODEL, "format": "k8v4", "dtype": "bfloat16"},
        "75 % on disk": budgets(folder, TOKENS, Format.K8V4, Element.BFLOAT16),
    }
    with ExitStack() as stack:
        contenders: dict[str, Callable[[Sequence[int]], dict[str, float]]] = {}
        for case, settings in cases.items():
            daemon = stack.enter_context(spawned(settings))
            contenders[case] = partial(ask, stack.enter_context(Client(daemon.address)))
        contenders["transformers"] = partial(plain, folder)
        for case, run in contenders.items():
            say(f"warm-up: {case}")
            run(prompts.next(WARM_UP))
        found = medians({case: partial(anew, run, prompts) for case, run in contenders.items()})
    work = Work.of(folder, TOKENS)
    bounds = {"prefill_s": work.prefill_s(limits), "decode_ms": work.decode_ms(limits)}
    results = []
    for case in cases:
        in_host = case == "all in host"
        for metric, name, unit, at_most in (
            ("prefill_s", "prefill", "s", 1.0),
            ("decode_ms", "decode", "ms/token", 1 / 3),
        ):
            results.append(
                Result(
                    bench=BENCH,
                    metric=name,
                    case=f"{TOKENS} tokens, {case}",
                    unit=unit,
                    ours=found[case][metric],
                    baseline=found["transformers"][metric],
                    limit=bounds[metric] if in_host else None,
                    goal=Goal("ratio", at_most) if in_host else None,
                )
            )
    return limits, results


if __name__ == "__main__":
    main(__doc__, measure)
