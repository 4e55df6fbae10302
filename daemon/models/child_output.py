"""What a child process writes, line by line, while it runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def lines_to(report: Callable[[str], None]) -> Iterator[int]:
    """Make a descriptor for a child's stdout or stderr, whose lines are passed on until the context ends.

    `report` is called with each line as it comes, in a thread of its own; with the last before the context
    has ended.
    """
    source, sink = os.pipe()

    def follow() -> None:
        with open(source, encoding="utf-8", errors="replace") as lines:  # noqa: PTH123 (a descriptor)
            for line in lines:
                report(line.rstrip("\n"))

    thread = threading.Thread(target=follow, name="spilld-child")
    thread.start()
    try:
        yield sink
    finally:
        os.close(sink)
        thread.join()
