"""Makes commands that get a signal cancel what they asked for, and end as shells expect."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDS = (signal.SIGTERM, signal.SIGHUP)

AGAIN_S = 0.1


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise SystemExit in this context, so that what is open is closed.

    The status is 128 plus the signal's number. A signal that is ignored stays ignored (nohup). This is for
    the main thread; in others nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDS}
    taken = {number: was for number, was in before.items() if was is not signal.SIG_IGN}
    handled = threading.Event()

    def end(number: int, _frame: FrameType | None) -> None:
        if not handled.is_set():
            handled.set()
            raise SystemExit(128 + number)

    try:
        with _reminded(frozenset(taken), handled):
            for number in taken:
                signal.signal(number, end)
            yield
    finally:
        for number, was in taken.items():
            signal.signal(number, was)


@contextmanager
def _reminded(numbers: frozenset[int], handled: threading.Event) -> Iterator[None]:
    """Send these signals again until they are handled.

    Python's handlers run between two of its instructions; one for a signal that came just before a system
    call blocks would otherwise wait as long as that call.
    """
    come, write = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    reminder = threading.Thread(target=_remind, args=(come, numbers, handled), daemon=True)
    reminder.start()
    try:
        yield
    finally:
        handled.set()
        signal.set_wakeup_fd(before)
        os.close(write)
        reminder.join()
        os.close(come)


def _remind(come: int, numbers: frozenset[int], handled: threading.Event) -> None:
    main = threading.main_thread().ident
    assert main is not None
    while seen := os.read(come, 64):
        for number in numbers.intersection(seen):
            while not handled.wait(AGAIN_S):
                signal.pthread_kill(main, number)
