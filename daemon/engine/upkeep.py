"""Upkeep between steps: expired requests, memory, sessions, the journal."""

from __future__ import annotations

import logging
import time

from spilld.engine.sessions.commands import SessionCommands
from spilld.errors import Cancelled, DeadlineExceeded
from spilld.monitoring.failures import logged
from spilld.requests.requests import Requests
from spilld.sessions.journal import Journal
from spilld.sessions.store import SessionStore

from .capacity import CapacityManager
from .finisher import Finisher

log = logging.getLogger(__name__)

TICK_S = 1.0
"""Seconds between checks of memory and sessions: which have expired, which are still to be pinned."""


class Upkeep:
    """Does periodic work that belongs to no request.

    Attributes:
        retention_s: Seconds for which a request without a client continues, and for which an ended one can be
            resumed.
    """

    def __init__(
        self,
        requests: Requests,
        finisher: Finisher,
        capacity: CapacityManager,
        commands: SessionCommands,
        sessions: SessionStore,
        journal: Journal,
        retention_s: float,
    ) -> None:
        self.retention_s = retention_s
        self._requests = requests
        self._finisher = finisher
        self._capacity = capacity
        self._commands = commands
        self._sessions = sessions
        self._journal = journal
        self._ticked = 0.0

    def expire(self) -> None:
        """End requests that are past their deadline, or that have had no client for `retention_s`."""
        for state in self._requests:
            if state.left_s < 0:
                self._finisher.abort(state, DeadlineExceeded(f"not done after {state.request.deadline_s} s"))
            elif state.without_client_s > self.retention_s:
                why = f"no client asked for it within {self.retention_s:g} s"
                self._finisher.abort(state, Cancelled(why))

    def tick(self) -> None:
        """Do what is due every TICK_S."""
        if time.monotonic() - self._ticked < TICK_S:
            return
        self._ticked = time.monotonic()
        self._capacity.watch_memory()
        with logged("sessions are in memory only"):
            self.write_pending()
        with logged("sessions are not ended or pinned"):
            self._commands.tend()
        self._journal.sweep(self.retention_s)

    def write_pending(self) -> None:
        """Write the sessions that could not be written before, with the ends of their requests.

        Raises:
            OSError: They still cannot be written, and stay in memory.
            IndexDamaged: The database is damaged; they stay in memory.
        """
        with self._journal.transaction():
            self._sessions.write_pending()
        self._sessions.drop_pending()
