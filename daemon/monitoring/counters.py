"""What an engine has done since it began, in numbers."""

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


@dataclass
class Tally:
    """The engine's thread counts; any thread may read.

    cached_tokens: of contexts and prompts, those that needed no prefill. computed_tokens: of prompts and
    answers, each as often as it was computed. prefix_hits, prefix_misses: new contexts whose beginning was
    stored, or not. recomputations: lost KV that was computed again. preemptions: running requests that made
    way for others. attended_bytes: KV, by the tier that it was read from.
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
        """One that a request has had, told to anybody or not.

        computed: tokens since its last. They count with it: a look meanwhile finds both or neither.
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
        for tier, count in read_bytes.items():
            self.attended_bytes[tier] += count

    def stats(self) -> dict[str, object]:
        """All of it by name: requests_eos, host_attended_bytes, ..."""
        return {
            **{name: value for name, value in vars(self).items() if isinstance(value, int)},
            **{f"requests_{outcome}": count for outcome, count in self.ended.items()},
            **{f"{tier}_attended_bytes": count for tier, count in self.attended_bytes.items()},
        }
