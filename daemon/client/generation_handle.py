"""What the generations of both clients have in common."""

from __future__ import annotations

from spilld.protocol.messages import Done, Event, Token

from .pending_request import PendingRequest


class GenerationHandle:
    """The state of one generation, as it has come so far."""

    def __init__(self, pending: PendingRequest) -> None:
        self._pending = pending

    @property
    def id(self) -> str:
        """The request's id, by which `resume` finds this generation again."""
        return self._pending.request_id

    @property
    def result(self) -> Done:
        """Reason, text, usage and context handle; only after the end.

        Raises:
            SpilldError: What ended the generation instead; Cancelled if it was closed before its end.
            RuntimeError: It has not been read to its end.
        """
        return self._pending.result()

    @property
    def begun(self) -> bool:
        """Whether the daemon has begun with it.

        Then the prompt is part of its session or context, even if it is cancelled.
        """
        return self._pending.begun

    @property
    def text_so_far(self) -> str:
        """The text that has arrived, read or not."""
        return "".join(self._pending.pieces)


def added_text(event: Event, shown: int) -> str:
    """Return the text that an event adds to the `shown` characters before it.

    The last event may add what was kept back for a stop string that never came.
    """
    match event:
        case Token(text=text):
            return text
        case Done(text=text):
            return text[shown:]
        case _:
            return ""
