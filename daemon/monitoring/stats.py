"""The engine's statistics: what it has counted since it began, and what other threads may read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from spilld.errors import Cancelled
from spilld.protocol.messages import (
    Accepted,
    Done,
    Event,
    Failed,
    Token,
)

TIERS = ("device", "host", "disk")

OUTCOMES = ("eos", "stop", "length", "cancelled", "failed")
"""How a request ends: by the reason of its Done, or by a Failed."""


@dataclass(frozen=True)
class EngineStats:
    """What other threads read of the engine: published with each batch of events, and once a turn.

    Attributes:
        longest: The most tokens that one sequence may have.
        requests_running: Requests that are computed together.
        requests_paused: Requests whose clients take no more events for now.
        requests_waiting: Requests that wait, for whatever reason.
        memory_short: 1 while the kernel has less memory left than `memory_floor`.
        contexts_idle: Sequences in memory on which no request runs.
        workspace_bytes: What a prefill chunk takes besides windows and records.
        counters: Counters.values() at that time.
        tiers: Bytes and counters of the device, host and disk tiers.
    """

    longest: int
    requests_running: int
    requests_paused: int
    requests_waiting: int
    memory_short: int
    contexts_idle: int
    workspace_bytes: int
    counters: Mapping[str, int]
    tiers: Mapping[str, object]

    def values(self) -> dict[str, object]:
        """Return all statistics by name."""
        return {
            "requests_running": self.requests_running,
            "requests_paused": self.requests_paused,
            "requests_waiting": self.requests_waiting,
            "memory_short": self.memory_short,
            "contexts_idle": self.contexts_idle,
            "workspace_bytes": self.workspace_bytes,
            **self.counters,
            **self.tiers,
        }


@dataclass
class Counters:
    """What the engine has done since it began. Its own thread counts and reads.

    Attributes:
        prompt_tokens: Tokens of prompts that were admitted.
        cached_tokens: Of contexts and prompts, those that needed no prefill.
        generated_tokens: Tokens of answers.
        computed_tokens: Tokens of prompts and answers, each as often as it was computed.
        prefix_hits: New contexts whose beginning was stored.
        prefix_misses: New contexts of which no beginning was stored.
        recomputations: Times that lost KV was computed again.
        preemptions: Running requests that made room for others.
        ended: Requests by outcome.
        attended_bytes: KV by the tier that it was read from.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    recomputations: int = 0
    preemptions: int = 0
    ended: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    attended_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))

    def event(self, event: Event, computed: int) -> None:
        """Count an event of a request.

        Args:
            event: The event, whether or not a client receives it.
            computed: Tokens computed since the request's last event.
        """
        self.computed_tokens += computed
        match event:
            case Token():
                self.generated_tokens += 1
            case Accepted():
                self.prompt_tokens += event.prompt_tokens
                self.cached_tokens += event.cached_tokens
            case Done():
                self.ended[event.reason] += 1
            case Failed():
                self.ended["cancelled" if event.code == Cancelled.code else "failed"] += 1

    def attended(self, read_bytes: Mapping[str, int]) -> None:
        """Count KV that attention has read, bytes by tier."""
        for tier, count in read_bytes.items():
            self.attended_bytes[tier] += count

    def values(self) -> dict[str, int]:
        """Return all counters by name: requests_eos, host_attended_bytes, ..."""
        return {
            **{name: value for name, value in vars(self).items() if isinstance(value, int)},
            **{f"requests_{outcome}": count for outcome, count in self.ended.items()},
            **{f"{tier}_attended_bytes": count for tier, count in self.attended_bytes.items()},
        }
