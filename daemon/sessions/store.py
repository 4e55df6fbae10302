"""Session store: the tokens of named sequences, on disk.

The KV of a session is found by its tokens, or computed again, so a session is small, and forks share KV.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import msgpack
import numpy as np

from spilld.errors import ContextNotFound, InvalidRequest
from spilld.offload.disk.index.database import Database
from spilld.protocol.messages import Message

SESSIONS_TABLE = """
CREATE TABLE sessions (
    tenant TEXT, name TEXT, tokens BLOB NOT NULL, messages BLOB, listed INTEGER NOT NULL,
    pinned INTEGER NOT NULL, ttl_s REAL, created REAL NOT NULL, used REAL NOT NULL, model TEXT NOT NULL,
    identity BLOB NOT NULL, PRIMARY KEY (tenant, name)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, kw_only=True)
class Session:
    """One named sequence.

    Attributes:
        tenant: The tenant that it belongs to.
        name: Chosen by its user if it is `listed`, else the handle of a kept context.
        tokens: All token ids.
        messages: The chat so far, None after a raw prompt.
        listed: Whether it is a named session, and no kept context.
        pinned: Its KV is not evicted.
        ttl_s: Seconds without use after which it is deleted; None for never.
        created: Seconds since 1970.
        used: Seconds since 1970 at its last use.
        model: Name of the model that the tokens are of; empty before its first use.
        identity: Identity of that model; empty before its first use.
    """

    tenant: str
    name: str
    tokens: tuple[int, ...] = ()
    messages: tuple[Message, ...] | None = None
    listed: bool = True
    pinned: bool = False
    ttl_s: float | None = None
    created: float = 0.0
    used: float = 0.0
    model: str = ""
    identity: bytes = b""

    @property
    def key(self) -> tuple[str, str]:
        """The (tenant, name) of the session."""
        return self.tenant, self.name


