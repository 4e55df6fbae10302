"""Shows an answer as it arrives: progress while its prompt is read, then its text."""

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
    """Where an answer is written: byte for byte in UTF-8; on a terminal without control characters."""

    def __init__(self, stream: TextIO) -> None:
        self.terminal = stream.isatty()
        self._stream = stream
        self._last = "\n"

    def write(self, text: str) -> None:
        """Write a text at once.

        Raises:
            BrokenPipeError: The reader is gone.
            SpilldError: It cannot be written, as on a full disk.
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
    """Write an answer to `output` as it arrives.

    Until then a bar shows how much of its prompt is read, if `console` is a terminal.

    Returns:
        The last event.

    Raises:
        SpilldError: What ended the generation instead, or the answer cannot be written.
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
    """Draw a bar of the tokens of a prompt; it is removed when the context ends."""
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
