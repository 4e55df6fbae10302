"""CURVE step by step: whatever a client changes, it is not let in. (That libzmq's gets in: test_keys.py.)"""

from __future__ import annotations

import os
import random

import pytest
from zmq.utils import z85

from spilld.transport.curve import (
    SEALED_COMMAND,
    Box,
    Curve,
    key_pair,
)
from spilld.transport.zmtp import (
    COMMAND,
    MORE,
    Broken,
    command,
    metadata,
    parse_command,
)

SERVER, OTHER_SERVER = key_pair(), key_pair()
CLIENT = key_pair()
DEALER = metadata(Socket_Type=b"DEALER", Identity=b"")


class Client:
    """Says what a client has to say, with parts of it exchanged."""

    def __init__(self, *, admitted: bool = True, server: bytes = SERVER[0]) -> None:
        self.admits: list[str] = []
        self.curve = Curve(*SERVER, self._admit)
        self._admitted = admitted
        self._server = server
        self.public, self._secret = key_pair()
        self.count = 2

    def _admit(self, key: str) -> bool:
        self.admits.append(key)
        return self._admitted

    def hello(self) -> bytes:
        nonce = (1).to_bytes(8, "big")
        box = Box(self._secret, self._server).close(bytes(64), b"CurveZMQHELLO---" + nonce)
        return command(b"HELLO", b"\1\0" + bytes(72) + self.public + nonce + box)

    def welcomed(self, welcome: bytes) -> None:
        name, data = parse_command(welcome)
        assert (name, len(welcome)) == (b"WELCOME", 168)
        text = Box(self._secret, self._server).open(data[16:], b"WELCOME-" + data[:16])
        self._its, self.cookie = text[:32], text[32:]
        self._box = Box(self._secret, self._its)

    def initiate(
        self, lasting: tuple[bytes, bytes] = CLIENT, meant: bytes = SERVER[0], vouched: bytes = b""
    ) -> bytes:
        nonce, vouch_nonce = (2).to_bytes(8, "big"), os.urandom(16)
        vouch = Box(lasting[1], self._its).close((vouched or self.public) + meant, b"VOUCH---" + vouch_nonce)
        text = CLIENT[0] + vouch_nonce + vouch + DEALER
        return command(b"INITIATE", self.cookie + nonce + self._box.close(text, b"CurveZMQINITIATE" + nonce))

    def message(self, text: bytes, flags: int = 0) -> bytes:
        self.count += 1
        nonce = self.count.to_bytes(8, "big")
        return b"\7MESSAGE" + nonce + self._box.close(bytes([flags]) + text, b"CurveZMQMESSAGEC" + nonce)

    def come_in(self) -> None:
        self.welcomed(self.curve.handshake(self.hello()))
        assert parse_command(self.curve.handshake(self.initiate()))[0] == b"READY"

    def read(self, sealed: bytes) -> tuple[int, bytes]:
        """A short frame of the server's."""
        assert sealed[0] == 0
        assert sealed[2:10] == b"\7MESSAGE"
        text = self._box.open(sealed[18:], b"CurveZMQMESSAGES" + sealed[10:18])
        return text[0], text[1:]


def test_who_is_admitted_is_in() -> None:
    client = Client()
    client.come_in()
    assert client.curve.ready
    assert client.admits == [client.curve.key] == [z85.encode(CLIENT[0]).decode()]
    assert client.curve.open(0, client.message(b"ask", MORE)) == (MORE, b"ask")
    assert client.curve.open(0, client.message(b"", SEALED_COMMAND)) == (COMMAND, b"")
    assert client.read(client.curve.seal(MORE, b"told")) == (MORE, b"told")
    assert client.read(client.curve.seal(COMMAND, b"do")) == (SEALED_COMMAND, b"do")


def test_who_is_not_is_told() -> None:
    client = Client(admitted=False)
    client.welcomed(client.curve.handshake(client.hello()))
    assert client.curve.handshake(client.initiate()) == command(b"ERROR", b"\3" + b"400")
    assert (client.curve.ready, client.curve.refused, client.curve.key) == (False, True, "")


def flipped(text: bytes, draw: random.Random) -> bytes:
    changed = bytearray(text)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("seed", range(40))
def test_a_bit_that_is_flipped(seed: int) -> None:
    draw = random.Random(seed)
    client = Client()
    hello = flipped(whole := client.hello(), draw)
    if hello[8:80] == whole[8:80]:  # at padding nobody looks
        with pytest.raises(Broken):
            client.curve.handshake(hello)
    client = Client()
    client.welcomed(client.curve.handshake(client.hello()))
    with pytest.raises(Broken):
        client.curve.handshake(flipped(client.initiate(), draw))
    assert not client.admits
    client = Client()
    client.come_in()
    with pytest.raises(Broken):
        client.curve.open(0, flipped(client.message(b"x" * 20), draw))


def test_what_does_not_fit_together() -> None:
    with pytest.raises(Broken, match="another key"):
        Client(server=OTHER_SERVER[0]).curve.handshake(Client(server=OTHER_SERVER[0]).hello())
    stranger = key_pair()
    cases = [
        {"lasting": stranger},  # says that it is another whose secret it has not
        {"meant": OTHER_SERVER[0]},  # another server's client, passed on by that server
        {"vouched": key_pair()[0]},
    ]
    for case in cases:
        client = Client()
        client.welcomed(client.curve.handshake(client.hello()))
        with pytest.raises(Broken):
            client.curve.handshake(client.initiate(**case))  # type: ignore[arg-type]
        assert not client.admits


def test_what_comes_again_or_out_of_turn() -> None:
    client, other = Client(), Client()
    with pytest.raises(Broken, match="that is due"):
        client.curve.handshake(command(b"INITIATE", bytes(300)))
    client.welcomed(client.curve.handshake(client.hello()))
    with pytest.raises(Broken, match="that is due"):
        client.curve.handshake(client.hello())
    other.welcomed(other.curve.handshake(other.hello()))
    other.cookie = client.cookie
    with pytest.raises(Broken, match="not our cookie"):
        other.curve.handshake(other.initiate())
    client.curve.handshake(client.initiate())
    first, second = client.message(b"1"), client.message(b"2")
    assert client.curve.open(0, second) == (0, b"2")
    for again in (first, second):
        with pytest.raises(Broken, match="comes again"):
            client.curve.open(0, again)


@pytest.mark.parametrize("public", [bytes(32), b"\1" + bytes(31)])
def test_keys_that_would_make_no_secret(public: bytes) -> None:
    with pytest.raises(Broken, match="not a public key"):
        Box(SERVER[1], public)
    with pytest.raises(Broken):
        Curve(*SERVER, lambda _: True).handshake(command(b"HELLO", b"\1\0" + bytes(72) + public + bytes(88)))
