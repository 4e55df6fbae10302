"""Errors that repeat are counted, not written."""

from __future__ import annotations

import logging

import pytest

from spilld.monitoring.repeats import (
    BURST,
    KINDS,
    SPAN_S,
    RepeatFilter,
)


class Log:
    """A logger that writes into a list, and a clock that is set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.written: list[str] = []
        self.logger = logging.Logger("spilld.test")
        handler = logging.Handler()
        handler.emit = lambda record: self.written.append(record.getMessage())  # type: ignore[method-assign]
        handler.addFilter(RepeatFilter(lambda: self.now))
        self.logger.addHandler(handler)


@pytest.fixture
def log() -> Log:
    return Log()


def test_a_loop_that_fails_fills_no_disk(log: Log) -> None:
    for attempt in range(100_000):
        try:
            raise RuntimeError("cannot schedule new futures after shutdown")
        except RuntimeError:
            log.logger.exception("request %d failed", attempt)
    assert log.written == [f"request {attempt} failed" for attempt in range(BURST)]


def test_how_many_were_left_out(log: Log) -> None:
    for attempt in range(BURST + 7):
        log.logger.error("no %d%%", attempt)
    log.now = SPAN_S
    for attempt in range(2):
        log.logger.error("no %d%%", attempt)
    assert log.written[BURST:] == ["no 0% (7 more like this were not written)", "no 1%"]


def test_one_kind_hides_no_other(log: Log) -> None:
    for _ in range(2 * BURST):
        log.logger.error("this")
    log.logger.error("that")
    log.logger.warning("this")
    try:
        raise ValueError
    except ValueError:
        log.logger.exception("this")
    assert log.written[BURST:] == ["that", "this", "this"]


def test_what_is_told_on_the_way_is_not_counted(log: Log) -> None:
    for _ in range(2 * BURST):
        log.logger.info("a request makes way")
    assert len(log.written) == 2 * BURST


def test_it_takes_no_more_memory_for_more_kinds(log: Log) -> None:
    (handler,) = log.logger.handlers
    (repeats,) = handler.filters
    assert isinstance(repeats, RepeatFilter)
    for number in range(3 * KINDS):
        log.logger.error(f"kind {number}")
        assert len(repeats._seen) <= KINDS
