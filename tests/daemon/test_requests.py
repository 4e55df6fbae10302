"""The table of requests against a plain list of them: found without a scan, one at a time on a session."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spilld.protocol.messages import Generate
from spilld.requests.request_state import Phase, RequestState
from spilld.requests.requests import Requests
from spilld.scheduler.prefill_budget import PrefillBudget
from spilld.scheduler.scheduler import Job, Scheduler
from spilld.sessions.journal import JournalEntry

TENANTS, SESSIONS = ("", "t"), (None, "a", "b")


def request(number: int, tenant: str, session: str | None) -> RequestState:
    asked = Generate(request_id=f"r{number}", prompt=(1,), tenant=tenant, session=session)
    entry = JournalEntry(request=asked, prompt=(1,), handle=None, fingerprint=b"", arrived=0.0)
    return RequestState(number, b"c", entry)


class Table(RuleBasedStateMachine):
    """Requests arrive, begin, run and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = Requests()
        self.scheduler = Scheduler(512, PrefillBudget(1.0, 1e9))
        self.all: list[RequestState] = []
        self.count = 0

    def begin(self, state: RequestState) -> None:
        state.phase = Phase.WAITING
        self.scheduler.add(Job(state.job, 0, 1, 512, True, 0, state.flow))

    def ahead(self, state: RequestState) -> list[RequestState]:
        """Those that came before it on its session, and have not ended."""
        before = self.all[: self.all.index(state)]
        return [other for other in before if state.key is not None and other.key == state.key]

    @rule(tenant=st.sampled_from(TENANTS), session=st.sampled_from(SESSIONS))
    def arrive(self, tenant: str, session: str | None) -> None:
        self.count += 1
        state = request(self.count, tenant, session)
        self.all.append(state)
        may_begin = self.requests.add(state)
        assert may_begin == (not self.ahead(state))
        if may_begin:
            self.begin(state)

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        state = data.draw(st.sampled_from(self.all))
        self.scheduler.remove(state.job)
        self.requests.remove(state)
        self.all.remove(state)
        assert state.phase is Phase.FINISHED

    @rule()
    def begin_due(self) -> None:
        while (state := self.requests.next_due()) is not None:
            assert state.phase is Phase.BEHIND
            assert not self.ahead(state), "another has its session"
            self.begin(state)
        assert all(self.ahead(state) for state in self.all if state.phase is Phase.BEHIND), "one is forgotten"

    @precondition(lambda self: self.scheduler.waiting)
    @rule()
    def start(self) -> None:
        job = self.scheduler.next
        assert job is not None
        self.scheduler.start(job.id)
        self.requests[job.id].phase = Phase.RUNNING

    @invariant()
    def agrees(self) -> None:
        assert list(self.requests) == self.all
        assert len(self.requests) == len(self.all)
        self.requests.check_integrity(self.scheduler)
        for tenant in (None, *TENANTS):
            for number in range(self.count + 2):
                found = [s for s in self.all if s.job == number and tenant in (None, s.request.tenant)]
                assert self.requests.find(f"r{number}", tenant) == (found[0] if found else None)
        for key in ((tenant, name) for tenant in TENANTS for name in SESSIONS if name is not None):
            first = next((state for state in self.all if state.key == key), None)
            assert self.requests.on_session(key) is first


TestTable = Table.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_phase_that_the_scheduler_does_not_share_is_found() -> None:
    requests, scheduler = Requests(), Scheduler(512, PrefillBudget(1.0, 1e9))
    state = request(1, "", None)
    requests.add(state)
    requests.check_integrity(scheduler)
    state.phase = Phase.RUNNING
    with pytest.raises(AssertionError, match="runs other requests"):
        requests.check_integrity(scheduler)
