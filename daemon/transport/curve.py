"""CURVE (ZeroMQ RFC 26), the server's side: holders of authorised keys may connect.

The cryptography is libsodium's, the one that libzmq has loaded. All keys are 32 bytes.
"""

from __future__ import annotations

import ctypes
import hmac
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from zmq.utils import z85

from spilld.errors import ConfigError

from .zmtp import (
    COMMAND,
    MORE,
    ROUTER,
    Broken,
    check_sender,
    command,
    head,
    parse_command,
)

MAC_BYTES = 16
COOKIE_BYTES = 96

SEALED_COMMAND = 2
"""In a box the flag of a command is this, not that of a frame (ZMTP's LONG, which a box does not need)."""

DENIED = b"400"
"""Status of a refusal (ZeroMQ RFC 27): the client does not come again."""


@cache
def _sodium(maps: Path = Path("/proc/self/maps")) -> ctypes.CDLL:
    """Find libsodium.

    Raises:
        ConfigError: There is none.
    """
    loaded = [line.split()[-1] for line in maps.read_text().splitlines() if "/libsodium" in line]
    for name in (*loaded[:1], "libsodium.so.26", "libsodium.so.23"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if library.sodium_init() >= 0:
            return library
    raise ConfigError("keys need libsodium; install it, or pyzmq as a wheel, which has it")


class Box:
    """crypto_box (Curve25519, XSalsa20, Poly1305) between a secret key and a public one."""

    def __init__(self, secret: bytes, public: bytes) -> None:
        """Compute the shared key.

        Raises:
            Broken: The public key is not valid.
        """
        self._sodium = _sodium()
        self._shared = ctypes.create_string_buffer(32)
        if self._sodium.crypto_box_beforenm(self._shared, public, secret):
            raise Broken("not a public key")

    def close(self, text: bytes, nonce: bytes) -> bytes:
        """Encrypt and authenticate a text (a box, in NaCl's words)."""
        sealed = ctypes.create_string_buffer(len(text) + MAC_BYTES)
        length = ctypes.c_ulonglong(len(text))
        self._sodium.crypto_box_easy_afternm(sealed, text, length, nonce, self._shared)
        return sealed.raw

    def open(self, sealed: bytes, nonce: bytes) -> bytes:
        """Decrypt a box.

        Raises:
            Broken: It is cut short, or was not made with these keys and this nonce.
        """
        if len(sealed) < MAC_BYTES:
            raise Broken("a box cut short")
        text = ctypes.create_string_buffer(max(1, len(sealed) - MAC_BYTES))
        length = ctypes.c_ulonglong(len(sealed))
        if self._sodium.crypto_box_open_easy_afternm(text, sealed, length, nonce, self._shared):
            raise Broken("a box that another key has closed")
        return text.raw[: len(sealed) - MAC_BYTES]


def key_pair() -> tuple[bytes, bytes]:
    """Make a key pair: public key and secret key."""
    public, secret = ctypes.create_string_buffer(32), ctypes.create_string_buffer(32)
    _sodium().crypto_box_keypair(public, secret)
    return public.raw, secret.raw


class Curve:
    """The CURVE mechanism of one connection."""

    name = b"CURVE"

    def __init__(self, public: bytes, secret: bytes, admits: Callable[[str], bool]) -> None:
        """Prepare a handshake.

        Args:
            public: The daemon's public key.
            secret: The daemon's secret key.
            admits: Whether a client with this public key, in Z85, may connect.

        Raises:
            ConfigError: There is no libsodium.
        """
        self.key = ""
        self.ready = self.refused = False
        self._long_term_public, self._long_term_secret = public, secret
        self._admits = admits
        self._public, self._secret = key_pair()
        self._cookie = os.urandom(COOKIE_BYTES)
        self._client = b""  # its short-term key, once it has sent HELLO
        self._sent, self._had = 1, 0  # counters of the nonces

    def handshake(self, body: bytes) -> bytes:
        """See Mechanism.handshake."""
        name, data = parse_command(body)
        if name == b"HELLO" and not self._client:
            return self._welcome(data)
        if name == b"INITIATE" and self._client:
            return self._initiate(data)
        raise Broken("not the command that is due")

    def _welcome(self, hello: bytes) -> bytes:
        """Answer a HELLO.

        It is version (2 bytes), padding (72), client's short-term key (32), nonce (8), box of 64 zeros.
        """
        if len(hello) != 194 or hello[:2] != b"\1\0":
            raise Broken("not a HELLO")
        client = hello[74:106]
        box = Box(self._long_term_secret, client)
        if box.open(hello[114:], b"CurveZMQHELLO---" + hello[106:114]) != bytes(64):
            raise Broken("not a HELLO")
        self._client = client
        nonce = os.urandom(16)
        sealed = box.close(self._public + self._cookie, b"WELCOME-" + nonce)
        return command(b"WELCOME", nonce + sealed)

    def _initiate(self, initiate: bytes) -> bytes:
        """Answer an INITIATE: READY, or ERROR where the client is not authorised.

        It is cookie (96 bytes), nonce (8), box of: the client's long-term key (32), the nonce (16) and the
        box (80) of its vouch, its metadata.
        """
        if not hmac.compare_digest(initiate[:COOKIE_BYTES], self._cookie):
            raise Broken("not our cookie")
        self._had = int.from_bytes(initiate[96:104], "big")
        self._box = Box(self._secret, self._client)
        text = self._box.open(initiate[104:], b"CurveZMQINITIATE" + initiate[96:104])
        if len(text) < 128:
            raise Broken("not an INITIATE")
        self._check_vouch(text[:32], text[32:48], text[48:128])
        check_sender(text[128:])
        key = z85.encode(text[:32]).decode()
        if not self._admits(key):
            self.refused = True
            return command(b"ERROR", bytes((len(DENIED),)) + DENIED)
        self.key, self.ready = key, True
        nonce = self._next_nonce()
        return command(b"READY", nonce + self._box.close(ROUTER, b"CurveZMQREADY---" + nonce))

    def _check_vouch(self, long_term: bytes, nonce: bytes, vouch: bytes) -> None:
        """Check the vouch: the holder of the long-term key uses this short-term key, with this daemon."""
        text = Box(self._secret, long_term).open(vouch, b"VOUCH---" + nonce)
        if not hmac.compare_digest(text, self._client + self._long_term_public):
            raise Broken("another's vouch")

    def _next_nonce(self) -> bytes:
        nonce = self._sent.to_bytes(8, "big")
        self._sent += 1
        return nonce

    def seal(self, flags: int, body: bytes) -> bytes:
        """See Mechanism.seal."""
        nonce = self._next_nonce()
        inner_flags = flags & MORE | (SEALED_COMMAND if flags & COMMAND else 0)
        sealed = self._box.close(bytes((inner_flags,)) + body, b"CurveZMQMESSAGES" + nonce)
        return head(0, len(sealed) + 16) + b"\7MESSAGE" + nonce + sealed

    def open(self, flags: int, body: bytes) -> tuple[int, bytes]:
        """See Mechanism.open."""
        if body[:8] != b"\7MESSAGE" or len(body) < 16 + MAC_BYTES + 1:
            raise Broken("not a MESSAGE")
        nonce = int.from_bytes(body[8:16], "big")
        if nonce <= self._had:
            raise Broken("a MESSAGE that comes again")
        self._had = nonce
        text = self._box.open(body[16:], b"CurveZMQMESSAGEC" + body[8:16])
        return text[0] & MORE | (COMMAND if text[0] & SEALED_COMMAND else 0), text[1:]
