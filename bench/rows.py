"""From the times of every system to the rows of a comparison: no clocks, no processes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from harness import Goal, Result

BENCH = "peers"
COUNT = 32
"""Decode steps that are timed."""

OURS = "spilld"
VLLM = "vLLM bf16"
TRANSFORMERS = "transformers bf16"
LLAMA_CPP = ("llama.cpp f16", "llama.cpp q8_0")

Metric = Literal["prefill", "decode"]
UNITS: Mapping[Metric, str] = {"prefill": "s", "decode": "ms/token"}


@dataclass(frozen=True)
class Case:
    """A prompt of so many tokens, timed as a whole, and COUNT decode steps at a context of so many.
    Goals are on the ratios of times."""

    prompt: int
    context: int
    decode_goal: float
    prefill_goals: tuple[float, float] | None = None
    """Against llama.cpp, against vLLM."""

    @property
    def count(self) -> int:
        """Tokens to generate: the first ends the prefill, the last COUNT are timed."""
        return 1 + self.context - self.prompt + COUNT

    def name(self, metric: Metric) -> str:
        return f"{self.prompt if metric == 'prefill' else self.context} tokens"


@dataclass(frozen=True)
class Times:
    """Of one request: seconds, milliseconds a token."""

    prefill: float
    decode: float

    @classmethod
    def of(cls, arrivals_s: Sequence[float]) -> Times:
        """arrivals_s: seconds from the request to each of its tokens, at least COUNT + 1.

        Raises ValueError if there are fewer.
        """
        if len(arrivals_s) <= COUNT:
            raise ValueError(f"{len(arrivals_s)} tokens came, not more than {COUNT}")
        return cls(arrivals_s[0], 1e3 * (arrivals_s[-1] - arrivals_s[-1 - COUNT]) / COUNT)


Runs = Mapping[str, Sequence[Times]]
"""By system, one after the other."""


def numbers(runs: Runs, system: str, metric: Metric) -> list[float]:
    return [getattr(times, metric) for times in runs.get(system, ())]


def best(runs: Runs, systems: Sequence[str], metric: Metric) -> str | None:
    """The system with the smallest median; None if none of them ran."""
    medians = {
        system: statistics.median(seen) for system in systems if (seen := numbers(runs, system, metric))
    }
    return min(medians, key=medians.__getitem__, default=None)


def rows(
    case: Case, metric: Metric, runs: Runs, not_run: Mapping[str, str], limit: float | None
) -> list[Result]:
    """Ours against each other system, medians. The goal for llama.cpp is judged by the best of its KV types.

    not_run: systems without a number, and why; they have a row without a baseline.
    """
    goals = _goals(case, metric, best(runs, LLAMA_CPP, metric))
    return [
        Result(
            bench=BENCH,
            metric=metric,
            case=f"{case.name(metric)}, against {system}" + _why(not_run.get(system)),
            unit=UNITS[metric],
            ours=statistics.median(numbers(runs, OURS, metric)),
            baseline=statistics.median(seen) if (seen := numbers(runs, system, metric)) else None,
            limit=limit,
            goal=Goal("ratio", goals[system]) if seen and system in goals else None,
        )
        for system in dict.fromkeys((*runs, *not_run))
        if system != OURS
    ]


def _goals(case: Case, metric: Metric, llama_cpp: str | None) -> dict[str, float]:
    found = {}
    if metric == "decode":
        found = {llama_cpp: case.decode_goal}
    elif case.prefill_goals is not None:
        found = {llama_cpp: case.prefill_goals[0], VLLM: case.prefill_goals[1]}
    return {system: goal for system, goal in found.items() if system is not None}


def _why(reason: str | None) -> str:
    return "" if reason is None else f" (not run: {reason})"


def spread(runs: Runs) -> dict[str, dict[str, list[float]]]:
    """By system and metric, the least and the most."""
    return {
        system: {
            metric: [min(seen), max(seen)] for metric in UNITS if (seen := numbers(runs, system, metric))
        }
        for system in runs
    }


def overlap_ms(streams: Sequence[Sequence[float]]) -> float:
    """Milliseconds a token of all streams together, while all of them run: from the last one's first token to
    the first one's last. streams: the times in seconds, on one clock, when the tokens of each were there.

    Raises ValueError if there is no such time.
    """
    began = max(stream[0] for stream in streams)
    ended = min(stream[-1] for stream in streams)
    tokens = sum(began < at <= ended for stream in streams for at in stream)
    if not tokens:
        raise ValueError("the streams did not run at the same time")
    return 1e3 * (ended - began) / tokens
