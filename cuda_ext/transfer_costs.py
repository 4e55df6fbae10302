"""Whether records in host memory are attended to on the device, after a copy, or by the CPU where they lie.

Both go on at once and their partial results merge, so the records of one layer and step are divided such
that the later of the two ends as early as possible. The rates are measured on the machine, not assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from spilld.cuda_ext.compile.variant import ROWS

PROMPT = 256
"""Queries that flash attention takes at a time, and was measured with."""


@dataclass(frozen=True)
class Rates:
    """Measured rates in bytes of records a second, and the fixed cost of a call in seconds."""

    fetch_bytes: float
    """Copied over PCIe and attended to on the device; the copies are the slower part."""
    fetch_s: float
    cpu_bytes: float
    """Attended to by the CPU, for the number of queries of the step."""
    cpu_s: float
    """Including the transfer of queries to the CPU and of partial results back."""

    def __post_init__(self) -> None:
        if min(self.fetch_bytes, self.cpu_bytes) <= 0 or min(self.fetch_s, self.cpu_s) < 0:
            raise ValueError(f"{self} are no rates")


class Costs(NamedTuple):
    """Rates as they depend on the number of queries, measured with one query and with ROWS."""

    one: Rates
    many: Rates
    copy_bytes: float
    """Bytes a second of the copies alone, which are made once for any number of queries."""
    flash_bytes: float = 0.0
    """Bytes a second of flash attention alone, with PROMPT queries; 0 without it."""

    def rates(self, queries: int, *, flash: bool = False) -> Rates:
        """Estimate the rates for a number of queries.

        For the CPU, seconds per byte grow linearly with the queries. The device takes ROWS of them at a time,
        or PROMPT by flash attention.

        Args:
            queries: How many queries there are.
            flash: Whether the device uses flash attention; ignored where it was not measured.
        """
        more = max(0, queries - 1) / (ROWS - 1)
        cpu = 1 / self.one.cpu_bytes + more * max(0, 1 / self.many.cpu_bytes - 1 / self.one.cpu_bytes)
        if flash and self.flash_bytes:
            fetched = 1 / self.copy_bytes + -(-queries // PROMPT) / self.flash_bytes
        else:
            tiles = -(-queries // ROWS)
            fetched = 1 / (self.one if queries == 1 else self.many).fetch_bytes
            fetched += (tiles - 1) * max(0, 1 / self.many.fetch_bytes - 1 / self.copy_bytes)
        return Rates(1 / fetched, self.one.fetch_s, 1 / cpu, self.one.cpu_s)


def to_fetch(records: int, record_bytes: int, rates: Rates, room: int) -> int:
    """Choose how many records to copy to the device; the CPU attends to the rest.

    Args:
        records: How many records there are.
        record_bytes: Size of one record in bytes.
        rates: The measured rates.
        room: How many records the device has slots for.
    """
    most = min(records, room)
    # Where both end at once: fetch_s + n * fetch = cpu_s + (records - n) * cpu.
    fetch, cpu = record_bytes / rates.fetch_bytes, record_bytes / rates.cpu_bytes
    even = (rates.cpu_s - rates.fetch_s + records * cpu) / (fetch + cpu)
    near = {min(max(n, 0), most) for n in (math.floor(even), math.ceil(even))}
    return min({0, most} | near, key=lambda n: (seconds(records, n, record_bytes, rates), n))


def seconds(records: int, fetched: int, record_bytes: int, rates: Rates) -> float:
    """Estimate the seconds until all records are attended to.

    Args:
        records: How many records there are.
        fetched: How many of them are copied to the device.
        record_bytes: Size of one record in bytes.
        rates: The measured rates.
    """
    fetch = rates.fetch_s + fetched * record_bytes / rates.fetch_bytes if fetched else 0.0
    rest = records - fetched
    cpu = rates.cpu_s + rest * record_bytes / rates.cpu_bytes if rest else 0.0
    return max(fetch, cpu)
