"""How long do a running answer and a `hello` wait while a client sends what is long to read?

SmolLM2-135M in bfloat16, all KV in host memory. One stream generates; beside it another process sends what
the model cannot take: a text of 15 MB or 600,000 messages, which are refused unread, or 60 kB of text, which
is refused once it is tokenised. Gaps are those between the stream's tokens until then; `hello` is asked every
50 ms by the stream's client. Baseline: the same daemon for some seconds in which nobody sends anything.
Medians of 3, which take turns.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pydoc_data.topics import topics

from harness import Goal, Result, document, in_child, main, medians
from ours import Prompts, daemon

from spilld import AsyncClient, Client, Token
from spilld.demo.demo import MODEL
from spilld.errors import FrameTooLarge, PromptTooLong
from spilld.models.catalog import default_cache, resolve
from spilld.offload.record import Element
from spilld.protocol.messages import Message

BENCH = "intake"
SHORT, TEXT_TOKENS = 512, 40_000
MAX_GAP_MS = 250
SLACK = 1.2
HELLO_MS = 100.0
ASKED_EVERY_S = 0.05
QUIET_S = 3.0
NOTHING = "nothing"
CASES = ("15 MB of text", "600,000 messages", "60 kB of text")


def send(address: str, case: str) -> None:
    """In a process of its own: to make and pack what is sent takes a core, too."""
    if case == NOTHING:
        time.sleep(QUIET_S)
        return
    text = "".join(topics[name] for name in sorted(topics))
    prompt: str | list[Message] = text[:60_000]
    if case == CASES[0]:
        prompt = (text * 30)[:15_000_000]
    elif case == CASES[1]:
        prompt = [Message(role="user", content="")] * 600_000
    with Client(address) as client:
        try:
            client.generate(prompt, max_tokens=1).text()
        except (PromptTooLong, FrameTooLarge):
            return


async def beside(address: str, prompts: Prompts, case: str) -> dict[str, float]:
    """The longest gap between the stream's tokens, and the longest wait for a `hello`, in milliseconds."""
    async with AsyncClient(address) as client:
        stream = client.generate(prompts.next(SHORT), max_tokens=4000, ignore_eos=True)
        arrivals: list[float] = []
        waits: list[float] = []

        async def follow() -> None:
            async for event in stream:
                if isinstance(event, Token):
                    arrivals.append(time.perf_counter())  # noqa: PERF401 (others look at it meanwhile)

        async def greet() -> None:
            while True:
                asked = time.perf_counter()
                await client.hello()
                waits.append(1e3 * (time.perf_counter() - asked))
                await asyncio.sleep(ASKED_EVERY_S)

        following = asyncio.create_task(follow())
        while len(arrivals) < 16:
            await asyncio.sleep(0.01)
        began = len(arrivals) - 1
        greeting = asyncio.create_task(greet())
        await asyncio.to_thread(in_child, send, address, case)
        seen = arrivals[began:]
        for task in (greeting, following):
            task.cancel()
        await stream.aclose()
    return {"gap_ms": max(1e3 * (b - a) for a, b in pairwise(seen)), "hello_ms": max(waits)}


def measure() -> tuple[dict[str, float], list[Result]]:
    folder = resolve(MODEL, default_cache(), Element.BFLOAT16)
    prompts = Prompts(document(folder, TEXT_TOKENS))
    with ExitStack() as stack:
        address = daemon(stack, folder, max_gap_ms=MAX_GAP_MS, device_budget="64MiB")
        found = medians(
            {
                case: partial(lambda case: asyncio.run(beside(address, prompts, case)), case)
                for case in (NOTHING, *CASES)
            }
        )
    return {}, [
        Result(
            bench=BENCH,
            metric=metric,
            case=case,
            unit="ms",
            ours=found[case][name],
            baseline=found[NOTHING][name],
            goal=Goal("ours", at_most),
        )
        for name, metric, at_most in (
            ("gap_ms", "longest gap", SLACK * MAX_GAP_MS),
            ("hello_ms", "longest hello", HELLO_MS),
        )
        for case in CASES
    ]


if __name__ == "__main__":
    main(__doc__ or "", measure)
