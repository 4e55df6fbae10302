"""Reports the daemon's state to systemd: sd_notify(3), a datagram to $NOTIFY_SOCKET."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

log = logging.getLogger(__name__)

LOOKS = 8
"""Checks whether a keep-alive can be sent, at least, in the time between two."""


class Notifier:
    """Reports the daemon's state to systemd; silent where systemd did not ask for it."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        asked = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = environ.get("WATCHDOG_USEC", "") if asked else ""
        self.watchdog_s = int(usec) / 2e6 if usec.isdecimal() and int(usec) else None
        """Seconds between two keep-alives, half of what systemd allows; None if it wants none."""
        self._next_sign = 0.0
        self._progress: int | None = None
        self._silent = False

    def starting(self, status: str, seconds: float) -> None:
        """Report a part of the start, which systemd is to allow so many seconds from now on."""
        self._send(f"STATUS={status}\nEXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def ready(self) -> None:
        """Report that the daemon serves."""
        self._send("READY=1\nSTATUS=serving")

    def reloading(self) -> None:
        """Report that settings are being read again; `ready` is to follow."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        """Report that the daemon serves no more, and why."""
        self._send(f"STOPPING=1\nSTATUS={status}")

    def alive(self, progress: int) -> None:
        """Send a keep-alive if one is due, and if `progress` has changed since the last.

        So a thread that still runs does not report an engine alive that hangs.
        """
        if self.watchdog_s is None or (now := time.monotonic()) < self._next_sign:
            return
        if progress == self._progress:
            if not self._silent:
                log.warning(
                    "the engine has not moved for %.3g s; systemd ends it if it stays so", self.watchdog_s
                )
            self._silent = True
            return
        self._progress, self._silent = progress, False
        self._next_sign = now + self.watchdog_s
        self._send("WATCHDOG=1")

    def due_s(self) -> float:
        """Return the seconds until `alive` is to be called again; at most a minute."""
        if self.watchdog_s is None:
            return 60.0
        return min(60.0, max(self.watchdog_s / LOOKS, self._next_sign - time.monotonic()))

    def _send(self, state: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(0.1)  # the server loop calls this: a stuck systemd must not stop it
            try:
                sender.sendto(state.encode(), self._address)
            except OSError as error:
                log.warning("systemd was not told %s: %s", state.splitlines()[0], error)
