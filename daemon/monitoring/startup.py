"""Progress of a start, and its result, for the log and for systemd."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from spilld.offload.size import size
from spilld.protocol.address import user_address
from spilld.protocol.messages import Welcome

from .sd_notify import Notifier

log = logging.getLogger(__name__)

PHASE_S = 1800.0
"""Seconds that systemd is to allow for each part of a start: converting a large model, or compiling."""


class Startup:
    """Reports to the log and to systemd how far a start is."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier

    def phase(self, what: str) -> None:
        """Report to systemd what is being done from now on."""
        self._notifier.starting(what, PHASE_S)

    def step(self, what: str) -> None:
        """Report what is being done from now on, in the log too."""
        log.info(what)
        self.phase(what)

    def parts(self, what: str) -> Callable[[int, int], None]:
        """Return a function that reports how many parts are done of how many; call it with 0 first."""
        began = time.monotonic()

        def tell(done: int, of: int) -> None:
            left = f", about {(time.monotonic() - began) / done * (of - done):.0f} s left" if done else ""
            self.step(f"{what}: {done} of {of} done{left if done < of else ''}")

        return tell

    def ready(
        self, welcome: Welcome, longest: int, stats: Mapping[str, object], address: str, *, keyed: bool
    ) -> None:
        """Log one line: what is served, within which budgets, where, and what to do next."""
        tiers = ", ".join(
            f"{tier} {_text(stats.get(f'{tier}_budget_bytes'))}" for tier in ("device", "host", "disk")
        )
        log.info(
            "ready: %s, up to %s tokens; KV budgets: %s; at %s. Try: %s",
            *(welcome.model, f"{longest:,}", tiers, address),
            next_command(address, keyed=keyed),
        )


def next_command(address: str, *, keyed: bool) -> str:
    """Return a first command that a user may type on this machine."""
    given = sys.argv[0]
    installed = Path(given).name == "spilld" and shutil.which("spilld") is None
    options = "" if address == user_address() else f" --address {address}"
    key = " --keys FILE" if keyed else ""
    return f'{given if installed else "spilld"} ask{options}{key} "Who are you?"'


def _text(nbytes: object) -> str:
    return size(nbytes) if isinstance(nbytes, int) and nbytes else "none"
