"""A TOML file that people edit; errors name the line."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError
from .fields import FieldError, read, readers

T = TypeVar("T")


class TomlFile:
    """A parsed TOML file; `values` is what tomllib reads in it."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ConfigError: It cannot be read or is not TOML.
        """
        self.path = path
        try:
            self._text = path.read_text("utf-8")
            self.values: dict[str, object] = tomllib.loads(self._text)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise ConfigError(f"{path} is not TOML: line {line} is not UTF-8") from error
        except (ValueError, RecursionError) as error:
            end = f"at line {len(self._text.splitlines())}, the end"
            raise ConfigError(f"{path} is not TOML: {error}".replace("at end of document", end)) from error

    def where(self, *keys: str) -> str:
        """Return the file and the line of a key, or else of the table that should have it."""
        for count in range(len(keys), 0, -1):
            if (line := line_of(self._text, keys[:count])) is not None:
                return f"{self.path}, line {line}"
        return str(self.path)

    def read(self, cls: type[T], *table: str) -> T:
        """Read the file, or a table of it, as a dataclass.

        Args:
            cls: The dataclass.
            table: Keys of the table; none for the whole file.

        Raises:
            ConfigError: A key is unknown, wrong or missing.
        """
        values: Any = self.values
        for key in table:
            values = values[key]
        kind: type = cls
        known = readers(kind)
        try:
            if not isinstance(values, dict):
                raise FieldError(table[-1], values, f"a table of {', '.join(known)}")
            for key in sorted(values.keys() - known.keys()):  # its value may be a secret, misspelt
                raise ConfigError(f"{self.where(*table, key)}: unknown {key!r}; allowed: {', '.join(known)}")
            return read(cls, values)
        except FieldError as error:
            raise ConfigError(f"{self.where(*table, error.name)}: {error}") from None


def line_of(text: str, keys: Sequence[str]) -> int | None:
    """Return the line, from 1, where a TOML text begins to define keys[0].keys[1]. ...; None if it does not.

    tomllib reports no lines. But lines parse, as a text of their own, only where a statement ends: so
    statements are separated by trial, even where strings and arrays span several lines.
    """
    lines = text.split("\n")
    wanted, table, begun = tuple(keys), tuple[str, ...](), 0
    for end in range(1, len(lines) + 1):
        try:
            values = tomllib.loads("\n".join(lines[begun:end]) + "\n")
        except tomllib.TOMLDecodeError:
            continue
        if lines[begun].lstrip().startswith("["):
            table = _path(values)
            found = table[: len(wanted)] == wanted
        else:
            found = wanted[: len(table)] == table and _has(values, wanted[len(table) :])
        if found:
            return begun + 1
        begun = end
    return None


def _path(header: object) -> tuple[str, ...]:
    """The keys of a table's header, parsed alone."""
    if not isinstance(header, dict) or not header:
        return ()
    ((key, rest),) = header.items()
    return key, *_path(rest)


def _has(values: object, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(values, Mapping) or key not in values:
            return False
        values = values[key]
    return True
