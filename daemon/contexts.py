"""Contexts that outlive their request: finished sequences under a handle, waiting to be continued."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import ContextNotFound
from .protocol import Message
from .sequence import Sequence


@dataclass
class Context:
    """A sequence that no request is running on. messages is the chat so far, None after a raw prompt."""

    handle: str
    sequence: Sequence
    messages: tuple[Message, ...] | None = None
    used: float = 0.0


class Contexts:
    """Idle contexts, least recently used first. A claimed one is its claimant's until it is kept again."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._idle: dict[str, Context] = {}

    def __len__(self) -> int:
        return len(self._idle)

    def __iter__(self) -> Iterator[Context]:
        return iter(self._idle.values())

    def keep(self, context: Context) -> None:
        context.used = time.monotonic()
        self._idle[context.handle] = context

    def claim(self, handle: str) -> Context:
        """Take a context out. Raises ContextNotFound."""
        context = self.look(handle)
        del self._idle[handle]
        return context

    def look(self, handle: str) -> Context:
        """A context, left where it is. Raises ContextNotFound."""
        if handle not in self._idle:
            raise ContextNotFound(
                "no such context: it was released, expired, evicted, or another request runs on it; "
                "send the whole prompt again"
            )
        return self._idle[handle]

    def oldest(self) -> Context | None:
        """Take the least recently used context out, if there is one."""
        return self._idle.pop(next(iter(self._idle))) if self._idle else None

    def expired(self) -> list[Context]:
        """Take those out that have not been used for ttl_s."""
        limit = time.monotonic() - self._ttl_s
        return [self._idle.pop(c.handle) for c in list(self._idle.values()) if c.used < limit]


def new_handle() -> str:
    """128 random bits: whoever knows a handle may use it."""
    return secrets.token_hex(16)
