"""How much one client may ask for, so that it cannot take all that the daemon has."""

from __future__ import annotations

from dataclasses import dataclass

from spilld.auth.authorized_clients import AuthorizedClient
from spilld.errors import Overloaded

from .rate_limit import Throttle


@dataclass(frozen=True)
class Account:
    """What limits apply to: a key with all its connections or, without keys, a connection."""

    name: str | bytes
    max_open: int
    max_rate: float


class Limits:
    """The limits of clients: those of all, or a client's own where clients.toml names some."""

    def __init__(self, max_open: int, max_rate: float) -> None:
        """Set the limits of clients that have none of their own.

        Both may be changed at any time, as attributes; they apply from the next message on.

        Args:
            max_open: Requests that may be open at a time.
            max_rate: Messages a second.
        """
        self.max_open = max_open
        self.max_rate = max_rate
        self._throttle = Throttle()

    def account(self, client: bytes, authorized: AuthorizedClient | None) -> Account:
        """Return the account that a client's requests count for, with its limits."""
        if authorized is None:
            return Account(client, self.max_open, self.max_rate)
        max_open, max_rate = authorized.max_open or self.max_open, authorized.max_rate or self.max_rate
        return Account(authorized.key, max_open, max_rate)

    def count(self, account: Account, now: float) -> None:
        """Count a message that has come.

        Args:
            account: Of the client.
            now: Seconds of time.monotonic().

        Raises:
            Overloaded: The rate is exceeded.
        """
        if not self._throttle.take(account.name, account.max_rate, now):
            raise Overloaded(
                f"more than {account.max_rate:g} messages a second came of this client; wait, or set max_rate"
            )

    def admit(self, account: Account, running: int) -> None:
        """Check that an account may open another request.

        Args:
            account: Of the client.
            running: Requests of the account that are open.

        Raises:
            Overloaded: There are max_open already.
        """
        if running >= account.max_open:
            raise Overloaded(f"{running} requests of this client are open; let one end, or set max_open")
