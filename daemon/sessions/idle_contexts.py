"""Idle contexts: the sequences that sessions have in memory between two requests."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

from spilld.kv.sequence import KVSequence

Key = tuple[str, str]
"""(tenant, name) of a session, or (tenant, handle) of a kept context, which is an unnamed session."""


class Contexts:
    """Idle sequences, least recently used first. A claimed one belongs to its request until it is kept again.

    Discarding one loses no session: its tokens are on disk, and its KV as far as the disk had room.
    """

    def __init__(self) -> None:
        self._idle: dict[Key, KVSequence] = {}

    def __len__(self) -> int:
        return len(self._idle)

    def __iter__(self) -> Iterator[KVSequence]:
        return iter(self._idle.values())

    def keep(self, sequence: KVSequence, key: Key) -> None:
        """Add a sequence, as the most recently used."""
        self._idle[key] = sequence

    def claim(self, key: Key) -> KVSequence | None:
        """Remove and return a sequence, None if there is none."""
        return self._idle.pop(key, None)

    def get(self, key: Key) -> KVSequence | None:
        """Return a sequence and leave it in place, None if there is none."""
        return self._idle.get(key)

    def oldest(self) -> KVSequence | None:
        """Remove and return the least recently used sequence, None if there is none."""
        return self._idle.pop(next(iter(self._idle))) if self._idle else None


def new_handle() -> str:
    """Return 128 random bits in hexadecimal, which authorise whatever client knows them."""
    return secrets.token_hex(16)
