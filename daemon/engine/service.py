"""Engine service: runs the engine in its thread, and takes messages of the server without waiting."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from functools import partial

from spilld.config.config import Config
from spilld.cuda_ext.errors import DeviceError
from spilld.engine.sessions.manager import Chat
from spilld.errors import (
    Cancelled,
    DeviceUnusable,
    Draining,
    InternalError,
    Overloaded,
    SpilldError,
)
from spilld.monitoring.failures import is_lost, logged, typed
from spilld.protocol.messages import (
    ChangeSession,
    ExportSession,
    Failed,
    Generate,
    ImportSession,
    ListSessions,
    Release,
    Reply,
    Resume,
    TransferRequest,
    Welcome,
    is_last,
)
from spilld.requests.prompt import prompt_tokens
from spilld.requests.request_state import NO_CLIENT
from spilld.tokenizer.intake import Intake

from .arrivals import Composed
from .engine import Engine
from .outbox import Post

log = logging.getLogger(__name__)

IDLE_S = 1.0
"""Seconds between checks of an idle engine for expired sessions and deadlines."""

SETTLE_S = 0.02
"""Seconds between checks whether a write has ended, which the index does not know before."""


HOPELESS = 3
"""Failed turns in a row, with no request to blame, after which the engine ends for a new process to start."""


class EngineService:
    """Implements server.Service.

    The intake turns text into tokens and the engine's thread does the rest, so that neither a long text nor a
    long step makes the server wait.
    """

    def __init__(
        self,
        build: Callable[[Post], Engine],
        post: Post,
        welcome: Welcome,
        max_queue: int,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Build the engine.

        Args:
            build: Makes the engine, given where its events go.
            post: Sends a reply to a client.
            welcome: What clients learn of this daemon.
            max_queue: The most requests that may wait and run.
            on_lost: Called in the engine's thread when it stops computing for good; `lost` says why: the
                device is lost, or no turn succeeds.
        """
        self.lost: str | None = None
        self._on_lost = on_lost
        self._welcome = welcome
        self._max_queue = max_queue
        self._post = post
        self._engine = build(self._pass_on)
        self._unfinished = 0
        self._turns = 0
        self._failures = 0
        self._count_lock = threading.Lock()
        self._draining = False
        self._stopping = False
        self._suspended: frozenset[str] = frozenset()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._intake = Intake(self._inbox.put)
        self._engine.compose_with(self._compose)
        self._thread = threading.Thread(target=self._loop, name="spilld-engine")

    def warm_up(self) -> None:
        """Warm the engine up. To be called before `start`.

        Raises:
            DeviceUnusable: The device cannot compute; the engine is closed.
            InternalError: The engine cannot compute for another reason; it is closed.
        """
        try:
            self._engine.warm_up()
        except DeviceError as error:
            self._engine.close()
            advice = "lower device_budget or chunk_tokens, or restart the daemon"
            raise DeviceUnusable(f"the device cannot compute: {error}; {advice}") from error
        except Exception as error:
            log.exception("the warm-up failed")
            self._engine.close()
            raise InternalError(f"the engine cannot compute: {error!r}; the log says where") from error

    def start(self) -> None:
        """Restore what the last process left, and start the engine's thread."""
        self._engine.model.tokenizer.start()
        for left in self._engine.left_behind():
            self._count(+1)
            self._engine.restore(left)
        self._thread.start()

    def submit(self, client: bytes, request: Generate) -> None:
        """Queue a request.

        Raises:
            Draining: The daemon is stopping.
            Overloaded: Too many requests are queued or running.
            InvalidRequest: The request is invalid.
        """
        if self._draining:
            raise Draining("the daemon is stopping; try again when it is back")
        if self._unfinished >= self._max_queue:
            raise Overloaded(f"{self._max_queue} requests are queued or running; try again later")
        prepare = partial(self._prepare, client, request, time.time())
        on_cancel = partial(self._refuse, client, request, Cancelled("cancelled by the client"))
        self._count(+1)
        try:
            self._intake.prepare(client, request, prepare, on_cancel)
        except SpilldError:
            self._count(-1)
            raise

    def resume(self, client: bytes, request: Resume) -> None:
        """Send a client the events that it missed, and those to come."""
        self._intake.in_turn(client, partial(self._resume, client, request), request.request_id)

    def cancel(self, request_id: str, tenant: str | None = None) -> None:
        """Cancel a request, whether the intake or the engine has it."""
        if not self._intake.cancel(request_id, tenant):
            self._inbox.put(partial(self._engine.cancel, request_id, tenant))

    def acknowledge(self, request_id: str, next_seq: int, tenant: str | None = None) -> None:
        """See Subscriptions.acknowledge."""
        self._inbox.put(partial(self._engine.subscriptions.acknowledge, request_id, next_seq, tenant))

    def leave(self, client: bytes, request_id: str) -> None:
        """See Subscriptions.leave."""
        self._intake.in_turn(
            client, partial(self._engine.subscriptions.leave, client, request_id), request_id
        )

    def manage(self, client: bytes, request: Release | ListSessions | ChangeSession) -> None:
        """List or change sessions between two steps."""
        self._count(+1)
        self._intake.in_turn(client, partial(self._manage, client, request))

    @property
    def longest(self) -> int:
        """The most tokens that one sequence may have."""
        return self._engine.published.longest

    def stats(self) -> dict[str, object]:
        """See Engine.stats."""
        return self._engine.stats()

    def welcome(self) -> Welcome:
        """Return what clients learn of this daemon."""
        return self._welcome

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._draining = True

    def adjust(self, config: Config) -> None:
        """Take the settings that may change while requests run; the engine does so between two steps."""
        self._max_queue = config.max_queue
        self._inbox.put(partial(self._engine.adjust, config))

    def progress(self) -> int:
        """Return a number that grows with each turn, at least once in IDLE_S, and within a long turn."""
        return self._turns + self._engine.progress

    def idle(self) -> bool:
        """Return whether no request is unanswered."""
        return self._unfinished == 0

    def stop(self) -> frozenset[str]:
        """End the threads, after the step that is under way.

        Returns:
            The ids of the requests that are saved: they continue in the next process.
        """
        self._draining = self._stopping = True
        self._intake.stop(self._engine.model.tokenizer.close)
        self._inbox.put(lambda: None)
        self._thread.join()
        return self._suspended

    def transfer(self, client: bytes, request: TransferRequest) -> None:
        """Begin an export or import, or answer a request about a transfer's file."""
        self._count(+1)
        archives, answer = self._engine.archives, partial(self._pass_on, client)
        if isinstance(request, ExportSession | ImportSession):
            self._intake.in_turn(client, partial(archives.begin, request, answer))
        else:
            archives.serve(request, answer)

    # The intake's threads.

    def _prepare(self, client: bytes, request: Generate, arrived: float) -> Callable[[], None] | None:
        """Return what the engine's thread is to do with a request, None if it was refused."""
        try:
            prompt = prompt_tokens(request, self._engine.model, self._engine.published.longest)
        except SpilldError as error:
            self._refuse(client, request, error)
        except Exception as error:
            log.exception("request %s could not be prepared", request.request_id)
            self._refuse(client, request, InternalError(f"the prompt could not be prepared: {error!r}"))
        else:
            return partial(self._arrive, client, request, prompt, arrived)
        return None

    def _compose(self, chat: Chat, then: Composed) -> None:
        """Make the prompt of a request that continues a session, which was not known when it arrived."""

        def run() -> None:
            made: tuple[list[int], list[int]] | SpilldError
            try:
                made = chat()
            except Exception as error:  # noqa: BLE001 (the client gets it, or it is logged)
                made = typed(error, "the prompt could not be prepared")
            if not self._stopping:  # else the next process makes it
                self._inbox.put(partial(then, made))

        self._intake.compose(run)

    # The engine's thread.

    def _loop(self) -> None:
        while not self._stopping and self.lost is None:
            self._turns += 1
            try:
                self._take_messages()
                if not self._engine.turn():
                    self._wait()
                self._failures = 0
            except Exception as error:  # noqa: BLE001 (it is logged)
                self._failed(error)
        self._end()

    def _failed(self, error: Exception) -> None:
        """Handle a failed turn for which the engine blamed no request.

        The first time the running requests fail, as they may be the cause; the second time all requests fail.
        """
        if is_lost(error):
            self._give_up(f"the device is lost: {error}")
            return
        self._failures += 1
        if self._failures >= HOPELESS:
            self._give_up(f"{HOPELESS} steps in a row failed: {error!r}")
            return
        failure = typed(error, "a step failed")
        with logged("what ran in it could not be ended"):
            if self._failures == 1:
                self._engine.fail_running(failure)
            else:
                self._engine.fail_all(failure)

    def _give_up(self, why: str) -> None:
        log.critical("%s", why)
        self.lost = why
        self._engine.lose()
        self._on_lost()

    def _end(self) -> None:
        """Save what runs, as far as the device still works."""
        try:
            self._take_messages()
            self._suspended = self._engine.suspend()
        except Exception as error:  # noqa: BLE001 (it is logged)
            self._give_up(f"what runs cannot be saved: {error!r}")
            with logged("the engine could not be stopped in order"):
                self._suspended = self._engine.suspend()
        finally:
            self._engine.close()

    def _take_messages(self) -> None:
        while not self._inbox.empty():
            self._take(self._inbox.get())

    def _take(self, act: Callable[[], None]) -> None:
        """Handle one message; an error affects no other message."""
        with logged("a message could not be dealt with"):
            act()

    def _wait(self) -> None:
        self._engine.rest()
        try:
            act = self._inbox.get(timeout=SETTLE_S if self._engine.writing else IDLE_S)
        except queue.Empty:
            return
        self._take(act)

    def _arrive(self, client: bytes, request: Generate, prompt: list[int], arrived: float) -> None:
        try:
            self._engine.add(client, request, prompt, arrived)
        except Exception as error:
            self._refuse(client, request, typed(error, "the request could not be added"))
            if is_lost(error):
                raise

    def _resume(self, client: bytes, request: Resume) -> None:
        """Post the missed events unchanged, without counting them again."""
        try:
            for event in self._engine.subscriptions.resume(client, request):
                self._post(client, event)
        except Exception as error:
            failure = typed(error, "the events of this request cannot be read")
            self._post(client, Failed.because(failure, request.request_id, request.next_seq))
            if is_lost(error):
                raise

    def _manage(self, client: bytes, request: Release | ListSessions | ChangeSession) -> None:
        try:
            reply = self._engine.manage(request)
        except Exception as error:
            failure = typed(error, "the sessions cannot be listed or changed")
            self._pass_on(client, Failed.because(failure, request.request_id))
            if is_lost(error):
                raise
        else:
            self._pass_on(client, reply)

    # Both kinds of threads.

    def _refuse(self, client: bytes, request: Generate, error: SpilldError) -> None:
        self._pass_on(client, Failed.because(error, request.request_id))

    def _pass_on(self, client: bytes, reply: Reply) -> None:
        if client != NO_CLIENT:
            self._post(client, reply)
        if is_last(reply):
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._count_lock:
            self._unfinished += change
