"""How often one may: a token bucket for each name, as one moment in time (GCRA, ITU-T I.371)."""

from __future__ import annotations

PRUNE = 1024
"""How many names are kept at least, before those are forgotten that have a full bucket again."""


class Throttle:
    """A bucket holds a second's worth of tokens, at least one, and `rate` more come in a second.

    Only the moment at which a bucket will be full again is kept, and that only until then: any number of
    names may come and go. Times are seconds of any clock that does not go back.
    """

    def __init__(self) -> None:
        self._full_at: dict[str | bytes, float] = {}
        self._prune_at = PRUNE

    def take(self, name: str | bytes, rate: float, now: float) -> bool:
        """Take a token from the bucket of a name; False, and nothing is taken, if there is none."""
        full_at = max(now, self._full_at.get(name, now)) + 1 / rate
        if full_at - now > max(1.0, 1 / rate) + 1e-9:
            return False
        self._full_at[name] = full_at
        if len(self._full_at) > self._prune_at:
            self._prune(now)
        return True

    def __len__(self) -> int:
        """The names that are kept."""
        return len(self._full_at)

    def _prune(self, now: float) -> None:
        self._full_at = {name: moment for name, moment in self._full_at.items() if moment > now}
        self._prune_at = max(PRUNE, 2 * len(self._full_at))
