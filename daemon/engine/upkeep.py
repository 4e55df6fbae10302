"""What is due between steps: requests that are over, memory, sessions, the journal."""

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
"""How often memory and sessions are looked at: which have expired, which are still to be pinned."""


class Upkeep:
    """Does what nobody asked for.

    Attributes:
        retention_s: How long a request that no client listens to goes on, and an ended one can be resumed.
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
        """End requests that are past their deadline, or that no client has asked for in a while."""
        for state in self._requests:
            if state.left_s < 0:
                self._finisher.abort(state, DeadlineExceeded(f"not done after {state.request.deadline_s} s"))
            elif state.unheard_s > self.retention_s:
                why = f"no client asked for it within {self.retention_s:g} s"
                self._finisher.abort(state, Cancelled(why))

    def tick(self) -> None:
        """What is due every TICK_S."""
        if time.monotonic() - self._ticked < TICK_S:
            return
        self._ticked = time.monotonic()
        self._capacity.watch_memory()
        with logged("sessions are in memory only"):
            self.write_held()
        with logged("sessions are not tended"):
            self._commands.tend()
        self._journal.sweep(self.retention_s)

    def write_held(self) -> None:
        """Write sessions that could not be written, with the ends of their requests, if that can be done
        now.
        """
        with self._journal.transaction():
            self._sessions.write_held()
        self._sessions.let_go()
