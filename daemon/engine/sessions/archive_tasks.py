"""Archive tasks: steps on the engine's thread, with work of the archive thread between them."""

from __future__ import annotations

import logging
import queue
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from spilld.errors import (
    CorruptArchive,
    Draining,
    ForeignArchive,
    InternalError,
    SpilldError,
    StorageFailed,
)
from spilld.offload.errors import ArchiveDamaged, ArchiveUnknown, OffloadError
from spilld.protocol.messages import (
    ExportSession,
    Failed,
    ImportSession,
    Reply,
)
from spilld.sessions.transfers import Transfers

from .archive_contents import AGAIN

log = logging.getLogger(__name__)

Answer = Callable[[Reply], None]


class _Stopped(Exception):
    """The daemon is stopping."""


@dataclass(eq=False)
class ArchiveTask(ABC):
    """One export or import, and the resources that it has."""

    request: ExportSession | ImportSession
    answer: Answer

    @abstractmethod
    def release(self, transfers: Transfers) -> None:
        """Give back the task's resources."""


class ArchiveTasks:
    """The tasks that have no reply yet. For the engine's thread."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._tasks: set[ArchiveTask] = set()
        self._ended: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(1, "spilld-archive")
        self._stopping = False

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: ArchiveTask) -> None:
        """Add a task, which will get a reply."""
        self._tasks.add(task)

    def done(self, task: ArchiveTask) -> None:
        """Forget a task that has no resources any more."""
        self._tasks.discard(task)

    def drop(self, task: ArchiveTask) -> None:
        """End a task, and give back its resources."""
        self._tasks.discard(task)
        task.release(self._transfers)

    def fail(self, task: ArchiveTask, error: SpilldError) -> None:
        """End a task with an error."""
        self.drop(task)
        task.answer(Failed.because(error, task.request.request_id))

    def tend(self) -> None:
        """Continue the tasks whose work has ended."""
        while not self._ended.empty():
            self._ended.get()()

    def close(self) -> None:
        """Stop the thread, and fail the remaining tasks."""
        self._stopping = True
        self._thread.shutdown(cancel_futures=True)
        for task in list(self._tasks):
            self.fail(task, Draining("the daemon has stopped"))

    def step(self, task: ArchiveTask, step: Callable[..., None], *given: object) -> None:
        """Run a step of a task; an error ends the task with a typed error."""
        if task not in self._tasks:
            return
        try:
            step(*given)
        except SpilldError as error:
            self.fail(task, error)
        except (OSError, OffloadError) as error:
            self.fail(task, StorageFailed(f"the session cannot be moved: {error}"))
        except Exception as error:
            log.exception("an archive failed")
            self.fail(task, InternalError(f"a bug in spilld: {error!r}"))

    def build(
        self, task: ArchiveTask, work: Callable[[], None], then: Callable[[Exception | None], None]
    ) -> None:
        """Run `work` on the archive thread, then `then` on the engine's thread.

        Args:
            task: The task that the work is for; `then` is one of its steps.
            work: What the archive thread does.
            then: Called with the exception that ended `work`, or None.
        """

        def run() -> None:
            failure: Exception | None = None
            try:
                work()
            except Exception as error:  # noqa: BLE001 (the engine thread gets it)
                failure = error
            self._ended.put(partial(self.step, task, then, failure))

        self._thread.submit(run)

    def check(self, _done: int = 0, _all: int = 0) -> None:
        """Raise an exception that ends the work if the daemon is stopping; called amid work."""
        if self._stopping:
            raise _Stopped


def raise_typed(failure: Exception | None) -> None:
    """Raise the error of the archive thread as a typed error; do nothing if it is None."""
    match failure:
        case None:
            return
        case ArchiveDamaged():
            raise CorruptArchive(f"the file is no whole archive of a session: {failure}; {AGAIN}")
        case ArchiveUnknown():
            raise ForeignArchive(f"the archive cannot be read: {failure}; install the version that wrote it")
        case _Stopped():
            raise Draining("the daemon has stopped; do it again when it is back")
    raise failure
