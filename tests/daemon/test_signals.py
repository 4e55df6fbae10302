"""Signals that end a command."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from spilld.cli.signals import ENDS, ended_by_signals


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_that_interrupts_no_system_call(number: signal.Signals) -> None:
    """It comes to another thread here, as it may come just before the main thread begins to wait."""
    before, done = signal.getsignal(number), threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    assert other.ident is not None
    timer, began = threading.Timer(0.3, signal.pthread_kill, (other.ident, number)), time.monotonic()
    timer.start()
    try:
        with pytest.raises(SystemExit) as ended, ended_by_signals():
            time.sleep(30)
    finally:
        done.set()
        other.join()
    assert ended.value.code == 128 + number
    assert time.monotonic() - began < 20
    assert signal.getsignal(number) == before
