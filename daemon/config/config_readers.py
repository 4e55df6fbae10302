"""Readers of the values of settings: sizes, folders, addresses."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from spilld.fields import FieldError, FieldReader, Text
from spilld.protocol.address import check_address, check_endpoint

BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DECIMAL = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NUMBER = re.compile(r"\s*(\d{1,15}(?:\.\d{1,9})?(?:E\+?\d{1,2})?)\s*(?:([KMGT])(I?B)?|B)?\s*", re.ASCII)
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Bytes(FieldReader):
    """A number of bytes: a whole number, or a string such as "8G", "512 MiB" or "1.5TB".

    K, M, G and T are powers of 1024, as KiB to TiB are, and as in systemd and llama.cpp; with a B alone, KB
    to TB, they are powers of 1000. Small letters are accepted as well.
    """

    def read(self, value: object, name: str) -> int:
        """See FieldReader.read."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is int and 0 <= value <= _LARGEST:
            return value
        if isinstance(value, str) and (parts := _NUMBER.fullmatch(value.upper())):
            units = _DECIMAL if parts[3] == "B" else BINARY
            size = Decimal(parts[1]) * (units[parts[2]] if parts[2] else 1)
            if size <= _LARGEST:
                return int(size)
        raise FieldError(name, value, 'bytes, or a string such as "8G", "512MiB" or "1.5TB"')


@dataclass(frozen=True)
class FolderPath(FieldReader):
    """A full path; ~ is the home directory."""

    def read(self, value: object, name: str) -> Path:
        """See FieldReader.read."""
        path = Path(os.path.expanduser(value) if isinstance(value, str | Path) else "")  # noqa: PTH111 (never raises)
        if path.is_absolute():
            return path
        raise FieldError(name, value, "a full path, or one that starts with ~")


@dataclass(frozen=True)
class ListenAddress(FieldReader):
    """An address to listen at: ipc:// and a path, or tcp:// and an endpoint."""

    def read(self, value: object, name: str) -> str:
        """See FieldReader.read.

        Raises:
            FieldError: The value is not a text.
            ConfigError: The address is of another form.
        """
        return check_address(Text(1).read(value, name), keyed=True)


@dataclass(frozen=True)
class MetricsEndpoint(FieldReader):
    """HOST:PORT on the loopback."""

    def read(self, value: object, name: str) -> str:
        """See FieldReader.read.

        Raises:
            FieldError: The value is not a text.
            ConfigError: It is not an endpoint of the loopback.
        """
        return check_endpoint(Text(1).read(value, name))
