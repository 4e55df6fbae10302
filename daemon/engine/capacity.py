"""Capacity: idle sequences are discarded, running requests preempted, and memory is given back."""

from __future__ import annotations

import logging

from spilld.errors import StorageFailed
from spilld.monitoring.memory import MemoryWatch
from spilld.monitoring.stats import Counters
from spilld.offload.store.store import Store
from spilld.requests.request_state import Phase, RequestState
from spilld.requests.requests import RUNNING, Requests
from spilld.runner.runner import Runner
from spilld.runner.sequence_manager import SequenceManager
from spilld.scheduler.scheduler import Capacity, JobId, Scheduler
from spilld.sessions.idle_contexts import Contexts

from .arrivals import Arrivals
from .finisher import Finisher

log = logging.getLogger(__name__)


class CapacityManager:
    """Says what is free, and frees more for the request that is next."""

    def __init__(
        self,
        requests: Requests,
        scheduler: Scheduler,
        sequences: SequenceManager,
        contexts: Contexts,
        store: Store,
        runner: Runner,
        memory: MemoryWatch,
        arrivals: Arrivals,
        finisher: Finisher,
        counters: Counters,
    ) -> None:
        self.memory = memory
        self._requests = requests
        self._scheduler = scheduler
        self._sequences = sequences
        self._contexts = contexts
        self._store = store
        self._runner = runner
        self._arrivals = arrivals
        self._finisher = finisher
        self._counters = counters

    @property
    def free(self) -> Capacity:
        """What a request that is admitted now can have."""
        windows = self._sequences.windows
        return Capacity(min(windows, 1) if self.memory.short else windows, self._store.unreserved)

    def admit(self) -> list[RequestState]:
        """Return the requests to start now, making room for the next one if it finds none.

        While memory is short, no request is started beside those that run.
        """
        if not self._scheduler.waiting or (self.memory.short and self._scheduler.plan()):
            return []
        while self._scheduler.starved(self.free) and self._make_room():
            continue
        if self._scheduler.full:
            self._preempt()
        return [self._requests[job] for job in self._scheduler.admit(self.free)]

    def pause(self) -> None:
        """Pause the requests whose clients do not take what they produced, and resume the others."""
        paused: set[JobId] = set()
        for state in self._requests.in_phase(*RUNNING):
            state.phase = Phase.PAUSED if state.unread else Phase.RUNNING
            if state.unread:
                paused.add(state.job)
        self._scheduler.pause(paused)

    def watch_memory(self) -> None:
        """Check whether memory is short, and give some back if it is.

        Each call gives back a part; if memory stays short, all that can be spared goes within a few calls.
        """
        self.memory.look()
        self._store.promotes = not self.memory.short
        if not self.memory.short:
            return
        self._runner.rest()
        self._store.settle()
        if (idle := self._contexts.oldest()) is not None:
            self._sequences.discard(idle)
        self._sequences.relieve()
        self._store.relieve()

    # Room for the request that is next.

    def _make_room(self) -> bool:
        """Free something for the next request; return False if it must wait for running ones."""
        if (idle := self._contexts.oldest()) is not None:
            log.info("an idle context makes room")
            self._sequences.discard(idle)
            return True
        if self._scheduler.running:
            return self._preempt()
        job = self._scheduler.next
        assert job is not None
        first = self._requests[job.id]
        holders = [state for state in self._requests if state is not first and state.sequence is not None]
        if holders:
            self._take_sequence(holders[-1])
        else:
            lost = self._store.spill_failure
            why = f"it fits no more since the disk tier takes nothing: {lost}"
            self._finisher.abort(first, StorageFailed(why))
        return True

    def _take_sequence(self, state: RequestState) -> None:
        """Take the idle sequence that a waiting request would continue; its KV comes back from disk."""
        sequence = state.running_sequence
        state.history = list(sequence.tokens)
        self._sequences.discard(sequence)
        state.sequence = None
        self._scheduler.update(self._arrivals.job(state))

    def _preempt(self) -> bool:
        """Preempt a running request if one is due; return False if none is."""
        job = self._scheduler.to_preempt()
        if job is None:
            return False
        state = self._requests[job]
        with self._finisher.blaming(state):
            self._save_and_stop(state)
        return True

    def _save_and_stop(self, state: RequestState) -> None:
        """Begin to write what was computed of a running request, and take its sequence."""
        sequence = state.running_sequence
        saved = self._sequences.save(sequence, state.checkpoint)
        state.checkpoint = saved if state.completion.tokens else None
        if not self._sequences.saved(sequence, saved):
            self._scheduler.forbid_preemption(state.job)  # its KV would be lost
            return
        log.info("request %s makes room for another", state.request.request_id)
        self._counters.preemptions += 1
        self._runner.rest()
        state.history = sequence.tokens[: state.first]
        state.sequence, state.saving = None, saved
        self._sequences.discard(sequence)
        self._scheduler.remove(state.job)
        state.phase = Phase.PREEMPTED

    def bring_back(self) -> None:
        """Queue preempted requests again, once they are on disk and their clients take what they produce."""
        for state in self._requests.in_phase(Phase.PREEMPTED):
            if state.unread or (state.saving is not None and self._store.checkpoints.saving(state.saving)):
                continue
            with self._finisher.blaming(state):
                job = self._arrivals.job(state)
                state.phase, state.saving = Phase.WAITING, None
                self._scheduler.add(job)
