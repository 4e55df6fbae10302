"""Sixteen requests at once: how long until all have their answers, against vLLM on the same weights and CPU?

SmolLM2-135M in bfloat16, two threads, format k8v4, all KV in host memory; prompts of 512 tokens, each with
another beginning, answers of 64. All requests are there at the start. Two processes that take turns, medians
of 3. `make bench-peers` builds vLLM; without it there is no baseline, and the case says why.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing

from harness import Goal, Result, document, main, medians
from ours import THREADS, Prompts, daemon
from peers import PEERS
from systems.child import Child, NotRun

from spilld.daemon.catalog import default_cache, resolve
from spilld.daemon.client import AsyncClient
from spilld.daemon.demo import MODEL
from spilld.offload.record import Element

BENCH = "load"
REQUESTS, PROMPT, ANSWER = 16, 512, 64
TEXT_TOKENS = 60_000
CONTEXT = 8192

Batch = Sequence[Sequence[int]]


async def answer_all(address: str, prompts: Batch) -> float:
    """Seconds. Raises RuntimeError unless every answer has its tokens."""
    async with AsyncClient(address) as client:
        began = time.perf_counter()
        streams = [client.generate(prompt, max_tokens=ANSWER, ignore_eos=True) for prompt in prompts]
        await asyncio.gather(*(stream.text() for stream in streams))
        seconds = time.perf_counter() - began
    if any(stream.result.usage.generated_tokens != ANSWER for stream in streams):
        raise RuntimeError("an answer is too short")
    return seconds


def ours(address: str, prompts: Batch) -> dict[str, float]:
    return {"s": asyncio.run(answer_all(address, prompts))}


def theirs(child: Child, prompts: Batch) -> dict[str, float]:
    """Raises NotRun."""
    return {"s": max(child.generate(prompts, ANSWER))}


def measure() -> tuple[dict[str, float], list[Result]]:
    folder = resolve(MODEL, default_cache(), Element.BFLOAT16)
    prompts = Prompts(document(folder, TEXT_TOKENS))

    def batch() -> Batch:
        return [prompts.next(PROMPT) for _ in range(REQUESTS)]

    reason = ""
    with ExitStack() as stack:
        address = daemon(stack, folder, device_budget="512MiB", max_context=CONTEXT)
        contenders = {"ours": lambda: ours(address, batch())}
        try:
            child = stack.enter_context(closing(Child(PEERS, "vllm", [folder, CONTEXT, THREADS, REQUESTS])))
            theirs(child, batch())  # warms it up
            contenders["vLLM"] = lambda: theirs(child, batch())
        except NotRun as error:
            reason = f" (not run: {error})"
        ours(address, batch())
        found = medians(contenders)
    return {}, [
        Result(
            bench=BENCH,
            metric=f"{REQUESTS} requests",
            case=f"{PROMPT} tokens and {ANSWER} more each, against vLLM{reason}",
            unit="s",
            ours=found["ours"]["s"],
            baseline=None if reason else found["vLLM"]["s"],
            goal=None if reason else Goal("ratio", 1.0),
        )
    ]


if __name__ == "__main__":
    main(__doc__ or "", measure)
