"""Shows what the daemon does, again and again: `spilld top`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from spilld.client.client import Client

from .tables import size

TRAFFIC = {
    "device": ("device_attended_bytes", ""),
    "host": ("host_attended_bytes", ""),
    "disk": ("prefetch_bytes_read", "disk_written_bytes"),
}
"""What counts the bytes read from a tier, and those written to it."""


@dataclass(frozen=True)
class StatsSample:
    """The daemon's stats at a time, in seconds."""

    values: Mapping[str, object]
    at: float

    def number(self, name: str) -> float:
        """Return a value; 0 where the daemon, perhaps an older one, does not give it."""
        value = self.values.get(name)
        return value if isinstance(value, int | float) else 0

    def rate(self, name: str, before: StatsSample) -> float:
        """Return the increase a second since an earlier sample; 0 if the daemon was restarted in between."""
        return max(0.0, self.number(name) - before.number(name)) / (self.at - before.at)


def top(client: Client, model: str, every_s: float, once: bool) -> None:
    """Draw samples every so many seconds until Ctrl-C, or once. Rates are those since the last sample."""
    with Live(console=Console(), auto_refresh=False) as live, suppress(KeyboardInterrupt):
        for before, now in pairwise(_samples(client, every_s)):
            live.update(frame(model, before, now), refresh=True)
            if once:
                return


def _samples(client: Client, every_s: float) -> Iterator[StatsSample]:
    while True:
        yield StatsSample(client.stats(), time.monotonic())
        time.sleep(every_s)


def frame(model: str, before: StatsSample, now: StatsSample) -> RenderableType:
    """Make what is drawn: the model, its activity, the tiers."""
    return Group(Text(model, "bold"), _activity(before, now), Text(), _tiers(before, now))


def _activity(before: StatsSample, now: StatsSample) -> Table:
    def count(name: str) -> str:
        return f"{now.number(name):,}"

    def rate(name: str) -> str:
        return f"{now.rate(name, before):,.1f}/s"

    running, waiting, idle = map(count, ("requests_running", "requests_waiting", "contexts_idle"))
    stalled = f"{now.rate('prefetch_stall_seconds', before):.0%}"
    writes, reads, again = map(count, ("disk_failed_writes", "prefetch_failures", "recomputations"))
    table = Table.grid(padding=(0, 2))
    table.add_row("requests", f"{running} running, {waiting} waiting, {idle} contexts idle")
    table.add_row("tokens", f"{rate('generated_tokens')} generated, {rate('computed_tokens')} computed")
    table.add_row("stalls", f"{count('prefetch_stalls')}, {rate('prefetch_stalls')}, {stalled} of the time")
    table.add_row("failures", f"{writes} writes, {reads} reads, {again} recomputations")
    if failure := now.values.get("disk_failure"):
        table.add_row("disk", Text(f"takes nothing more: {failure}", "red"))
    return table


def _tiers(before: StatsSample, now: StatsSample) -> Table:
    table = Table("tier", box=None, padding=(0, 2, 0, 0))
    for heading in ("used", "of", "", "read/s", "written/s"):
        table.add_column(heading, justify="right")
    for tier, (reads, writes) in TRAFFIC.items():
        used, budget = (round(now.number(f"{tier}_{what}_bytes")) for what in ("used", "budget"))
        if budget:
            moved = [size(round(now.rate(name, before))) if name else "" for name in (reads, writes)]
            table.add_row(tier, size(used), size(budget), f"{used / budget:.0%}", *moved)
    return table
