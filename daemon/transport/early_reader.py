"""Reads what comes before the daemon is ready: connections are answered, requests are kept."""

from __future__ import annotations

import math
import os
import select
import threading
import weakref
from typing import Self

from .router import Received, Router

MOST = 256
"""Messages that are kept. Further ones wait at their senders."""

MOST_BYTES = 64 << 20

LOOK_MS = 100
"""How often connections are looked after when no more is kept."""


class StartupReader:
    """A thread that uses the router until `stop`."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._kept: list[Received] = []
        self._stopped = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._wake)
        self._thread = threading.Thread(target=self._wait, name="spilld-early", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> list[Received]:
        """Stop the thread; from then on the router is the caller's.

        Returns:
            The messages that have come; none when called again.
        """
        self._stopped = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        kept, self._kept = self._kept, []
        return kept

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._router, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        full, nbytes = False, 0
        while not self._stopped:
            poll.poll(LOOK_MS if full else math.ceil(self._router.wait_s() * 1000))
            self._router.turn()
            while not full and not self._stopped and (received := self._router.receive()) is not None:
                nbytes += sum(map(len, received.frames))
                self._kept.append(received)
                full = len(self._kept) >= MOST or nbytes >= MOST_BYTES
