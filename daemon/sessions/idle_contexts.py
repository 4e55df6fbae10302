"""Sequences between requests: what a session has in memory, waiting to be continued."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

from spilld.kv.sequence import Sequence

Key = tuple[str, str]
"""(tenant, name) of a session, or (tenant, handle) of a kept context, which is a session without a name."""


class Contexts:
    """Idle sequences, least recently used first. A claimed one is its claimant's until it is kept again.

    Losing one loses no session: its tokens are on disk, and its KV as far as the disk had room.
    """

    def __init__(self) -> None:
        self._idle: dict[Key, Sequence] = {}

    def __len__(self) -> int:
        return len(self._idle)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._idle.values())

    def keep(self, sequence: Sequence, key: Key) -> None:
        self._idle[key] = sequence

    def claim(self, key: Key) -> Sequence | None:
        """Take a sequence out, if it is there."""
        return self._idle.pop(key, None)

    def get(self, key: Key) -> Sequence | None:
        """A sequence, left where it is."""
        return self._idle.get(key)

    def oldest(self) -> Sequence | None:
        """Take the least recently used sequence out, if there is one."""
        return self._idle.pop(next(iter(self._idle))) if self._idle else None


def new_handle() -> str:
    """128 random bits: whoever knows a handle may use it."""
    return secrets.token_hex(16)
