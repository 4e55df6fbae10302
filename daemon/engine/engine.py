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
    """Composes the parts. Each request that was added ends in exactly one Done or Failed event, in this
    process or, after `suspend`, in one that restores it.

    Attributes:
        model: What is served.
        contexts: Idle sequences.
        requests: All that have not ended.
        sessions: What requests continue and leave behind.
        archives: Exports and imports of sessions.
        subscriptions: Which client hears of which request.
        published: What other threads may know.
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
        self._sequences = sequences = SequenceManager(windows, store, runner)
        self._commands = SessionCommands(self.sessions, contexts, sequences, requests)
        self._store = store
        self._runner = runner
        self._journal = journal
        self._prefill = prefill
        self._chunk_tokens = chunk_tokens
        self._counters = counters = Counters()
        self._scheduler = scheduler = Scheduler(chunk_tokens, prefill)
        self._outbox = outbox = Outbox(journal, self.sessions, counters, post, self._publish)
        latency = LatencyModel(
            model.geometry.sliding_windows, store.layout.record_bytes, store.host_budget_bytes
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

    # The loop is the table of contents.

    def turn(self) -> bool:
        """Admit, run one step, deal with its results; False if there was nothing to run."""
        self._is_published = False
        self._upkeep.expire()
        self._outbox.flush()
        self._upkeep.tick()
        self._store.settle()
        with logged("archives are not tended"):
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
        self._end_turn()
        return bool(admitted or plan)

    def _end_turn(self) -> None:
        """Begin what the ended have made way for, and tell everybody."""
        self._arrivals.begin_due()
        self._outbox.flush()
        if not self._is_published:
            self._publish()

    @property
    def writing(self) -> bool:
        """Whether something is on its way to disk or to an archive, to be settled soon."""
        return self._store.writing or self.archives.busy

    def rest(self) -> None:
        """There is nothing to run: stop reading ahead."""
        self._runner.rest()
        self._store.settle()
        self._publish()

    # Requests.

    def add(self, client: bytes, request: Generate, prompt: list[int], arrived: float | None = None) -> None:
        """Take a request. Requests on one session run one after the other.

        Args:
            client: Where its events go.
            request: What was asked.
            prompt: Token ids; none yet if it is messages that go on with a session.
            arrived: Seconds since 1970, None for now.

        Raises:
            SpilldError: It is refused, and leaves no trace.
        """
        self._arrivals.add(client, request, prompt, arrived)

    def compose_with(self, compose: Compose) -> None:
        """Have prompts made of messages by `compose`, as Arrivals.compose."""
        self._arrivals.compose = compose

    def left_behind(self) -> list[Unfinished]:
        """Requests of the last process, in order of arrival, each to be restored. To be asked once."""
        return self._journal.unfinished()

    def restore(self, left: Unfinished) -> None:
        """Go on with a request of the last process, or fail it for good."""
        self._arrivals.restore(left)
        self._outbox.flush()

    def cancel(self, request_id: str, tenant: str | None = None) -> None:
        """End a request; one that has ended already, or is of another tenant if one is given, is ignored."""
        if (state := self.requests.find(request_id, tenant)) is not None:
            self._finisher.abort(state, Cancelled("cancelled by the client"))
            self._end_turn()

    def manage(self, request: Release | ListSessions | ChangeSession) -> Reply:
        """List or change sessions.

        Raises:
            ContextNotFound: There is no such session.
            InvalidRequest: It is in use, or the change makes no sense.
        """
        reply = self._commands.manage(request)
        self._publish()
        return reply

    # What may be known.

    @property
    def longest(self) -> int:
        """Tokens that one sequence may have. In another thread: `published.longest`."""
        return self._arrivals.longest

    def stats(self) -> dict[str, object]:
        """Requests, counters and bytes by name. From any thread."""
        return self.published.values()

    @property
    def progress(self) -> int:
        """Grows as long as a step goes on: with layers attended to, bytes read and written. From any thread:
        each is one number that one thread counts.
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
        """Windows, rows and runs belong to running requests and idle contexts, and to nothing else."""
        running = [state.sequence for state in self.requests if state.sequence is not None]
        self._sequences.check_integrity([*running, *self.contexts])
        self.requests.check_integrity(self._scheduler)

    # The process.

    def warm_up(self) -> None:
        """Compute something before the first request, so that it need not wait for what comes only once."""
        self._sequences.warm_up(self._chunk_tokens)
        self.check_integrity()

    def adjust(self, config: Config) -> None:
        """Take the settings that may change between two steps. What is under way keeps what it began with: a
        context its lifetime.
        """
        self._prefill.gap_s = config.max_gap_ms / 1e3
        self.sessions.context_ttl_s = config.context_ttl_s
        self._upkeep.retention_s = config.retention_s
        if self._store.disk is not None:
            self._store.disk.prefetch.deadline_s = config.read_deadline_s

    def fail_running(self, error: SpilldError) -> None:
        """A step broke: the KV of everything that ran in it is in doubt and goes with it."""
        self._finisher.abort_all(error, running=True)
        self._end_turn()

    def fail_all(self, error: SpilldError) -> None:
        """Fail every request, whether it runs or waits."""
        self._finisher.abort_all(error, running=False)
        self._end_turn()

    def lose(self) -> None:
        """The device is lost, in a step whose KV nobody has: nothing may be saved any more, nothing computed.
        What runs is computed again by the next process.
        """
        self._sequences.lost = True

    def suspend(self) -> frozenset[str]:
        """The process is about to end: save what runs.

        Returns:
            The ids of the requests that go on at the next start; the others fail.
        """
        self._finisher.suspend_all()
        self._outbox.flush()
        with logged("sessions that were held in memory are lost"):
            self._upkeep.write_held()
        if not self._sequences.lost:
            self._journal.end_life()
        left = frozenset(state.request.request_id for state in self.requests)
        if left:
            log.info("%d requests are saved: they go on at the next start", len(left))
        return left

    def close(self) -> None:
        """Close every part, whatever becomes of the others."""
        with ExitStack() as stack:
            stack.callback(self._journal.close)
            stack.callback(self._store.close)
            stack.callback(self.archives.close)
            stack.callback(self._runner.close)
            stack.callback(self._runner.rest)
