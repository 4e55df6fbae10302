"""How every command that talks to a daemon finds it, waits for it and leaves it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from spilld.cli.signals import ended_by_signals
from spilld.errors import DeadlineExceeded, Unreachable

if TYPE_CHECKING:
    from spilld.client.client import Client
    from spilld.protocol.messages import Welcome

PATIENCE_S = 2.0
"""A running daemon answers sooner; after that a command prints what it waits for."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the daemon is and who the client is."""
    group = parser.add_argument_group("the daemon")
    group.add_argument("--address", help="where it listens (default: its socket in your runtime directory)")
    group.add_argument(
        "--tenant", default="", help="a secret that separates what is stored for you (default: none)"
    )
    group.add_argument(
        "--keys",
        type=Path,
        default=os.environ.get("SPILLD_KEYS") or None,
        metavar="FILE",
        help="what `spilld keys --client` made, for a daemon that has keys (default: $SPILLD_KEYS)",
    )
    group.add_argument(
        "--wait",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long to wait for a daemon that starts, or comes back (default: %(default)g)",
    )


@contextmanager
def connected(options: argparse.Namespace) -> Iterator[tuple[Client, Welcome]]:
    """Connect to a daemon: a client, and what the daemon serves.

    What the client asked is cancelled when the context ends, by a signal, too.

    Raises:
        Unreachable: No daemon serves within --wait seconds.
    """
    with ended_by_signals():
        began = time.monotonic()
        with _connect(options) as client:
            reported = time.monotonic() - began >= PATIENCE_S
            yield (
                client,
                _greet(client, began + options.wait, "" if reported else f"waiting for {options.wait:g} s"),
            )


def _connect(options: argparse.Namespace) -> Client:
    from spilld.client.client import Client

    def connect(timeout: float) -> Client:
        return Client(
            options.address,
            tenant=options.tenant,
            keys=options.keys,
            connect_timeout=timeout,
            reconnect_s=options.wait,
            on_lost=_lost,
        )

    try:
        return connect(min(PATIENCE_S, options.wait))
    except Unreachable as error:
        if options.wait <= PATIENCE_S:
            raise
        _say(f"{error.message}; waiting for {options.wait:g} s")
    return connect(options.wait - PATIENCE_S)


def reach(client: Client, wait: float) -> None:
    """Wait for a daemon that was there before, and say so.

    Raises:
        Unreachable: It is not back within `wait` seconds.
    """
    try:
        client.reach(0.0)
    except Unreachable:
        _lost(wait)
        client.reach(wait)


def _lost(wait: float) -> None:
    _say(f"the daemon is gone; waiting up to {wait:g} s for it")


def _greet(client: Client, give_up: float, waiting: str) -> Welcome:
    """Wait for the daemon's answer: it listens while it starts, and answers once it serves.

    Args:
        client: A connected client.
        give_up: When to give up, in seconds of time.monotonic().
        waiting: What is printed when the answer takes longer; empty for nothing.
    """
    try:
        return client.hello(PATIENCE_S)
    except DeadlineExceeded:
        left = give_up - time.monotonic()
        if left > 0 and waiting:
            _say(f"the daemon at {client.address} is starting, or busy; {waiting}")
    try:
        return client.hello(max(left, 0.0))
    except DeadlineExceeded:
        raise Unreachable(
            f"the daemon at {client.address} does not answer: its first start takes minutes, and its log "
            "says how far it is; try again, or with --wait 300"
        ) from None


def _say(what: str) -> None:
    print(f"spilld: {what}", file=sys.stderr, flush=True)
