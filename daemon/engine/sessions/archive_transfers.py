"""Exports sessions to archives and imports them, while the engine continues.

The engine's thread looks up, pins, reserves and commits; one thread reads and writes archives; another serves
the pieces that clients download and upload. Results come back to the engine's thread by `tend`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from spilld.errors import InternalError, InvalidRequest, SpilldError
from spilld.models.model import Model
from spilld.offload.store.store import Store
from spilld.protocol.messages import (
    CloseTransfer,
    ExportSession,
    Failed,
    ImportSession,
    OpenTransfer,
    Piece,
    ReadTransfer,
    Reply,
    Transfer,
    TransferRequest,
    WriteTransfer,
)
from spilld.sessions.idle_contexts import Key
from spilld.sessions.transfers import Transfers

from .archive_export import Exporter
from .archive_import import Importer
from .archive_tasks import Answer, ArchiveTasks
from .manager import SessionManager

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between checks for transfers that have expired."""


class ArchiveTransfers:
    """Exports and imports sessions: each request gets one reply.

    `serve` is thread-safe, everything else is for the engine's thread.
    """

    def __init__(
        self,
        transfers: Transfers,
        sessions: SessionManager,
        store: Store,
        model: Model,
        refuse_if_busy: Callable[[Key], None],
        longest: Callable[[], int],
    ) -> None:
        """Start the threads.

        Args:
            transfers: The files.
            sessions: What is exported, and where imports go.
            store: Where the KV is.
            model: The model that is served.
            refuse_if_busy: Raises InvalidRequest if a request runs on a session.
            longest: Returns the most tokens that a session may have.
        """
        self._transfers = transfers
        self._tasks = tasks = ArchiveTasks(transfers)
        self._exporter = Exporter(tasks, transfers, sessions, store, model)
        self._importer = Importer(tasks, transfers, sessions, store, model, refuse_if_busy, longest)
        self._thread = ThreadPoolExecutor(1, "spilld-transfer")
        self._looked = 0.0

    @property
    def busy(self) -> bool:
        """Whether `tend` is to be called soon."""
        return len(self._tasks) > 0

    def tend(self) -> None:
        """Continue tasks whose work has ended, and end expired transfers."""
        self._tasks.tend()
        self._exporter.tend()
        if len(self._transfers) and time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            self._thread.submit(self._transfers.expire)

    def begin(self, request: ExportSession | ImportSession, answer: Answer) -> None:
        """Begin an export or an import."""
        if isinstance(request, ExportSession):
            self._exporter.begin(request, answer)
        else:
            self._importer.begin(request, answer)

    def serve(self, request: TransferRequest, answer: Answer) -> None:
        """Answer a request about one transfer's file."""
        self._thread.submit(self._serve, request, answer)

    def close(self) -> None:
        """Fail all tasks, stop the threads, and remove all transfers."""
        self._thread.shutdown(cancel_futures=True)
        self._tasks.close()
        self._transfers.close_all()

    # The transfer thread.

    def _serve(self, request: TransferRequest, answer: Answer) -> None:
        try:
            answer(self._piece(request))
        except SpilldError as error:
            answer(Failed.because(error, request.request_id))
        except Exception as error:
            log.exception("a transfer failed")
            answer(Failed.because(InternalError(f"a bug in spilld: {error!r}"), request.request_id))

    def _piece(self, request: TransferRequest) -> Reply:
        name = request.request_id
        match request:
            case OpenTransfer(nbytes=nbytes):
                return Transfer(request_id=name, transfer=self._transfers.open(nbytes), nbytes=0)
            case ReadTransfer(transfer=transfer, offset=offset):
                return Piece(request_id=name, data=self._transfers.read(transfer, offset))
            case WriteTransfer(transfer=transfer, offset=offset, data=data):
                received = self._transfers.write(transfer, offset, data)
                return Transfer(request_id=name, transfer=transfer, nbytes=received)
            case CloseTransfer(transfer=transfer):
                return Transfer(request_id=name, transfer=transfer, nbytes=self._transfers.close(transfer))
        raise InvalidRequest(f"{type(request).__name__} is about no transfer")
