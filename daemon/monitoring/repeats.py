"""Repeated log records are counted instead of written."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

BURST = 20
"""Records of one kind that are written within SPAN_S."""

SPAN_S = 60.0

KINDS = 1000
"""The most kinds of records that are counted separately; beyond that, counting starts again."""


@dataclass
class _RepeatCount:
    since: float
    written: int = 0
    left_out: int = 0


class RepeatFilter(logging.Filter):
    """A handler's filter that writes at most BURST alike warnings and errors a minute.

    Records are alike if they differ only in their arguments. The next minute's first says how many were not
    written.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[object, ...], _RepeatCount] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is written."""
        if record.levelno < logging.WARNING:
            return True
        raised = record.exc_info[0] if record.exc_info else None
        kind = record.name, record.levelno, str(record.msg), raised
        with self._lock:
            return self._count(record, kind)

    def _count(self, record: logging.LogRecord, kind: tuple[object, ...]) -> bool:
        now = self._clock()
        if len(self._seen) >= KINDS and kind not in self._seen:
            self._seen.clear()
        seen = self._seen.setdefault(kind, _RepeatCount(now))
        if now - seen.since >= SPAN_S:
            if seen.left_out:
                record.msg = f"{record.msg} ({seen.left_out} more like this were not written)"
            self._seen[kind] = seen = _RepeatCount(now)
        if seen.written >= BURST:
            seen.left_out += 1
            return False
        seen.written += 1
        return True
