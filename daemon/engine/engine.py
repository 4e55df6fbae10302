"""The engine: takes requests, runs steps over packed batches, hands events back.

One thread calls everything here, unless it says otherwise; service.py owns the threads.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from types import MappingProxyType

from spilld.config.config import Config
from spilld.cuda_ext.memory.windows import KVWindows
from spilld.engine.sessions.archive_transfers import ArchiveTransfers
from spilld.engine.sessions.commands import SessionCommands
from spilld.engine.sessions.manager import SessionManager
from spilld.errors import Cancelled, SpilldError
from spilld.models.model import Model
from spilld.monitoring.failures import logged
from spilld.monitoring.memory import MemoryWatch
from spilld.monitoring.metrics import Metrics
from spilld.monitoring.stats import Counters, EngineStats
from spilld.offload.store.store import Store
from spilld.protocol.messages import (
    ChangeSession,
    Generate,
    ListSessions,
    Release,
    Reply,
)
from spilld.requests.requests import RUNNING, Requests
from spilld.runner.runner import Runner
from spilld.runner.sequence_manager import SequenceManager
from spilld.scheduler.latency import LatencyModel
from spilld.scheduler.prefill_budget import PrefillBudget
from spilld.scheduler.scheduler import Scheduler
from spilld.sessions.idle_contexts import Contexts
from spilld.sessions.journal import Journal, Unfinished
from spilld.sessions.store import SessionStore
from spilld.sessions.transfers import Transfers

from .admission import Admission
from .arrivals import Arrivals, Compose
from .capacity import CapacityManager
from .finisher import Finisher
from .outbox import Outbox, Post
from .step import StepExecutor
from .subscriptions import Subscriptions
from .upkeep import Upkeep

log = logging.getLogger(__name__)


class Engine:
    """Composes the parts of the engine.

    Each request that was added ends in exactly one Done or Failed event, in this process or, after `suspend`,
    in one that restores it.

    Attributes:
        model: The model that is served.
        contexts: Idle sequences.
        requests: All requests that have not ended.
        sessions: What requests continue and leave behind.
        archives: Exports and imports of sessions.
        subscriptions: Which client receives the events of which request.
        published: The statistics that other threads may read.
    """

    def __init__(
        self,
        model: Model,
        windows: KVWindows,
        store: Store,
        runner: Runner,
        sessions: SessionStore,
        journal: Journal,
        transfers: Transfers,
        prefill: PrefillBudget,
        metrics: Metrics,
        memory: MemoryWatch,
        post: Post,
        *,
        max_context: int,
        chunk_tokens: int = 512,
        context_ttl_s: float = 3600.0,
        retention_s: float = 120.0,
    ) -> None:
        self.model = model
        self.contexts = contexts = Contexts()
        self.requests = requests = Requests()
        self.sessions = SessionManager(sessions, store, model, context_ttl_s)
        self._sequences = sequences = SequenceManager(windows, store, runner, runner.states)
        self._commands = SessionCommands(self.sessions, contexts, sequences, requests)
        self._store = store
        self._runner = runner
        self._journal = journal
        self._prefill = prefill
        self._chunk_tokens = chunk_tokens
        self._counters = counters = Counters()
        self._scheduler = scheduler = Scheduler(chunk_tokens, prefill, grid=model.geometry.grid)
        self._outbox = outbox = Outbox(journal, self.sessions, counters, post, self._publish)
        latency = LatencyModel(
            model.geometry.sliding_windows, store.layouts.record_bytes, store.host_budget_bytes
        )
        self._finisher = finisher = Finisher(
            requests, scheduler, sequences, contexts, self.sessions, store, runner, outbox
        )
        self._arrivals = Arrivals(
            *(model, requests, scheduler, sequences, contexts, self.sessions, store, journal, finisher),
            max_context=max_context,
            chunk_tokens=chunk_tokens,
        )
        self._capacity = CapacityManager(
            *(requests, scheduler, sequences, contexts, store, runner, memory, self._arrivals, finisher),
            counters,
        )
        self._admission = Admission(
            *(requests, scheduler, sequences, self.sessions, store, finisher, outbox, counters),
            prefill,
            latency,
        )
        self._steps = StepExecutor(
            *(requests, scheduler, sequences, store, runner, finisher, outbox, counters, metrics),
            prefill,
            latency,
            chunk_tokens=chunk_tokens,
        )
        self.archives = ArchiveTransfers(
            transfers,
            self.sessions,
            store,
            model,
            self._commands.refuse_if_busy,
            lambda: self.longest,
        )
        self.subscriptions = Subscriptions(requests, journal, outbox)
        self._upkeep = Upkeep(
            *(requests, finisher, self._capacity, self._commands, sessions, journal), retention_s
        )
        self._workspace_bytes = runner.workspace_bytes
        self._is_published = False
        self._publish()

    # One turn of the engine's loop.

    def turn(self) -> bool:
        """Admit requests, run one step and handle its results.

        Returns:
            False if there was nothing to run.
        """
        self._is_published = False
        self._upkeep.expire()
        self._outbox.flush()
        self._upkeep.tick()
        self._store.settle()
        with logged("exports and imports do not continue"):
            self.archives.tend()
        self._arrivals.begin_due()
        self._capacity.bring_back()
        self._capacity.pause()
        admitted = self._capacity.admit()
        self._admission.start(admitted)
        self._outbox.flush()
        plan = self._scheduler.plan()
        for batch in self._steps.batches(plan):
            self._steps.run(batch)
            self._store.settle()
        any_begun = self._end_turn()
        return bool(admitted or plan or any_begun)

    def _end_turn(self) -> bool:
        """Begin the requests that ended ones have made way for, send events, and publish the statistics.

        Returns:
            Whether a request was begun.
        """
        any_begun = self._arrivals.begin_due()
        self._outbox.flush()
        if not self._is_published:
            self._publish()
        return any_begun

    @property
    def writing(self) -> bool:
        """Whether a write to disk or to an archive is under way, to be settled soon."""
        return self._store.writing or self.archives.busy

    def rest(self) -> None:
        """Stop reading ahead, as there is nothing to run."""
        self._runner.rest()
        self._store.settle()
        self._publish()

    # Requests.

    def add(self, client: bytes, request: Generate, prompt: list[int], arrived: float | None = None) -> None:
        """Take a request. Requests on one session run one after the other.

        Args:
            client: The connection that its events go to.
            request: The client's message.
            prompt: Token ids; empty if the prompt is messages that continue a session.
            arrived: Seconds since 1970, None for now.

        Raises:
            SpilldError: The request is refused, and leaves no trace.
        """
        self._arrivals.add(client, request, prompt, arrived)

    def compose_with(self, compose: Compose) -> None:
        """Have prompts made of messages by `compose`. See Arrivals.compose."""
        self._arrivals.compose = compose

    def left_behind(self) -> list[Unfinished]:
        """Return the requests of the last process in order of arrival, each to be restored. Call it once."""
        return self._journal.unfinished()

    def restore(self, left: Unfinished) -> None:
        """Continue a request of the last process, or fail it for good."""
        self._arrivals.restore(left)
        self._outbox.flush()

    def cancel(self, request_id: str, tenant: str | None = None) -> None:
        """End a request.

        A request that has ended already, or that is of another tenant if one is given, is ignored.
        """
        if (state := self.requests.find(request_id, tenant)) is not None:
            self._finisher.abort(state, Cancelled("cancelled by the client"))
            self._end_turn()

    def manage(self, request: Release | ListSessions | ChangeSession) -> Reply:
        """List or change sessions.

        Raises:
            ContextNotFound: There is no such session.
            InvalidRequest: The session is in use, or the change is invalid.
        """
        reply = self._commands.manage(request)
        self._publish()
        return reply

    # What other parts and threads may read.

    @property
    def longest(self) -> int:
        """The most tokens that one sequence may have. Other threads read `published.longest`."""
        return self._arrivals.longest

    def stats(self) -> dict[str, object]:
        """Return requests, counters and bytes by name. Thread-safe."""
        return self.published.values()

    @property
    def progress(self) -> int:
        """A number that grows as long as a step makes progress: layers attended to, bytes read and written.

        Thread-safe: each summand is one number that one thread counts.
        """
        return self._runner.attended + self._store.disk_read_bytes + self._store.disk_written_bytes

    def _publish(self) -> None:
        phases = [state.phase for state in self.requests]
        running = sum(phase in RUNNING for phase in phases)
        self.published = EngineStats(
            longest=self.longest,
            requests_running=running,
            requests_paused=sum(state.unread for state in self.requests),
            requests_waiting=len(phases) - running,
            memory_short=int(self._capacity.memory.short),
            contexts_idle=len(self.contexts),
            workspace_bytes=self._workspace_bytes,
            counters=MappingProxyType(self._counters.values()),
            tiers=MappingProxyType(self._sequences.stats()),
        )
        self._is_published = True

    def check_integrity(self) -> None:
        """Check that windows, rows and runs belong to running requests and idle contexts only.

        Raises:
            AssertionError: They do not.
        """
        running = [state.sequence for state in self.requests if state.sequence is not None]
        self._sequences.check_integrity([*running, *self.contexts])
        self.requests.check_integrity(self._scheduler)

    # Start and end of the process.

    def warm_up(self) -> None:
        """Compute something, so that the first request need not wait for one-time work."""
        self._sequences.warm_up(self._chunk_tokens)
        self.check_integrity()

    def adjust(self, config: Config) -> None:
        """Take the settings that may change between two steps.

        What is under way keeps what it began with: a context keeps its lifetime.
        """
        self._prefill.gap_s = config.max_gap_ms / 1e3
        self.sessions.context_ttl_s = config.context_ttl_s
        self._upkeep.retention_s = config.retention_s
        if self._store.disk is not None:
            self._store.disk.prefetch.deadline_s = config.read_deadline_s

    def fail_running(self, error: SpilldError) -> None:
        """Fail every request that took part in a failed step: its KV is in doubt and is discarded."""
        self._finisher.abort_all(error, running=True)
        self._end_turn()

    def fail_all(self, error: SpilldError) -> None:
        """Fail every request, whether it runs or waits."""
        self._finisher.abort_all(error, running=False)
        self._end_turn()

    def lose(self) -> None:
        """Note that the device is lost: nothing may be saved or computed any more.

        The KV of the step under way is lost. The next process computes again what runs.
        """
        self._sequences.lost = True

    def suspend(self) -> frozenset[str]:
        """Save what runs, as the process is about to end.

        Returns:
            The ids of the requests that continue at the next start; the others fail.
        """
        self._finisher.suspend_all()
        self._outbox.flush()
        with logged("sessions that were in memory only are lost"):
            self._upkeep.write_pending()
        if not self._sequences.lost:
            self._journal.end_life()
        left = frozenset(state.request.request_id for state in self.requests)
        if left:
            log.info("%d requests are saved: they continue at the next start", len(left))
        return left

    def close(self) -> None:
        """Close every part, even if closing another fails."""
        with ExitStack() as stack:
            stack.callback(self._journal.close)
            stack.callback(self._store.close)
            stack.callback(self.archives.close)
            stack.callback(self._runner.close)
            stack.callback(self._runner.rest)
