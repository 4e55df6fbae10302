"""Ends an answer before the text that its request names."""

from __future__ import annotations

from collections.abc import Sequence

from spilld.errors import InvalidRequest


class StopStrings:
    """Cuts a stream of text before the stop string that is complete first.

    Where the text is split into pushes does not matter. Of two stop strings complete at once the longer
    counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise InvalidRequest("a stop string must not be empty")
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._kept = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text. Nothing may be pushed after a hit.

        Returns:
            The text that can be shown now, and the stop string that was hit, if any.
        """
        kept = self._kept + text
        hits = [(kept.index(stop) + len(stop), stop) for stop in self._stops if stop in kept]
        if hits:
            end, hit = min(hits, key=lambda found: found[0])  # min keeps the first, thus the longest
            self._kept = ""
            return kept[: end - len(hit)], hit
        keep = max((_overlap(kept, stop) for stop in self._stops), default=0)
        self._kept = kept[len(kept) - keep :]
        return kept[: len(kept) - keep], None

    def finish(self) -> str:
        """Return the text kept back that turned out not to be a stop string."""
        kept, self._kept = self._kept, ""
        return kept


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of text that is a prefix of stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
