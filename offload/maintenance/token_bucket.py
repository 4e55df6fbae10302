"""A token bucket: how many bytes may be moved in the long run, and how many at once."""

from __future__ import annotations

from collections.abc import Callable


class Bucket:
    """A budget of at most `capacity` bytes, which is refilled over period_s seconds of the clock.

    More may be spent than is left, by writes that cannot wait: the debt is paid off first. A clock that is
    set back neither adds nor takes anything.
    """

    def __init__(
        self, capacity: float, period_s: float, clock: Callable[[], float], spent: float = 0.0
    ) -> None:
        """Begin with a full bucket, less what was spent."""
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
        """Take bytes out of the bucket."""
        self._left = self.left - nbytes
