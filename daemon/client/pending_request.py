"""A request of this client that is in flight, and its replies that nobody has taken yet."""

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
    """One request and what has come back of it. Times are `time.monotonic()` seconds."""

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
        """The id of its request."""
        return self.request.request_id

    @property
    def lasts(self) -> bool:
        """Whether it outlives the connection: the daemon keeps what comes of it."""
        return isinstance(self.request, Generate | Resume)

    def result(self) -> Done:
        """The last event.

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
        """Keep what is to be known of a reply before, or whether or not, it is taken."""
        match reply:
            case Accepted():
                self.begun = True
            case Token(text=text):
                self.pieces.append(text)
            case Done(text=text):
                self.done, self.pieces = reply, [text]

    def changed(self) -> None:
        """Tell who waits for it that something has come, or that it has ended."""
        if self.on_change is not None:
            self.on_change()
