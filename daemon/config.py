"""The configuration: defaults, a TOML file, and what the command line overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from spilld.offload.record import SEALED, Element

from .address import check_address, check_endpoint, default_address
from .errors import ConfigError
from .fields import Choice, FieldError, Flag, Int, Maybe, Reader, Real, Text, readers
from .guests import MAX_OPEN, MAX_RATE
from .toml_file import TomlFile

GIB = 2**30

WEIGHTS = ("auto", "bf16", "int8", "int4")
"""What steps read. auto: the codes of a quantised GGUF file in bfloat16, else bf16, which
is no copy: what `dtype` says. With device "cuda" and a torch that finds the GPU, auto is bf16, on the GPU."""

DEVICES = ("cpu", "cuda")
"""What has windows, the hottest records and, if torch can, the weights that are not packed."""

_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DECIMAL = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS = {"": 1, "B": 1} | _BINARY | _DECIMAL


@dataclass(frozen=True)
class Size(Reader):
    """Bytes: an integer, or a string such as "512MiB", "2 GiB" or "1.5TB"."""

    def read(self, value: object, name: str) -> int:
        if type(value) is int and value >= 0:
            return value
        if isinstance(value, str):
            parts = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", value)
            if parts and parts[2] in _UNITS:
                return int(Decimal(parts[1]) * _UNITS[parts[2]])
        raise FieldError(name, value, 'bytes, or a string such as "512MiB", "2 GiB" or "1.5TB"')


@dataclass(frozen=True)
class Folder(Reader):
    """A full path; ~ is the home directory."""

    def read(self, value: object, name: str) -> Path:
        path = Path(os.path.expanduser(value) if isinstance(value, str | Path) else "")  # noqa: PTH111 (never raises)
        if path.is_absolute():
            return path
        raise FieldError(name, value, "a full path, or one that starts with ~")


@dataclass(frozen=True)
class Address(Reader):
    def read(self, value: object, name: str) -> str:
        return check_address(Text(1).read(value, name), keyed=True)


@dataclass(frozen=True)
class Endpoint(Reader):
    def read(self, value: object, name: str) -> str:
        return check_endpoint(Text(1).read(value, name))


def _folder(service_variable: str, user_variable: str, fallback: str) -> Path:
    """What systemd made for the service, else the XDG directory of the user."""
    if given := os.environ.get(service_variable):
        return Path(given.split(":")[0])
    base = Path(os.environ.get(user_variable, ""))
    return (base if base.is_absolute() else Path.home() / fallback) / "spilld"


def _state() -> Path:
    return _folder("STATE_DIRECTORY", "XDG_STATE_HOME", ".local/state")


def _cache() -> Path:
    return _folder("CACHE_DIRECTORY", "XDG_CACHE_HOME", ".cache")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes in bytes, times in seconds. systemd/spilld.toml explains each setting."""

    model: Annotated[str, Text(1)] = "smollm2-135m"
    format: Annotated[str, Choice(SEALED)] = "k8v4"
    dtype: Annotated[str, Choice(tuple(Element))] = "bfloat16"
    weights: Annotated[str, Choice(WEIGHTS)] = "auto"
    device: Annotated[str, Choice(DEVICES)] = "cpu"
    device_budget: Annotated[int | None, Maybe(Size())] = None
    """For windows and, on a GPU, hot records and what attention takes, but not weights and what torch takes
    for a step; None is room for a few windows."""
    host_budget: Annotated[int, Size()] = 2 * GIB
    disk_budget: Annotated[int, Size()] = 16 * GIB
    disk_floor: Annotated[int, Size()] = GIB
    memory_floor: Annotated[int, Size()] = 256 * 2**20
    compaction_rate: Annotated[int, Size()] = 32 * 2**20
    write_budget: Annotated[int | None, Maybe(Size())] = None
    state: Annotated[Path, Folder()] = field(default_factory=_state)
    cache: Annotated[Path, Folder()] = field(default_factory=_cache)
    listen: Annotated[str, Address()] = field(default_factory=default_address)
    open_to_group: Annotated[bool, Flag()] = False
    keys: Annotated[Path | None, Maybe(Folder())] = None
    metrics: Annotated[str | None, Maybe(Endpoint())] = None
    chunk_tokens: Annotated[int, Int(1, 65536)] = 512
    max_gap_ms: Annotated[float, Real(0, 3600000, above=True)] = 250.0
    max_context: Annotated[int | None, Maybe(Int(1))] = None
    max_queue: Annotated[int, Int(1, 65536)] = 64
    max_open: Annotated[int, MAX_OPEN] = 32
    max_rate: Annotated[float, MAX_RATE] = 1000.0
    max_connections: Annotated[int, Int(1, 65536)] = 1000
    drain_seconds: Annotated[float, Real(0, 86400)] = 30.0
    read_deadline_s: Annotated[float, Real(0, 86400, above=True)] = 30.0
    threads: Annotated[int | None, Maybe(Int(1, 4096))] = None
    context_ttl_s: Annotated[float, Real(0, above=True)] = 3600.0
    retention_s: Annotated[float, Real(0, above=True)] = 120.0

    @classmethod
    def load(cls, path: Path | None = None, overrides: Mapping[str, object] | None = None) -> Config:
        """The defaults, changed by a TOML file, changed by `overrides`; an override of None is one not given.

        Raises ConfigError that names the key, its value, what is allowed, and the line if it is in the file.
        """
        file = TomlFile(path) if path is not None else None
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        values = (file.values if file is not None else {}) | given

        def where(name: str) -> str:
            return "" if file is None or name in given else f"{file.where(name)}: "

        kind: type = cls
        known = readers(kind)
        if unknown := sorted(values.keys() - known):
            raise ConfigError(
                f"{where(unknown[0])}unknown setting {unknown[0]!r}; allowed: {', '.join(known)}"
            )
        fit: dict[str, Any] = {}
        for name, value in values.items():
            try:
                fit[name] = known[name].read(value, name)
            except (FieldError, ConfigError) as error:
                raise ConfigError(f"{where(name)}{error}") from None
        config = cls(**fit)
        try:
            check_address(config.listen, keyed=config.keys is not None)
        except ConfigError as error:
            raise ConfigError(f"{where('listen')}{error}") from None
        return config
