"""Clients that send as fast as they can and leave, some killed: the server serves whoever comes next."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spilld.protocol.messages import (
    Cancel,
    Failed,
    Hello,
    Stats,
    Welcome,
)
from spilld.transport.connection import LONGEST, READ_BYTES
from spilld.transport.router import IN_BYTES

from .peer import Peer
from .raw import PING, frame, greeting, message, ready, received, said, zmtp

if TYPE_CHECKING:
    from tests.daemon.conftest import Start

HEADER = b"spilld\x00\x01"

CANCELS = (said(Cancel(request_id="x")) * 20 + PING) * 100
STATS = said(Stats(request_id="s")) * 2000
INVALID = message([HEADER, b"\x81\xa4type\xa5there"]) * 2000
ENDLESS = frame(b"", more=True) * 20_000
FLOODS = {
    "cancels": CANCELS,
    "stats": STATS,
    "invalid": INVALID,
    "endless": ENDLESS,
    "garbage": b"\xff" * 100_000,
}


@contextmanager
def server(tmp_path: Path, kind: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A process of its own: what aborts is not the test."""
    address = f"ipc://{tmp_path}/f"
    if kind == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, str(Path(__file__).with_name("conftest.py")), address, "1", "0"]
    with subprocess.Popen(command) as process:
        try:
            served(address, 20_000)
            yield address, process
        finally:
            process.kill()


def served(address: str, patience_ms: int = 5000) -> None:
    with Peer(address) as peer:
        peer.say(Hello(request_id="h"))
        assert isinstance(peer.reply(patience_ms), Welcome)


def flood(address: str, what: bytes, times: int) -> None:
    """Send, never read, leave."""
    with zmtp(address, minor=1) as peer:
        peer.settimeout(0.05)
        with suppress(OSError):
            for _ in range(times):
                peer.sendall(what)


FLOODER = """
import socket, sys, time
address, what, hands = sys.argv[1], open(sys.argv[2], "rb").read(), bytes.fromhex(sys.argv[3])
kind, _, place = address.partition("://")
host, _, port = place.rpartition(":")
while True:
    with socket.socket(socket.AF_UNIX if kind == "ipc" else socket.AF_INET) as peer:
        peer.connect(place if kind == "ipc" else (host, int(port)))
        peer.settimeout(0.2)
        try:
            peer.sendall(hands)
            time.sleep(0.01)
            while True:
                peer.sendall(what)
        except OSError:
            pass
"""
"""Shakes hands without a look at the answer, and sends."""


@contextmanager
def flooding(address: str, tmp_path: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    file = tmp_path / name
    file.write_bytes(FLOODS[name])
    hands = (greeting(minor=1) + ready()).hex()
    command = [sys.executable, "-I", "-S", "-c", FLOODER, address, str(file), hands]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_who_floods_and_leaves(tmp_path: Path, kind: str, rounds: int) -> None:
    """Or is killed; meanwhile others are served, too."""
    with server(tmp_path, kind) as (address, process):
        for _ in range(rounds):
            with ExitStack() as stack:
                for name in FLOODS:
                    stack.enter_context(flooding(address, tmp_path, name))
                for what in FLOODS.values():
                    flood(address, what, 5)
                served(address)
            served(address)
            assert process.poll() is None


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_who_never_reads_fills_no_memory(tmp_path: Path) -> None:
    """Eight of each kind: refusals do not pile up, since who does not read is not read from."""
    with server(tmp_path, "ipc") as (address, process):
        before = resident_bytes(process.pid)
        for what in FLOODS.values():
            with ExitStack() as stack:
                peers = [stack.enter_context(zmtp(address)) for _ in range(8)]
                end = time.monotonic() + 0.5
                while time.monotonic() < end:
                    for peer in peers:
                        peer.settimeout(0.01)
                        with suppress(OSError):
                            peer.sendall(what)
                assert resident_bytes(process.pid) - before < 64 << 20
                served(address)


def test_frames_without_an_end_and_unfinished_ones_are_bounded(start: Start) -> None:
    """A message of too many frames, or of too many bytes in all, ends its connection; nobody else's."""
    address = start().address
    for what in (frame(b"", more=True) * 65, frame(bytes(16 << 20), more=True) * 3):
        with zmtp(address) as peer:
            with suppress(OSError):
                peer.sendall(what)
            with suppress(ConnectionResetError):
                assert peer.recv(1) == b""
    with zmtp(address) as peer:  # as many as are still answered
        peer.sendall(message([b""] * 64))
        assert b"protocol_error" in received(peer, 100)
    served(address)


def test_who_claims_long_messages_and_does_not_send_them_makes_way(start: Start) -> None:
    """They claim all the room that there is for messages that are under way. One that comes ends nobody's."""
    address = start().address
    claimed = frame(bytes(LONGEST))[:100]
    with ExitStack() as stack:
        for _ in range(IN_BYTES // LONGEST):
            stack.enter_context(zmtp(address)).sendall(claimed)
        with Peer(address) as peer:
            peer.send(HEADER, bytes(4 * READ_BYTES))
            assert isinstance(peer.reply(20_000), Failed)
        served(address)
