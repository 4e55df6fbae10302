"""Every setting of Config, as an option of the command line and as a line of a file."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from spilld.fields import (
    FieldReader,
    Flag,
    Int,
    Maybe,
    Real,
)

from .config import Config, SettingHelp
from .config_readers import BINARY, Bytes, FolderPath
from .reload import SAFE

WIDTH = 118
"""Columns of the file."""

HEAD = (
    "/etc/spilld.toml, or any file given to `spilld serve --config FILE`; `spilld config` prints this one. "
    "Every line shows the default.",
    'Sizes are bytes, or strings such as "512MiB", "8G" or "1.5TB": K, M, G and T, and KiB to TiB, are '
    "powers of 1024, KB to TB powers of 1000.",
    "`systemctl reload spilld`, or SIGHUP, reads the file again. A running daemon takes {safe}; of the "
    "others that changed the log says that they take a restart.",
)


@dataclass(frozen=True)
class Setting:
    """One field of Config. default: None if it is unset, or depends on the daemon's user."""

    name: str
    reader: FieldReader
    about: SettingHelp
    default: object

    def parse(self, text: str) -> object:
        """Convert the text of an option to the type that TOML would have.

        A text that cannot be converted is returned as it is, for the reader to refuse.
        """
        kinds: dict[type[FieldReader], Callable[[str], object]] = {Flag: json.loads, Int: int, Real: float}
        try:
            return kinds.get(type(self._inner), str)(text)
        except ValueError:
            return text

    def toml(self, value: object) -> str:
        """Write a value as it is in a file."""
        if isinstance(self._inner, Bytes) and type(value) is int:
            return size_text(value)
        return json.dumps(value)

    @property
    def metavar(self) -> str:
        """What --help shows for the value."""
        kinds: dict[type[FieldReader], str] = {
            Bytes: "SIZE",
            Flag: "true|false",
            Int: "N",
            Real: "N",
            FolderPath: "FOLDER",
        }
        return kinds.get(type(self._inner), "VALUE")

    @property
    def help(self) -> str:
        """The first sentence, and the default."""
        if self.default is not None:
            return f"{self.about.sentence} (default: {self.toml(self.default).strip(chr(34))})"
        _, found, unset = self.about.text.partition("Unset: ")
        return f"{self.about.sentence} (default: {unset.removesuffix('.')})" if found else self.about.sentence

    @property
    def lines(self) -> Iterator[str]:
        """The lines in the file: its help, then the default, or an example that is commented out."""
        yield from _comment(self.about.text)
        if self.default is not None:
            yield f"{self.name} = {self.toml(self.default)}"
        else:
            yield f"# {self.name} = {self.toml(self.about.example)}"

    @property
    def _inner(self) -> FieldReader:
        return self.reader.reader if isinstance(self.reader, Maybe) else self.reader


def settings() -> list[Setting]:
    """Return all settings, in the order of Config."""
    hints = get_type_hints(Config, include_extras=True)
    found = []
    for each in fields(Config):
        reader, about = hints[each.name].__metadata__
        found.append(Setting(each.name, reader, about, None if each.default is MISSING else each.default))
    return found


def file_text() -> str:
    """Write a file that shows every setting with its default, such as systemd/spilld.toml."""
    safe = f"{', '.join(SAFE[:-1])} and {SAFE[-1]}"
    head = [line for part in HEAD for line in _comment(part.format(safe=safe))]
    parts = [head, *(list(setting.lines) for setting in settings())]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def size_text(nbytes: int) -> str:
    """Write a number of bytes for TOML: in the largest binary unit of which it is a multiple."""
    for unit, size in reversed(BINARY.items()):
        if nbytes and nbytes % size == 0:
            return f'"{nbytes // size}{unit}iB"'
    return str(nbytes)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def given(options: Any) -> dict[str, object]:
    """Return the settings that are among parsed options, as overrides for Config.load."""
    texts = {setting: getattr(options, setting.name) for setting in settings()}
    return {each.name: None if text is None else each.parse(text) for each, text in texts.items()}
