"""What a client asks the daemon, without a socket: operations yield requests and are sent replies."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple, TypeVar

from spilld.errors import ProtocolError
from spilld.protocol.messages import Reply, Request

R = TypeVar("R", bound=Reply)
T = TypeVar("T")


class Query(NamedTuple):
    """A request that one reply answers."""

    request: Request
    reply: type[Reply]
    timeout_s: float


Operation = Generator[Query, Any, T]
"""Yields queries, is sent the reply to each, of the type that the query names, and returns the result."""


def expect(reply: Reply | None, kind: type[R]) -> R:
    """Check the type of a reply.

    Raises:
        ProtocolError: It is of another type, or None.
    """
    if not isinstance(reply, kind):
        raise ProtocolError(f"the daemon answered with {type(reply).__name__}, not {kind.__name__}")
    return reply


def ask(request: Request, kind: type[R], timeout_s: float) -> Operation[R]:
    """Make the operation of one query, whose result is the reply."""
    return expect((yield Query(request, kind, timeout_s)), kind)
