"""What one request has used of the machine: bytes read, and seconds."""

from __future__ import annotations

from spilld.kv.batch import BatchItem


class ResourceUse:
    """What one request has used of the machine.

    Attributes:
        read_bytes: KV that it attended to, by the tier that it was read from.
        disk_read_bytes: Its share of the bytes that steps read from disk.
        prefetch_hits: Extents that were in memory when attention came to them.
        prefetch_stalls: Extents that attention had to wait for.
        stall_s: Its share of the time in which steps waited for the disk.
        engine_s: Its share of the engine's time, by cost.
        queue_s: Seconds that it waited for its first step; None before.
        prefill_s: Wall time of steps before its first token.
        decode_s: Wall time of steps after it.
    """

    def __init__(self) -> None:
        self.read_bytes = {"device": 0, "host": 0, "disk": 0}
        self.disk_read_bytes = 0
        self.prefetch_hits = 0
        self.prefetch_stalls = 0
        self.stall_s = 0.0
        self.engine_s = 0.0
        self.queue_s: float | None = None
        self.prefill_s = 0.0
        self.decode_s = 0.0

    def add(
        self, part: BatchItem, disk_read: int, stalled_s: float, took_s: float, *, decoding: bool
    ) -> None:
        """Add its part of a step that took `took_s` seconds."""
        for tier, count in part.read_bytes.items():
            self.read_bytes[tier] += count
        self.prefetch_hits += part.hits
        self.prefetch_stalls += part.stalls
        self.disk_read_bytes += disk_read
        self.stall_s += stalled_s
        if decoding:
            self.decode_s += took_s
        else:
            self.prefill_s += took_s
