"""Signals that a server handles while it runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def handled_signals(handlers: Mapping[signal.Signals, Callable[[], None]], wake_fd: int) -> Iterator[None]:
    """Handle signals in the main thread; in another nothing is changed.

    Args:
        handlers: What each signal calls. It is unblocked.
        wake_fd: Written to when a signal comes, so that a poll on the other end wakes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda _number, _frame, handler=handler: handler())  # type: ignore[misc]
        for number, handler in handlers.items()
    }
    wakes = signal.set_wakeup_fd(wake_fd, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakes)
        for number, handler in before.items():
            signal.signal(number, handler)
