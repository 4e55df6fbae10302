"""spilld stats and spilld top: what the daemon is doing."""

from __future__ import annotations

import argparse
from typing import Any

from spilld.errors import InvalidRequest

from .connect import add_options, connected


def add(commands: Any) -> None:
    """Add the commands to the parser."""
    once = commands.add_parser("stats", help="what the daemon is doing, and how full its tiers are")
    once.set_defaults(run=stats)
    once.add_argument("--json", action="store_true", help="one JSON object (default: a table)")
    add_options(once)
    live = commands.add_parser("top", help="the same, live: tiers, requests, tokens a second, stalls")
    live.set_defaults(run=top)
    live.add_argument(
        "--every", type=float, default=1.0, metavar="SECONDS", help="how often to look (default: %(default)g)"
    )
    live.add_argument(
        "--once", action="store_true", help="look twice, print what was seen, and end (default: until Ctrl-C)"
    )
    add_options(live)


def stats(options: argparse.Namespace) -> None:
    """Show the daemon's counters, and how full its tiers are."""
    with connected(options) as (client, welcome):
        from spilld.cli.tables import stats

        stats(client, welcome, options.json)


def top(options: argparse.Namespace) -> None:
    """Show the same live."""
    if not options.every > 0:
        raise InvalidRequest(f"--every is {options.every:g}; allowed: seconds above 0")
    with connected(options) as (client, welcome):
        from spilld.cli.top import top

        top(client, welcome.model, options.every, options.once)
