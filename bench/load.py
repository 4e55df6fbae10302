"""Many requests at once: how long do all take, against vLLM, and does a greedy client leave another its half?

SmolLM2-135M in bfloat16, two threads, format k8v4, all KV in host memory; prompts of 512 tokens, each with
another beginning, answers of 64.

- 16 requests: all are there at the start; seconds until the last answer is whole. Against vLLM on the same
  weights and CPU, two processes that take turns, medians of 3. `make bench-peers` builds vLLM; without it
  there is no baseline, and the case says why.
- a greedy client: it has 40 requests open at all times, another has 4, for a minute; four are computed at a
  time. By how much the other's share of the engine's seconds, as `usage.engine_ms` has them, is off a half.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from harness import Goal, Result, document, main, medians, say
from ours import THREADS, Prompts, daemon
from peers import PEERS
from systems.child import Child, NotRun

from spilld import AsyncClient
from spilld.demo.demo import MODEL, Shape
from spilld.models.catalog import default_cache, resolve
from spilld.offload.record import Element

BENCH = "load"
REQUESTS, PROMPT, ANSWER = 16, 512, 64
TEXT_TOKENS = 110_000
CONTEXT = 8192

GREEDY, MODEST, WINDOWS = 40, 4, 4
FAIR_S = 60.0
UNFAIR = 10.0
"""Percent."""

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


async def engine_s(address: str, prompts: Prompts, requests: int) -> float:
    """That a client with so many requests open at all times takes in FAIR_S seconds, of those that ended."""
    until, taken = time.monotonic() + FAIR_S, 0.0

    async def one_after_another(client: AsyncClient) -> None:
        nonlocal taken
        while time.monotonic() < until:
            stream = client.generate(prompts.next(PROMPT), max_tokens=ANSWER, ignore_eos=True)
            await stream.text()
            if time.monotonic() < until:
                taken += stream.result.usage.engine_ms / 1e3

    async with AsyncClient(address) as client:
        await asyncio.gather(*(one_after_another(client) for _ in range(requests)))
    return taken


async def greedy(address: str, prompts: Prompts) -> dict[str, float]:
    one, other = await asyncio.gather(*(engine_s(address, prompts, count) for count in (GREEDY, MODEST)))
    say(f"a client with {GREEDY} requests took {one:.1f} s of the engine, one with {MODEST} {other:.1f} s")
    return {"off": abs(100 * (2 * other / (one + other) - 1))}


def fairness(folder: Path, prompts: Prompts) -> Result:
    """Percent by which the share of the client with fewer requests is off a half."""
    with ExitStack() as stack:
        budget = Shape.of(folder).window_bytes(Element.BFLOAT16) * WINDOWS
        address = daemon(stack, folder, device_budget=budget, max_open=2 * GREEDY, max_queue=2 * GREEDY)
        found = medians({"greedy": lambda: asyncio.run(greedy(address, prompts))}, repeats=1)
    return Result(
        bench=BENCH,
        metric="a greedy client",
        case=f"{GREEDY} requests against {MODEST}: the share of these, off a half",
        unit="%",
        ours=found["greedy"]["off"],
        goal=Goal("ours", UNFAIR),
    )


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
        ),
        fairness(folder, prompts),
    ]


if __name__ == "__main__":
    main(__doc__ or "", measure)
