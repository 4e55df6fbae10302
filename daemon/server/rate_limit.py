"""Rate limits: a token bucket for each name, kept as one moment in time (GCRA, ITU-T I.371)."""

from __future__ import annotations

PRUNE = 1024
"""How many names are kept before those with a full bucket are removed."""


class Throttle:
    """Token buckets that hold a second's worth of tokens, at least one; `rate` more come in a second.

    Only the moment at which a bucket will be full again is kept, and that only until then: any number of
    names may come and go. Its rate is kept beside it: a bucket whose rate changes lacks as many tokens as
    before, or as many as it can hold now. Times are seconds of any clock that does not go back.
    """

    def __init__(self) -> None:
        self._full_at: dict[str | bytes, tuple[float, float]] = {}
        self._prune_at = PRUNE

    def take(self, name: str | bytes, rate: float, now: float) -> bool:
        """Take a token from the bucket of a name; False, and nothing is taken, if it is empty."""
        full_at, was = self._full_at.get(name, (now, rate))
        most = max(1.0, rate)
        lacks = min(max(0.0, full_at - now) * was, most)
        taken = lacks + 1 <= most + 1e-9 * rate
        if taken or rate != was:
            self._full_at[name] = now + (lacks + taken) / rate, rate
        if len(self._full_at) > self._prune_at:
            self._prune(now)
        return taken

    def __len__(self) -> int:
        """How many names are kept."""
        return len(self._full_at)

    def _prune(self, now: float) -> None:
        self._full_at = {name: kept for name, kept in self._full_at.items() if kept[0] > now}
        self._prune_at = max(PRUNE, 2 * len(self._full_at))
