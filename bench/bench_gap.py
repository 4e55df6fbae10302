"""How long do running answers wait for a token while a long prompt is computed, and what does that cost?

SmolLM2-135M in bfloat16, format k8v4, all KV in host memory. One stream generates from a prompt of 512
tokens, beside it comes a prompt of 7,500 tokens. The gaps are those between the stream's tokens until the
prompt's first one. Baseline: the same daemon without a bound on its steps (`max_gap_ms` an hour). The prefill
is timed beside the stream and alone, in the bounded daemon. Two daemons that take turns, medians of 3.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import ExitStack
from functools import partial
from itertools import pairwise

from harness import Goal, Result, document, main, medians
from ours import Prompts, daemon

from spilld import AsyncClient, Token
from spilld.demo.demo import MODEL
from spilld.models.catalog import default_cache, resolve
from spilld.offload.record import Element

BENCH = "gap"
SHORT, LONG = 512, 7500
TEXT_TOKENS = 40_000
MAX_GAP_MS = 250
UNBOUNDED_MS = 3_600_000
SLACK = 1.2
LEAST_RATE = 0.6
"""Of a prefill beside the stream, to one alone."""


async def prefill_s(client: AsyncClient, prompt: list[int]) -> float:
    began = time.perf_counter()
    await client.generate(prompt, max_tokens=1, ignore_eos=True).text()
    return time.perf_counter() - began


async def beside(address: str, prompts: Prompts) -> dict[str, float]:
    """Milliseconds between the stream's tokens, seconds of the long prompt."""
    async with AsyncClient(address) as client:
        stream = client.generate(prompts.next(SHORT), max_tokens=4000, ignore_eos=True)
        arrivals: list[float] = []

        async def follow() -> None:
            async for event in stream:
                if isinstance(event, Token):
                    arrivals.append(time.perf_counter())  # noqa: PERF401 (others look at it meanwhile)

        following = asyncio.create_task(follow())
        while len(arrivals) < 16:
            await asyncio.sleep(0.01)
        began = len(arrivals) - 1
        seconds = await prefill_s(client, prompts.next(LONG))
        seen = arrivals[began:]
        following.cancel()
        await stream.aclose()
    gaps = [1e3 * (b - a) for a, b in pairwise(seen)]
    return {"p99_ms": statistics.quantiles(gaps, n=100)[98], "prefill_s": seconds}


async def alone(address: str, prompts: Prompts) -> dict[str, float]:
    async with AsyncClient(address) as client:
        return {"prefill_s": await prefill_s(client, prompts.next(LONG))}


def measure() -> tuple[dict[str, float], list[Result]]:
    folder = resolve(MODEL, default_cache(), Element.BFLOAT16)
    prompts = Prompts(document(folder, TEXT_TOKENS))
    with ExitStack() as stack:
        bounded, unbounded = (
            daemon(stack, folder, max_gap_ms=gap, device_budget="64MiB") for gap in (MAX_GAP_MS, UNBOUNDED_MS)
        )
        found = medians(
            {
                "bounded": lambda: asyncio.run(beside(bounded, prompts)),
                "unbounded": lambda: asyncio.run(beside(unbounded, prompts)),
                "alone": lambda: asyncio.run(alone(bounded, prompts)),
            }
        )
    result = partial(Result, bench=BENCH, case=f"a prompt of {LONG} tokens beside one stream")
    return {}, [
        result(
            metric="gap, 99th percentile",
            unit="ms",
            ours=found["bounded"]["p99_ms"],
            baseline=found["unbounded"]["p99_ms"],
            goal=Goal("ours", SLACK * MAX_GAP_MS),
        ),
        result(
            metric="its prefill, against alone",
            unit="s",
            ours=found["bounded"]["prefill_s"],
            baseline=found["alone"]["prefill_s"],
            goal=Goal("ratio", 1 / LEAST_RATE),
        ),
    ]


if __name__ == "__main__":
    main(__doc__ or "", measure)
