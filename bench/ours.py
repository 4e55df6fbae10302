"""spilld as one of the systems of peers.py, and its concurrent streams."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from harness import Goal, Result, say
from rows import BENCH, COUNT, overlap_ms

from spilld import AsyncClient, Client, Token
from spilld.demo.spawn import spawned

THREADS = 2
STRIDE = 397
"""Tokens between the beginnings of two prompts."""

STREAMS = 8
STREAM_TOKENS = 2048
"""Of each."""

STREAMS_GOAL = 1 / 2


@dataclass
class Prompts:
    """Stretches of a text, each with another beginning."""

    text: Sequence[int]
    taken: int = 0

    def next(self, tokens: int) -> list[int]:
        """Raises ValueError if the text is too short for another one."""
        start = self.taken * STRIDE
        if start + tokens > len(self.text):
            raise ValueError(f"no {tokens} tokens from {start} on in a text of {len(self.text)}")
        self.taken += 1
        return list(self.text[start : start + tokens])


def daemon(stack: ExitStack, folder: Path, **settings: object) -> str:
    """The address of ours."""
    fixed = {"model": folder, "format": "k8v4", "dtype": "bfloat16", "threads": THREADS, "disk_budget": 0}
    return stack.enter_context(spawned({**fixed, **settings})).address


def ask(client: Client, prompt: Sequence[int], count: int) -> list[float]:
    """Raises RuntimeError if anything was reused, or lies on disk."""
    asked = time.perf_counter()
    stream = client.generate(prompt, max_tokens=count, ignore_eos=True)
    arrivals = [time.perf_counter() - asked for event in stream if isinstance(event, Token)]
    usage = stream.result.usage
    if usage.cached_tokens or usage.kv_bytes["disk"] or len(arrivals) != count:
        raise RuntimeError(f"not a whole prefill in memory and {count} tokens: {usage}")
    return arrivals


async def decode_together(client: AsyncClient, contexts: Sequence[str], token: int) -> float:
    """Milliseconds a token of all the contexts together."""

    async def stream(context: str) -> list[float]:
        events = client.generate([token], context=context, max_tokens=COUNT + 1, ignore_eos=True)
        return [time.perf_counter() async for event in events if isinstance(event, Token)]

    return overlap_ms(await asyncio.gather(*map(stream, contexts)))


async def streams(address: str, prompts: Prompts) -> tuple[float, float]:
    """Milliseconds a token of one stream, and of STREAMS together."""
    async with AsyncClient(address) as client:
        contexts = []
        for _ in range(1 + STREAMS):
            kept = client.generate(prompts.next(STREAM_TOKENS), keep=True, max_tokens=1, ignore_eos=True)
            await kept.text()
            contexts.append(str(kept.result.context))
        token = prompts.text[0]
        one = await decode_together(client, contexts[:1], token)
        return one, await decode_together(client, contexts[1:], token)


def measure_streams(folder: Path, prompts: Prompts, repeats: int) -> Result:
    """Windows for all streams are on the device."""
    with ExitStack() as stack:
        address = daemon(stack, folder, device_budget="1GiB")
        found = [asyncio.run(streams(address, prompts)) for _ in range(repeats)]
    say(f"one stream and {STREAMS}, ms/token: {found}")
    one, all_of_them = (statistics.median(times) for times in zip(*found, strict=True))
    return Result(
        bench=BENCH,
        metric=f"{STREAMS} streams",
        case=f"{STREAM_TOKENS} tokens each, against one stream",
        unit="ms/token",
        ours=all_of_them,
        baseline=one,
        goal=Goal("ratio", STREAMS_GOAL),
    )
