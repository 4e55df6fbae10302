"""What the server needs of an engine."""

from __future__ import annotations

from typing import Protocol

from spilld.protocol.messages import (
    ChangeSession,
    Generate,
    ListSessions,
    Release,
    Resume,
    TransferRequest,
    Welcome,
)


class Service(Protocol):
    """The engine, as the server sees it.

    No method may block; all are called from the server's thread.

    Events go to `Server.post(client, event)`: per request Accepted, ..., and one Done or Failed at the end,
    also after a cancel, with seq 0, 1, 2, ... Once the last is posted, the same id may be submitted again. A
    request goes on without a client until another resumes it.
    """

    def submit(self, client: bytes, request: Generate) -> None:
        """Take a request.

        Raises:
            SpilldError: It is refused at once (Overloaded, ContextNotFound, ...).
        """

    def resume(self, client: bytes, request: Resume) -> None:
        """Post what the client has missed of a request, and from then on its events; or Failed."""

    def cancel(self, request_id: str, tenant: str | None = None) -> None:
        """End a request soon; one that has ended, or is of another tenant if one is given, is ignored."""

    def acknowledge(self, request_id: str, next_seq: int, tenant: str | None = None) -> None:
        """Note that all events before next_seq have reached the client. Ignored as in `cancel`."""

    def leave(self, client: bytes, request_id: str) -> None:
        """Note that a client that got a request's events is gone."""

    def manage(self, client: bytes, request: Release | ListSessions | ChangeSession) -> None:
        """List or change sessions, or give a context back; one reply is posted."""

    def transfer(self, client: bytes, request: TransferRequest) -> None:
        """Export, import, read or write an archive; one reply is posted."""

    def stats(self) -> dict[str, object]:
        """Return plain data for StatsReply."""

    def welcome(self) -> Welcome:
        """Return what is served; the server fills in the request id."""

    def drain(self) -> None:
        """Admit nothing more; what is admitted goes on."""

    def progress(self) -> int:
        """Return a number that grows as long as the engine works, and while it has no work.

        It stays the same when the engine hangs.
        """

    def idle(self) -> bool:
        """Whether no request is running or queued, and the last event of each is posted."""

    def stop(self) -> frozenset[str]:
        """Stop now. Called once, when the loop has ended.

        Returns:
            The ids of the requests that go on when the daemon is back.
        """
