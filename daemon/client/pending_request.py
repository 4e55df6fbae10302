"""A request of this client that is in flight, and its replies that were not taken yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from spilld.errors import Cancelled, SpilldError
from spilld.protocol.messages import (
    Accepted,
    Done,
    Generate,
    Reply,
    Request,
    Resume,
    Token,
)


class PendingRequest:
    """One request and its replies. Times are `time.monotonic()` seconds."""

    def __init__(self, request: Request, *, deadline: float | None, connect_by: float) -> None:
        self.request = request
        self.deadline = deadline
        self.connect_by = connect_by
        self.lost_by: float | None = None  # the connection broke: nothing comes after this
        self.resuming = False
        self.replies: deque[Reply] = deque()
        self.next_seq = 0
        self.acknowledged = 0
        self.open = True  # a reply may still come
        self.error: SpilldError | None = None
        self.done: Done | None = None
        self.begun = False
        self.pieces: list[str] = []
        self.on_change: Callable[[], None] | None = None

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def lasts(self) -> bool:
        """Whether it outlives the connection: the daemon keeps its events."""
        return isinstance(self.request, Generate | Resume)

    def result(self) -> Done:
        """Return the last event.

        Raises:
            SpilldError: What ended the request instead.
            RuntimeError: It has not ended yet.
        """
        if self.done is not None:
            return self.done
        if self.error is None and not self.open:
            raise Cancelled("this generation was closed before its end: text_so_far is what came of it")
        raise self.error or RuntimeError("there is no result yet: read the generation to its end first")

    def note(self, reply: Reply) -> None:
        """Keep the state that a reply brings, whether or not the reply is taken."""
        match reply:
            case Accepted():
                self.begun = True
            case Token(text=text):
                self.pieces.append(text)
            case Done(text=text):
                self.done, self.pieces = reply, [text]

    def changed(self) -> None:
        """Call `on_change`, because a reply has come or the request has ended."""
        if self.on_change is not None:
            self.on_change()
