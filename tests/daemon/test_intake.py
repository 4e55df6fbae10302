"""What comes before the engine: in order for each client, and nobody waits for another's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from spilld.errors import InvalidRequest
from spilld.protocol.messages import Generate, Message, Prompt
from spilld.tokenizer.intake import LONG, Intake, kind_of

A, B = b"a", b"b"
LONG_TEXT = "x" * LONG


class Book:
    """An intake, and what it has delivered, in order."""

    def __init__(self) -> None:
        self.delivered: list[str] = []
        self.ran: list[str] = []
        self._change = threading.Condition()
        self.intake = Intake(self._deliver)

    def _deliver(self, act: Callable[[], None]) -> None:
        with self._change:
            act()
            self._change.notify_all()

    def note(self, what: str) -> Callable[[], None]:
        return partial(self.delivered.append, what)

    def prepare(
        self, client: bytes, name: str, prompt: Prompt = "x", until: threading.Event | None = None
    ) -> None:
        def run() -> Callable[[], None]:
            self.ran.append(name)
            assert until is None or until.wait(20)
            return self.note(name)

        request = Generate(request_id=name, prompt=prompt)
        self.intake.prepare(client, request, run, self.note(f"{name} cancelled"))

    def wait(self, count: int) -> list[str]:
        with self._change:
            assert self._change.wait_for(lambda: len(self.delivered) >= count, 20)
            return list(self.delivered)


@pytest.fixture
def book() -> Iterator[Book]:
    book = Book()
    yield book
    book.intake.stop()


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """Whatever waits for it goes on at the end."""
    event = threading.Event()
    yield event
    event.set()


def test_in_order_for_one_client(book: Book, held: threading.Event) -> None:
    book.prepare(A, "long", LONG_TEXT, held)
    book.prepare(A, "short")
    book.intake.in_turn(A, book.note("changed"))
    book.prepare(A, "last")
    book.prepare(B, "other")
    assert book.wait(1) == ["other"]
    held.set()
    assert book.wait(5) == ["other", "long", "short", "changed", "last"]


def test_short_texts_wait_for_no_long_one_and_no_chat(book: Book, held: threading.Event) -> None:
    chat = (Message(role="user", content="x"),)
    for number in range(8):
        book.prepare(b"long %d" % number, f"long {number}", LONG_TEXT, held)
        book.prepare(b"chat %d" % number, f"chat {number}", chat, held)
    book.prepare(A, "short")
    book.prepare(B, "tokens", (1, 2, 3))
    assert sorted(book.wait(2)) == ["short", "tokens"]


def test_a_cancel_does_not_wait(book: Book, held: threading.Event) -> None:
    book.prepare(A, "runs", LONG_TEXT, held)
    book.prepare(A, "waits")
    book.prepare(A, "stays")
    for name in ("runs", "waits"):
        assert book.intake.cancel(name), "it is told when its turn comes"
    assert not book.intake.cancel("elsewhere"), "whose turn has come is the engine's to end"
    held.set()
    assert book.wait(3) == ["runs cancelled", "waits cancelled", "stays"]
    assert book.ran == ["runs", "stays"], "what was cancelled before its turn is not prepared"
    assert not book.intake.cancel("runs")


def test_a_cancel_is_not_lost_on_anothers_request(book: Book, held: threading.Event) -> None:
    """Two tenants may have used one id: the cancel goes on to the engine, which may have the right one."""
    book.prepare(A, "r", LONG_TEXT, held)
    assert not book.intake.cancel("r", "tenant")
    held.set()
    assert book.wait(1) == ["r"]


def test_what_is_about_a_request_does_not_overtake_it(book: Book, held: threading.Event) -> None:
    """A client whose connection was lost resumes over another one."""
    book.prepare(A, "r", LONG_TEXT, held)
    book.intake.in_turn(B, book.note("resumed"), "r")
    book.intake.in_turn(B, book.note("another"), "unknown")
    assert book.wait(1) == ["another"]
    held.set()
    assert book.wait(3) == ["another", "r", "resumed"]


def test_an_id_is_of_one_request(book: Book, held: threading.Event) -> None:
    """Its client may have gone, so that the server knows nothing of it any more."""
    book.prepare(A, "r", LONG_TEXT, held)
    with pytest.raises(InvalidRequest, match="in flight"):
        book.prepare(B, "r")
    assert book.intake.cancel("r")
    held.set()
    assert book.wait(1) == ["r cancelled"]
    book.prepare(B, "r")
    assert book.wait(2) == ["r cancelled", "r"]


def test_what_refuses_delivers_nothing(book: Book) -> None:
    book.intake.prepare(A, Generate(request_id="r", prompt="x"), lambda: None, book.note("cancelled"))
    book.prepare(A, "next")
    assert book.wait(1) == ["next"]


def test_nothing_comes_after_the_end(book: Book, held: threading.Event) -> None:
    book.prepare(A, "runs", LONG_TEXT, held)
    book.prepare(A, "waits")
    threading.Timer(0.05, held.set).start()
    book.intake.stop()
    for _ in range(3):
        book.prepare(A, "late")
        book.intake.in_turn(B, book.note("late"))
    assert book.delivered == ["runs"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", "short"),
        ("x" * LONG, "long"),
        ((), "short"),
        ((1,) * LONG, "long"),
        ((Message(role="user", content=LONG_TEXT),), "chat"),
    ],
)
def test_lanes(prompt: Prompt, expected: str) -> None:
    assert kind_of(Generate(request_id="r", prompt=prompt, session="s")) == expected
