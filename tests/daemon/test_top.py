"""A frame of `spilld top`, drawn from two looks."""

from __future__ import annotations

import io
import re

from rich.console import Console

from spilld.cli.top import StatsSample, frame

EARLIER: dict[str, object] = {
    "requests_running": 2,
    "requests_waiting": 1,
    "contexts_idle": 3,
    "generated_tokens": 1000,
    "computed_tokens": 5000,
    "prefetch_stalls": 10,
    "prefetch_stall_seconds": 1.0,
    "prefetch_bytes_read": 1 << 20,
    "disk_written_bytes": 0,
    "disk_failed_writes": 0,
    "disk_failure": "",
    **{f"{tier}_used_bytes": 1 << 20 for tier in ("device", "host", "disk")},
    **{f"{tier}_budget_bytes": 4 << 20 for tier in ("device", "host", "disk")},
}

LATER = EARLIER | {
    "generated_tokens": 1050,
    "computed_tokens": 7000,
    "prefetch_stalls": 14,
    "prefetch_stall_seconds": 1.5,
    "prefetch_bytes_read": 5 << 20,
    "disk_written_bytes": 2 << 20,
    "host_attended_bytes": 3 << 20,
}


def drawn(before: dict[str, object], now: dict[str, object]) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(frame("tiny [model]", StatsSample(before, 10.0), StatsSample(now, 12.0)))
    assert isinstance(console.file, io.StringIO)
    return re.sub(" {2,}", "  ", console.file.getvalue())


def test_rates_are_those_between_the_looks() -> None:
    shown = drawn(EARLIER, LATER)
    assert shown.startswith("tiny [model]\n")
    assert "requests  2 running, 1 waiting, 3 contexts idle" in shown
    assert "tokens  25.0/s generated, 1,000.0/s computed" in shown
    assert "stalls  14, 2.0/s, 25% of the time" in shown
    assert "device  1.00 MiB  4.00 MiB  25%  0.00 MiB" in shown
    assert "host  1.00 MiB  4.00 MiB  25%  1.50 MiB" in shown
    assert "disk  1.00 MiB  4.00 MiB  25%  2.00 MiB  1.00 MiB" in shown
    assert "takes nothing more" not in shown


def test_a_disk_tier_that_failed_says_why() -> None:
    shown = drawn(EARLIER, LATER | {"disk_failure": "[Errno 28] full", "disk_failed_writes": 1})
    assert "disk  takes nothing more: [Errno 28] full" in shown
    assert "failures  1 writes, 0 reads, 0 recomputations" in shown


def test_a_restart_and_a_daemon_that_says_less() -> None:
    shown = drawn(LATER, {"requests_running": 1, "host_used_bytes": 0, "host_budget_bytes": 1 << 20})
    assert "tokens  0.0/s generated, 0.0/s computed" in shown
    assert "host  0.00 MiB  1.00 MiB  0%  0.00 MiB" in shown
    assert "disk  " not in shown
