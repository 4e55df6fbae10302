"""A token bucket: how many bytes may be moved in the long run, and how many at once."""

from __future__ import annotations

from collections.abc import Callable


class Bucket:
    """Bytes to spend: at most `capacity`, which comes back over period_s seconds of the clock.

    More may be spent than is left, by whom cannot wait: the debt is paid off first. A clock that is set back
    brings nothing and takes nothing.
    """

    def __init__(
        self, capacity: float, period_s: float, clock: Callable[[], float], spent: float = 0.0
    ) -> None:
        """Full but for what was spent."""
        self.capacity = capacity
        self._rate = capacity / period_s
        self._clock = clock
        self._left = capacity - spent
        self._at = clock()

    @property
    def left(self) -> float:
        """Bytes that may be spent now; a debt is negative."""
        now = self._clock()
        self._left = min(self.capacity, self._left + self._rate * max(0.0, now - self._at))
        self._at = now
        return self._left

    def spend(self, nbytes: int) -> None:
        self._left = self.left - nbytes
