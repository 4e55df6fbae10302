"""The budget of writes to disk a day: flash endures a limited number of writes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from spilld.offload.disk.index.index import Index
from spilld.offload.errors import IndexDamaged
from spilld.offload.prefix_cache.frequency_sketch import Sketch

from .token_bucket import Bucket

log = logging.getLogger(__name__)

DAY_S = 86400.0


class WriteBudget:
    """Bytes that may be written in a day, for runs; what the index takes is not counted.

    The bucket holds one day's bytes: after an idle day so much may be written at once. Any 24 hours thus see
    two budgets at most and a longer time one a day, but for writes that host memory waits for: they are never
    refused, and what they take beyond what is left is paid off before anything else is written.

    Writes that nothing waits for are free while more than half is left. Below, only contents that were
    offered before are written, because many are never asked for again; and none that exceeds what is left.
    Such admission is usual in front of flash: CacheLib (Berg et al., OSDI 2020) refuses at random so as to
    meet a rate of writes (DynamicRandomAP), or what it has not seen lately (RejectFirstAP); Flashield
    (Eisenman et al., NSDI 2019) what is not expected to be read. Which contents were offered is forgotten
    when the process ends; what was spent is not.
    """

    def __init__(self, daily_bytes: int, index: Index, clock: Callable[[], float] = time.time) -> None:
        """Begin with what earlier processes left.

        Args:
            daily_bytes: The budget of a day.
            index: Where the spending is noted.
            clock: Seconds since 1970, which are compared with those that earlier processes noted.
        """
        self.daily_bytes = daily_bytes
        self.refused = 0
        self._index = index
        self._clock = clock
        self._bucket = Bucket(daily_bytes, DAY_S, clock, self._spent_before())
        self._offers = Sketch()

    @property
    def left_bytes(self) -> int:
        """Bytes that may be written now; 0 while there is a debt."""
        return max(0, int(self._bucket.left))

    @property
    def comfortable(self) -> bool:
        """Whether more than half is left."""
        return self._bucket.left > self.daily_bytes / 2

    def admits(self, content: bytes, nbytes: int, *, again: bool = False) -> bool:
        """Return whether a write that nothing waits for may begin.

        Each request offers a content once.

        Args:
            content: The name of what the write begins with.
            nbytes: The bytes of the write.
            again: Whether the content was offered before by the same request: neither it nor its refusal is
                counted again.
        """
        if not again:
            self._offers.add(content)
        left = self._bucket.left
        admitted = nbytes <= left and (left > self.daily_bytes / 2 or self._offers.count(content) > 1)
        self.refused += not (admitted or again)
        return admitted

    def spend(self, nbytes: int) -> None:
        """Count a write that begins; the index notes it with its next transaction."""
        self._bucket.spend(nbytes)
        self._index.note_spent(math.ceil(self.daily_bytes - self._bucket.left), int(self._clock()))

    def _spent_before(self) -> float:
        """Return what earlier processes spent and time has not brought back."""
        try:
            spent, at = self._index.spent()
        except (OSError, IndexDamaged) as error:
            log.warning("what was written before is not known: %s", error)
            return 0.0
        return max(0.0, spent - self.daily_bytes * max(0.0, self._clock() - at) / DAY_S)
