"""An answer as it comes: progress while its prompt is read, then its text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from spilld.client.client import Generation
from spilld.errors import SpilldError
from spilld.printable import printable
from spilld.protocol.messages import Done, Progress, Token

UNSAVED = (
    "spilld: the session could not be written to disk, as the daemon's log says: it goes on, is kept once "
    "there is room, but is lost if the daemon is killed before"
)


class Output:
    """Where an answer goes: byte for byte as it is, in UTF-8; or, on a terminal, printable."""

    def __init__(self, stream: TextIO) -> None:
        self.terminal = stream.isatty()
        self._stream = stream
        self._last = "\n"

    def write(self, text: str) -> None:
        """At once.

        Raises:
            BrokenPipeError: Where nobody reads any more.
            SpilldError: Where there is no room.
        """
        try:
            if self.terminal:
                self._stream.write(printable(text))
            else:
                self._stream.flush()
                self._stream.buffer.write(text.encode())
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise SpilldError(f"the answer cannot be written: {error.strerror}") from error
        self._last = text[-1:] or self._last

    def end_line(self) -> None:
        """Begin a new line, unless one has just begun."""
        if self._last != "\n":
            self.write("\n")


def show(generation: Generation, output: Output, console: Console) -> Done:
    """Write an answer to `output` as it comes; until then draw how far its prompt is read, if `console` is a
    terminal.
    """
    shown = 0
    with reading(console) as bar:
        for event in generation:
            if isinstance(event, Progress):
                bar.update(bar.task_ids[0], completed=event.done, total=event.total)
            elif isinstance(event, Token | Done):
                bar.stop()
                piece = event.text if isinstance(event, Token) else event.text[shown:]
                shown += len(piece)
                output.write(piece)
    if not generation.result.saved:
        print(UNSAVED, file=sys.stderr)
    return generation.result


@contextmanager
def reading(console: Console) -> Iterator[Bar]:
    """A bar of the tokens of a prompt; it leaves nothing behind."""
    columns = (
        TextColumn("reading"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
    )
    with Bar(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        bar.add_task("reading", total=None)
        yield bar
