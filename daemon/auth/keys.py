"""CURVE keys (ZeroMQ RFC 26): the daemon's key, and those of its clients.

Clients recognise the daemon by its public key, and the daemon its clients by theirs.
"""

from __future__ import annotations

import os
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

import zmq
from zmq.utils import z85

from spilld.errors import ConfigError
from spilld.fields import FieldError, FieldReader
from spilld.toml_file import TomlFile


@dataclass(frozen=True)
class Key(FieldReader):
    """Reads a key: 32 bytes in Z85 (ZeroMQ RFC 32).

    An error does not show the value: it may be close to a secret.
    """

    def read(self, value: object, name: str) -> str:
        """See FieldReader.read."""
        with suppress(ValueError, KeyError, struct.error):
            if isinstance(value, str) and len(z85.decode(value)) == 32:
                return value
        raise FieldError(name, "***", "a key of 40 characters, as `spilld keys` writes it")


@dataclass(frozen=True, kw_only=True)
class ServerKey:
    """The key of a daemon."""

    secret: Annotated[str, Key()] = field(repr=False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the daemon's key from a file.

        Raises:
            ConfigError: There is none, or others than its owner can read or replace it.
        """
        file = _secret_file(path)
        refuse_if_others_write(path)
        return file.read(cls)

    @property
    def public(self) -> str:
        """The public key, in Z85."""
        return public_of(self.secret)


@dataclass(frozen=True, kw_only=True)
class ClientKey:
    """What a client needs to connect: its own secret key and the daemon's public one."""

    secret: Annotated[str, Key()] = field(repr=False)
    server: Annotated[str, Key()]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a client's key from a file.

        Raises:
            ConfigError: There is none, or others than its owner can read it.
        """
        return _secret_file(Path(path)).read(cls)

    @property
    def public(self) -> str:
        """The client's public key, in Z85."""
        return public_of(self.secret)


def refuse_if_others_write(path: Path) -> None:
    """Refuse a file that decides who may connect if others can change or replace it.

    Others are all users but the daemon's own and root.

    Raises:
        ConfigError: The file or its folder belongs to another user, or can be written by others.
    """
    for place in (path, path.parent):
        status = place.stat()
        if os.geteuid() not in (0, status.st_uid) and status.st_uid != 0:
            raise ConfigError(f"{place} is another user's; `chown` it to the daemon's user, or to root")
        safe = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & 0o022 and not safe:
            raise ConfigError(
                f"{place} can be written by others: look what is in it, then `chmod go-w {place}`"
            )


def public_of(secret: str) -> str:
    """Return the public key of a secret key, both in Z85."""
    return zmq.curve_public(secret.encode()).decode()


def _secret_file(path: Path) -> TomlFile:
    file = TomlFile(path)
    if path.stat().st_mode & 0o077:
        raise ConfigError(
            f"{path} is open to others: make new keys, or, if nobody saw it, `chmod 600 {path}`"
        )
    return file
