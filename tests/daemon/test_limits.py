"""What one client may ask for, at a real socket."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spilld import Client, Done
from spilld.auth.keyring import CLIENTS, make_client, make_server
from spilld.errors import Overloaded
from spilld.protocol.messages import (
    Accepted,
    Cancel,
    ChangeSession,
    Failed,
    Generate,
    Hello,
    ListSessions,
    OpenTransfer,
    Resume,
    Sessions,
    Welcome,
)

from .peer import Peer, until

if TYPE_CHECKING:
    from tests.daemon.conftest import Start


class Dealer(Peer):
    def refusal(self) -> Failed:
        """The next that is no event of a running answer."""
        while not isinstance(reply := self.reply(), Failed):
            pass
        return reply


def long(name: str) -> Generate:
    return Generate(request_id=name, prompt="a", max_tokens=10**6)


def test_open_requests(start: Start) -> None:
    running = start(max_open=3)
    running.echo.pace_s = 0.05
    with Dealer(running.address) as one, Dealer(running.address) as two:
        one.say(*[long(f"r{number}") for number in range(4)])
        failed = one.refusal()
        assert (failed.request_id, failed.code, failed.retryable) == ("r3", "overloaded", True)
        assert "3 requests of this client are open" in failed.message
        for request in (
            ListSessions(request_id="s"),
            ChangeSession(request_id="s", session="n", action="pin"),
            OpenTransfer(request_id="s", nbytes=1),
        ):
            one.say(request)
            failed = one.refusal()
            assert (failed.request_id, failed.code) == ("s", "overloaded")
        assert running.echo.managed == []
        assert running.echo.transferred == []
        two.say(long("another"))
        assert isinstance(two.reply(), Accepted), "another client has its own"
        one.say(Cancel(request_id="r0"))
        assert one.refusal().code == "cancelled"
        one.say(ListSessions(request_id="s"))
        while not isinstance(reply := one.reply(), Sessions):
            assert not isinstance(reply, Failed)
        assert len(running.echo.submitted) == 4


def test_what_is_resumed_is_not_new(start: Start) -> None:
    """A client that comes back has all that it had, however much that is."""
    running = start(max_open=2)
    running.echo.pace_s = 0.01
    with Dealer(running.address) as one:
        one.say(long("a"), long("b"))
        until(lambda: len(running.echo.submitted) == 2)
    with Dealer(running.address) as two:
        two.say(long("c"), Resume(request_id="a"), Resume(request_id="b"))
        seen = {two.reply().request_id for _ in range(200)}
        assert seen == {"a", "b", "c"}
        two.say(long("d"))
        failed = two.refusal()
        assert (failed.request_id, failed.code) == ("d", "overloaded")


def test_messages_in_a_second(start: Start) -> None:
    running = start(max_rate=50)
    with Dealer(running.address) as one, Dealer(running.address) as two:
        one.say(*[Hello(request_id=str(number)) for number in range(200)])
        replies = [one.reply() for _ in range(200)]
        assert [reply.request_id for reply in replies] == [str(number) for number in range(200)]
        refused = [reply for reply in replies if isinstance(reply, Failed)]
        assert 0 < len(refused) <= 150, "a second's worth, and what came in meanwhile"
        assert {(failed.code, failed.retryable) for failed in refused} == {("overloaded", True)}
        assert all(isinstance(reply, Welcome) for reply in replies[:50])
        two.say(Hello(request_id="h"))
        assert isinstance(two.reply(), Welcome), "another client has its own"
        time.sleep(0.1)
        one.say(Hello(request_id="again"))
        assert isinstance(one.reply(), Welcome)


def test_every_message_counts_and_its_refusal_is_heard(start: Start) -> None:
    running = start(max_rate=0.01)
    with Dealer(running.address) as dealer:
        dealer.say(
            Hello(request_id="h"), Resume(request_id="x", next_seq=7), Cancel(request_id="y"), long("z")
        )
        replies = [dealer.reply() for _ in range(4)]
        assert [(reply.request_id, reply.seq) for reply in replies] == [
            ("h", 0),
            ("x", 7),
            ("y", 0),
            ("z", 0),
        ]
        assert [type(reply) for reply in replies] == [Welcome, Failed, Failed, Failed]
        echo = running.echo
        assert (echo.resumed, echo.cancelled, echo.submitted) == ([], [], [])


def test_the_client_library_says_so(start: Start) -> None:
    running = start(max_open=1, max_rate=1000)
    running.echo.pace_s = 0.01
    with Client(running.address) as client:
        first = client.generate("a", max_tokens=20)
        with pytest.raises(Overloaded, match="1 requests of this client are open") as caught:
            client.generate("b").text()
        assert caught.value.retryable
        first.text()
        assert isinstance(first.result, Done)
        assert client.generate("b c", max_tokens=2).text() == "b c "


def test_a_key_has_limits_of_its_own_over_all_its_connections(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    make_server(folder)
    alice, bob = make_client(folder, "alice"), make_client(folder, "bob")
    text = (folder / CLIENTS).read_text()
    (folder / CLIENTS).write_text(text.replace("[alice]", "[alice]\nmax_open = 2\nmax_rate = 20"))
    running = start("tcp://127.0.0.1:*", keys=folder, max_open=4)
    running.echo.pace_s = 0.02
    with (
        Client(running.address, keys=alice) as laptop,
        Client(running.address, keys=alice) as desk,
        Client(running.address, keys=bob) as other,
    ):
        held = [laptop.generate("a", max_tokens=10**6), desk.generate("b", max_tokens=10**6)]
        for generation in held:
            next(generation)
        with pytest.raises(Overloaded, match="2 requests of this client"):
            desk.generate("c").text()
        for generation in [other.generate("d", max_tokens=10**6) for _ in range(4)]:
            next(generation)
            held.append(generation)
        with pytest.raises(Overloaded, match="4 requests of this client"):
            other.generate("e").text()
        assert 0 < hellos(laptop) < 60
        assert hellos(desk) < 10, "both are alice"
        assert hellos(other) == 60
        (folder / CLIENTS).write_text(text)
        until(lambda: hellos(desk) == 60)  # changes of the file are seen at once


def hellos(client: Client) -> int:
    """How many pass before one is refused, at most 60."""
    for count in range(60):
        try:
            client.hello()
        except Overloaded as error:
            assert "messages a second" in error.message  # noqa: PT017 (none is as good)
            return count
    return 60
