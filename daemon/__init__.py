"""Serves language models on one machine with contexts larger than its GPU.

    from spilld import Client

The client and its messages are imported when one of them is used; they need neither numpy nor torch.

The folders here are rooms: each says in its `__init__` what lives there and which rooms it may import.
ARCHITECTURE.md shows them together.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spilld.client.async_client import AsyncClient, AsyncGeneration
    from spilld.client.client import Client, Generation
    from spilld.protocol.messages import (
        Accepted,
        Done,
        Event,
        Exported,
        Imported,
        Message,
        Progress,
        SessionInfo,
        Token,
        Usage,
        Welcome,
    )

__all__ = [
    "Accepted",
    "AsyncClient",
    "AsyncGeneration",
    "Client",
    "Done",
    "Event",
    "Exported",
    "Generation",
    "Imported",
    "Message",
    "Progress",
    "SessionInfo",
    "Token",
    "Usage",
    "Welcome",
]


_HOMES = ("protocol.messages", "client.client", "client.async_client")
"""Modules that have the names above."""


if not TYPE_CHECKING:  # checkers know the names above, and no others

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        homes = (vars(import_module(f"{__name__}.{home}")) for home in _HOMES)
        globals()[name] = found = next(home[name] for home in homes if name in home)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
