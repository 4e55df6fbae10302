"""A read of one extent, from its submission until its buffer is released."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from spilld.offload.disk.files.extent import RunKey, RunPlace
from spilld.offload.errors import ReadFailed
from spilld.offload.system import Bytes


@dataclass(frozen=True)
class ExtentRead:
    """One layer of a run."""

    run: RunKey
    layer: int


class ReadState(enum.Enum):
    """State of a read; the values complete the phrase "a ticket that ..."."""

    QUEUED = "waits for a buffer"
    ISSUED = "has a buffer, and a thread has it or will"
    LOADED = "its records lie in its buffer"
    FAILED = "ended with an error; holds nothing"
    CANCELLED = "no longer wanted; holds nothing"
    RELEASED = "its buffer went back; holds nothing"


class Ticket:
    """A read that was submitted. For the owner thread only, except `wanted`, which I/O threads read."""

    def __init__(self, read: ExtentRead) -> None:
        self.read = read
        self.state = ReadState.QUEUED
        self.error: ReadFailed | None = None
        self.wanted = True
        self.stalled = False
        self.issued = 0.0
        self.place: RunPlace | None = None
        self.buffer = -1
        self.records: Bytes | None = None


@dataclass
class PrefetchStats:
    """What the prefetcher has done so far.

    Attributes:
        reads: Reads that succeeded.
        bytes_read: Their bytes.
        read_seconds: Sum over threads.
        hits: Waits for reads that had ended already.
        stalls: Waits that blocked.
        stall_seconds: Sum over waits that blocked.
        failures: Reads that failed; cancelled ones are not counted.
        corrupt: Those of the failures in which something else was read than was written.
    """

    reads: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    hits: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    failures: int = 0
    corrupt: int = 0
