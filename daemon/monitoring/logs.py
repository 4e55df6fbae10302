"""The daemon's log: lines for people and for the journal, or JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from spilld.printable import printable

from .repeats import RepeatFilter

PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""Priorities of sd-daemon(3), by level."""


def set_up(form: str, level: str) -> None:
    """Write the log, with Python's warnings, to stderr; `form` and `level` as Config has them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(form, sys.stderr))
    handler.addFilter(_of_use)
    handler.addFilter(RepeatFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


def for_machines() -> bool:
    """Return whether the log is JSON, or goes to the journal."""
    handlers = logging.getLogger().handlers
    return any(isinstance(handler.formatter, JsonLines | JournalLines) for handler in handlers)


def _of_use(record: logging.LogRecord) -> bool:
    """Return whether a record is of use: of libraries only warnings are.

    What torch logs of its caches when a process ends, say, is for its developers.
    """
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] in ("spilld", "root")


def _formatter(form: str, stream: TextIO) -> logging.Formatter:
    if form == "json":
        return JsonLines()
    if in_journal(stream):
        return JournalLines()
    if stream.isatty():
        return Lines()
    return OneLine("%(levelname)s %(name)s: %(message)s")


class OneLine(logging.Formatter):
    """Formats a message as one line, even if it quotes a client's newlines; an exception follows in more."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """Return the message as one line."""
        return printable(super().formatMessage(record)).replace("\n", "\\n")


class Lines(OneLine):
    """Formats records for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as it is written."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"spilld: {level}{super().format(record)}"


class JournalLines(OneLine):
    """Formats records for the journal: each line begins with its priority, as in sd-daemon(3)."""

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as it is written."""
        prefix = f"<{PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).split("\n"))


class JsonLines(logging.Formatter):
    """Formats records as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as it is written."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        said = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said)


def in_journal(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether systemd sends a stream to the journal: $JOURNAL_STREAM names its file."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # not a file
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
