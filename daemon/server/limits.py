"""How much one client may ask for, so that it cannot take all that the daemon has."""

from __future__ import annotations

from dataclasses import dataclass

from spilld.auth.clients import AuthorizedClient
from spilld.errors import Overloaded

from .rate_limit import Throttle


@dataclass(frozen=True)
class Account:
    """What limits count for: a key with all its connections or, where there are no keys, a connection."""

    name: str | bytes
    max_open: int
    max_rate: float


class Limits:
    """Limits of all clients, or a client's own where clients.toml names some."""

    def __init__(self, max_open: int, max_rate: float) -> None:
        """Requests that may be open at a time, and messages a second; for who has no limits of its own.

        Both may be changed at any time: they hold for the next message.
        """
        self.max_open = max_open
        self.max_rate = max_rate
        self._throttle = Throttle()

    def account(self, client: bytes, authorized: AuthorizedClient | None) -> Account:
        """Whom a client's requests count for, and within which limits."""
        if authorized is None:
            return Account(client, self.max_open, self.max_rate)
        max_open, max_rate = authorized.max_open or self.max_open, authorized.max_rate or self.max_rate
        return Account(authorized.key, max_open, max_rate)

    def count(self, account: Account, now: float) -> None:
        """A message has come. Overloaded if it is one too many; the clock is time.monotonic()."""
        if not self._throttle.take(account.name, account.max_rate, now):
            raise Overloaded(
                f"more than {account.max_rate:g} messages a second came of this client; wait, or set max_rate"
            )

    def admit(self, account: Account, running: int) -> None:
        """A request comes to those of the account that are open. Overloaded if it is one too many."""
        if running >= account.max_open:
            raise Overloaded(f"{running} requests of this client are open; let one end, or set max_open")
