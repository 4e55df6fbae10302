"""The table of requests: found by number, by id and by session, without a scan."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from spilld.scheduler.scheduler import JobId, Scheduler
from spilld.sessions.idle_contexts import Key

from .request_state import Phase, RequestState

RUNNING = {Phase.RUNNING, Phase.PAUSED}
"""Phases in which the scheduler runs a request."""


class Requests:
    """Every request that has not ended, in order of arrival.

    Requests on one session run one after the other: the first of them has it, the others are Phase.BEHIND.
    """

    def __init__(self) -> None:
        self._by_job: dict[JobId, RequestState] = {}
        self._by_id: dict[str, RequestState] = {}
        self._by_session: dict[Key, deque[RequestState]] = {}
        """Of each session that has any, its requests in order."""
        self._due: deque[Key] = deque()
        """Sessions whose first request may begin."""

    def __len__(self) -> int:
        return len(self._by_job)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(tuple(self._by_job.values()))

    def __getitem__(self, job: JobId) -> RequestState:
        return self._by_job[job]

    def find(self, request_id: str, tenant: str | None = None) -> RequestState | None:
        """Return the request of this id, if it is of this tenant or none is given."""
        state = self._by_id.get(request_id)
        return state if state is None or tenant in (None, state.request.tenant) else None

    def on_session(self, key: Key) -> RequestState | None:
        """Return the request that has a session, None if there is none."""
        queue = self._by_session.get(key)
        return queue[0] if queue else None

    def in_phase(self, *phases: Phase) -> list[RequestState]:
        """Return the requests in these phases, in order of arrival."""
        return [state for state in self._by_job.values() if state.phase in phases]

    def add(self, state: RequestState) -> bool:
        """Add a new request.

        Returns:
            True if it may begin, False if it is behind another on its session.
        """
        self._by_job[state.job] = self._by_id[state.request.request_id] = state
        if state.key is None:
            return True
        queue = self._by_session.setdefault(state.key, deque())
        queue.append(state)
        return len(queue) == 1

    def remove(self, state: RequestState) -> None:
        """Remove a request that has ended; the next on its session is due."""
        del self._by_job[state.job], self._by_id[state.request.request_id]
        state.phase = Phase.FINISHED
        if state.key is None:
            return
        queue = self._by_session[state.key]
        first = queue[0] is state
        queue.remove(state)
        if not queue:
            del self._by_session[state.key]
        elif first:
            self._due.append(state.key)

    def next_due(self) -> RequestState | None:
        """Return a request that may begin because its predecessor on its session has ended.

        Each is returned once. None if there is none.
        """
        while self._due:
            state = self.on_session(self._due.popleft())
            if state is not None and state.phase is Phase.BEHIND:
                return state
        return None

    def check_integrity(self, scheduler: Scheduler) -> None:
        """Check that the indexes and the scheduler's queues are about the same requests.

        Raises:
            AssertionError: They are not.
        """
        assert set(self._by_id.values()) == set(self._by_job.values()), "the indexes differ"
        queued = [state for queue in self._by_session.values() for state in queue]
        assert set(queued) == {state for state in self if state.key is not None}, "a session's queue differs"
        running = {state.job for state in self.in_phase(*RUNNING)}
        assert set(scheduler.running) == running, "the scheduler runs other requests"
        assert scheduler.waiting == len(self.in_phase(Phase.WAITING)), "the scheduler's queue differs"