class SessionStore:
    """Every session of a state folder. Not thread-safe.

    Sessions that are not written yet are kept in memory, and found there, until they are.

    Methods that use the database raise OSError where it cannot be read or written, and IndexDamaged where it
    is damaged; methods that need a session raise ContextNotFound for an unknown name.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._pending: dict[tuple[str, str], Session] = {}

    def find(self, tenant: str, name: str) -> Session | None:
        """Return a session, None if there is none of this name."""
        if (pending := self._pending.get((tenant, name))) is not None:
            return pending
        rows = self._db.rows("SELECT * FROM sessions WHERE tenant = ? AND name = ?", (tenant, name))
        return _session(*rows[0]) if rows else None

    def get(self, tenant: str, name: str) -> Session:
        """Return a session.

        Raises:
            ContextNotFound: There is none of this name.
        """
        if (session := self.find(tenant, name)) is None:
            raise ContextNotFound(
                f"there is no session or context {name!r}: it was deleted, or expired; send the whole prompt"
            )
        return session

    def put(self, session: Session) -> None:
        """Write a session in place of the one of its name, as used now."""
        self._write(_used_now(session))
        self._pending.pop(session.key, None)

    def hold(self, session: Session) -> None:
        """Put a session like `put`, but in memory, until `write_pending` succeeds."""
        self._pending[session.key] = _used_now(session)

    def write_pending(self, sessions: Iterable[Session] | None = None) -> None:
        """Write these sessions, or all, of those in memory, in the caller's transaction.

        The caller calls `drop_pending` after the transaction.
        """
        for session in self._chosen(sessions):
            self._write(session)

    def drop_pending(self, sessions: Iterable[Session] | None = None) -> None:
        """Drop these sessions, or all, from memory, as they are on disk."""
        for session in self._chosen(sessions):
            del self._pending[session.key]

    def _chosen(self, sessions: Iterable[Session] | None) -> list[Session]:
        keys = list(self._pending) if sessions is None else dict.fromkeys(session.key for session in sessions)
        return [self._pending[key] for key in keys if key in self._pending]

    def _refuse_pending(self, tenant: str, name: str) -> None:
        if (tenant, name) in self._pending:
            raise OSError(f"session {name!r} is in memory only until the state folder can be written")

    def _write(self, session: Session) -> None:
        values = (
            *(session.tenant, session.name, np.asarray(session.tokens, "<u4").tobytes()),
            *(_packed(session.messages), session.listed, session.pinned, session.ttl_s),
            *(session.created, session.used, session.model, session.identity),
        )
        self._db.run(f"INSERT OR REPLACE INTO sessions VALUES ({', '.join('?' * len(values))})", values)

    def fork(self, tenant: str, name: str, into: str, tokens: int | None = None) -> None:
        """Copy a session under a new name: its first `tokens` tokens, or all.

        Raises:
            InvalidRequest: The new name is taken, or the session has fewer tokens.
        """
        source = self.get(tenant, name)
        self.refuse_taken(tenant, into)
        if tokens is not None and not 0 < tokens <= len(source.tokens):
            raise InvalidRequest(f"tokens is {tokens}; allowed: 1 to {len(source.tokens)}")
        cut = tokens is not None and tokens < len(source.tokens)
        self.put(
            replace(
                source,
                name=into,
                tokens=source.tokens[:tokens],
                messages=None if cut else source.messages,
                listed=True,
                pinned=False,
                ttl_s=None if not source.listed else source.ttl_s,
                created=0.0,
            )
        )

    def rename(self, tenant: str, name: str, into: str) -> None:
        """Give a session another name; a kept context becomes a session without a lifetime.

        Raises:
            InvalidRequest: The new name is taken.
            OSError: The session is in memory only.
        """
        session = self.get(tenant, name)
        self.refuse_taken(tenant, into)
        self._refuse_pending(tenant, name)
        ttl_s = session.ttl_s if session.listed else None
        self._db.run(
            "UPDATE sessions SET name = ?, listed = 1, ttl_s = ? WHERE tenant = ? AND name = ?",
            (into, ttl_s, tenant, name),
        )

    def keep(self, tenant: str, name: str, *, pinned: bool, ttl_s: float | None) -> None:
        """Change whether a session is pinned, and its lifetime.

        Raises:
            OSError: The session is in memory only.
        """
        self._refuse_pending(tenant, name)
        changed = self._db.run(
            "UPDATE sessions SET pinned = ?, ttl_s = ?, used = ? WHERE tenant = ? AND name = ?",
            (pinned, ttl_s, time.time(), tenant, name),
        )
        if not changed:
            self.get(tenant, name)

    def delete(self, tenant: str, name: str) -> None:
        """Delete a session, in memory and on disk."""
        self.get(tenant, name)
        self._db.run("DELETE FROM sessions WHERE tenant = ? AND name = ?", (tenant, name))
        self._pending.pop((tenant, name), None)

    def of(self, tenant: str) -> list[Session]:
        """Return a tenant's named sessions, in the order of their names."""
        rows = self._db.rows("SELECT * FROM sessions WHERE tenant = ? AND listed", (tenant,))
        written = {session.key: session for session in (_session(*row) for row in rows)}
        pending = {
            key: session for key, session in self._pending.items() if key[0] == tenant and session.listed
        }
        return sorted((written | pending).values(), key=lambda session: session.name)

    def names(self) -> list[tuple[str, str]]:
        """Return (tenant, name) of every session with a name or a pin: pinned ones, then the last used."""
        return self._db.rows(
            "SELECT tenant, name FROM sessions WHERE listed OR pinned ORDER BY pinned DESC, used DESC"
        )

    def expired(self) -> list[tuple[str, str]]:
        """Return (tenant, name) of the sessions whose lifetime is over."""
        now = time.time()
        rows = self._db.rows(
            "SELECT tenant, name FROM sessions WHERE NOT pinned AND used + ttl_s < ?", (now,)
        )
        pending = [
            session.key
            for session in self._pending.values()
            if not session.pinned and session.ttl_s is not None and session.used + session.ttl_s < now
        ]
        return [*(key for key in rows if key not in self._pending), *pending]

    def refuse_taken(self, tenant: str, name: str) -> None:
        """Refuse a name that is in use.

        Raises:
            InvalidRequest: There is a session of this name.
        """
        if self.find(tenant, name) is not None:
            raise InvalidRequest(f"there is a session {name!r} already; delete it or choose another name")


def _used_now(session: Session) -> Session:
    now = time.time()
    return replace(session, created=session.created or now, used=now)


def _packed(messages: Sequence[Message] | None) -> bytes | None:
    if messages is None:
        return None
    packed: bytes = msgpack.packb([(message.role, message.content) for message in messages])
    return packed


def _session(
    tenant: str,
    name: str,
    tokens: bytes,
    messages: bytes | None,
    listed: int,
    pinned: int,
    ttl_s: float | None,
    created: float,
    used: float,
    model: str,
    identity: bytes,
) -> Session:
    turns = None if messages is None else msgpack.unpackb(messages)
    return Session(
        tenant=tenant,
        name=name,
        tokens=tuple(np.frombuffer(tokens, "<u4").tolist()),
        messages=None if turns is None else tuple(Message(role=role, content=text) for role, text in turns),
        listed=bool(listed),
        pinned=bool(pinned),
        ttl_s=ttl_s,
        created=created,
        used=used,
        model=model,
        identity=identity,
    )
