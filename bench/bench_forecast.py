"""How well does the daemon know, when it admits a request, how long its tokens will take?

SmolLM2-135M in bfloat16, format k8v4, two daemons: one with all KV in host memory, one with the demo's
budgets, most of a long context on disk. Each first answers one request of 1,000 tokens, from which it
learns the machine. Then requests are sent, one after the other or four at once. `accepted` carries what is
expected: seconds to the first token, and from one token to the next. The baseline is what the client then
saw: from `accepted` to the first token, and the mean gap while all of them decode. Medians of 3 of each, of
four at once the mean.

The last rows are the factor by which the worst case is off, either way. Nothing physical bounds it.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from harness import Goal, Result, document, main, medians, say
from ours import Prompts
from rows import overlap_ms

from spilld import Accepted, AsyncClient, Token
from spilld.demo.demo import MODEL, budgets
from spilld.demo.spawn import spawned
from spilld.models.catalog import default_cache, resolve
from spilld.offload.record import Element, Format

BENCH = "forecast"
LESSON = 1000
ALONE = (400, 2000, 6000)
TOGETHER, AT_ONCE = 1500, 4
ANSWER = 128
OF_THE_DEMO = 7600
TEXT_TOKENS = 40_000
FACTOR = 2.0
HOST = "KV in host memory"


@dataclass(frozen=True)
class Seen:
    """Of one request, seconds."""

    first_token_s: float
    token_s: float
    saw_first_token_s: float
    arrivals: list[float]


async def ask(client: AsyncClient, prompt: Sequence[int]) -> Seen:
    """Raises RuntimeError if nothing is expected, or something was reused."""
    accepted, at, arrivals = None, 0.0, []
    async for event in client.generate(prompt, max_tokens=ANSWER, ignore_eos=True):
        if isinstance(event, Accepted):
            accepted, at = event, time.perf_counter()
        elif isinstance(event, Token):
            arrivals.append(time.perf_counter())
    if (
        accepted is None
        or accepted.cached_tokens
        or accepted.first_token_s is None
        or accepted.token_s is None
    ):
        raise RuntimeError(f"nothing is to be learnt from {accepted}")
    return Seen(accepted.first_token_s, accepted.token_s, arrivals[0] - at, arrivals)


async def ask_at_once(address: str, prompts: Sequence[Sequence[int]]) -> list[Seen]:
    async with AsyncClient(address) as client:
        return list(await asyncio.gather(*(ask(client, prompt) for prompt in prompts)))


def measure_case(address: str, prompts: Prompts, tokens: int, count: int) -> dict[str, float]:
    seen = asyncio.run(ask_at_once(address, [prompts.next(tokens) for _ in range(count)]))
    names = ("first_token_s", "token_s", "saw_first_token_s")
    return {
        **{name: statistics.mean(getattr(each, name) for each in seen) for name in names},
        "saw_token_s": overlap_ms([each.arrivals for each in seen]) * count / 1e3,
    }


async def teach(address: str, prompt: Sequence[int]) -> None:
    async with AsyncClient(address) as client:
        await client.generate(prompt, max_tokens=ANSWER, ignore_eos=True).text()


def measure() -> tuple[dict[str, float], list[Result]]:
    folder = resolve(MODEL, default_cache(), Element.BFLOAT16)
    prompts = Prompts(document(folder, TEXT_TOKENS))
    fixed = {"model": folder, "format": "k8v4", "dtype": "bfloat16"}
    settings = {
        HOST: {**fixed, "disk_budget": 0},
        "the demo's budgets": {**fixed, **budgets(folder, OF_THE_DEMO, Format.K8V4, Element.BFLOAT16)},
    }
    contenders = {}
    with ExitStack() as stack:
        for place, options in settings.items():
            address = stack.enter_context(spawned(options)).address
            asyncio.run(teach(address, prompts.next(LESSON)))
            say(f"{place}: the machine is known")
            for tokens in ALONE:
                one = partial(measure_case, address, prompts, tokens, 1)
                contenders[f"{tokens} tokens, {place}"] = one
            if place == HOST:
                some = partial(measure_case, address, prompts, TOGETHER, AT_ONCE)
                contenders[f"{AT_ONCE} of {TOGETHER} tokens at once, {place}"] = some
        found = medians(contenders)
    return {}, [line for metric in METRICS for line in results(metric, found)]


METRICS = {"first token": "first_token_s", "each token": "token_s"}


def results(metric: str, found: dict[str, dict[str, float]]) -> list[Result]:
    name, worst = METRICS[metric], 1.0
    lines = []
    for case, times in found.items():
        expected, saw = times[name], times[f"saw_{name}"]
        worst = max(worst, expected / saw, saw / expected)
        lines.append(Result(bench=BENCH, metric=metric, case=case, unit="s", ours=expected, baseline=saw))
    off = Result(
        bench=BENCH,
        metric=metric,
        case="off by, at most",
        unit="times",
        ours=worst,
        goal=Goal("ours", FACTOR),
    )
    return [*lines, off]


if __name__ == "__main__":
    main(__doc__ or "", measure)
