"""Clients that send as fast as they can and leave, some killed: the server serves whoever comes next."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spilld.daemon.protocol import Cancel, Hello, Stats, Welcome

from .peer import Peer
from .raw import PING, frame, message, received, said, zmtp

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


def flood_and_die(address: str, what: bytes) -> None:
    if (child := os.fork()) == 0:
        try:
            flood(address, what, 10**6)
            signal.pause()
        finally:
            os._exit(0)
    time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_who_floods_and_leaves(tmp_path: Path, kind: str, rounds: int) -> None:
    with server(tmp_path, kind) as (address, process):
        for _ in range(rounds):
            for what in FLOODS.values():
                flood(address, what, 5)
                flood_and_die(address, what)
            served(address)
            assert process.poll() is None


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("what", FLOODS)
def test_who_never_reads_fills_no_memory(tmp_path: Path, what: str) -> None:
    """Eight of them: refusals do not pile up, since who does not read is not read from."""
    with server(tmp_path, "ipc") as (address, process), ExitStack() as stack:
        before = resident_bytes(process.pid)
        peers = [stack.enter_context(zmtp(address)) for _ in range(8)]
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            for peer in peers:
                peer.settimeout(0.01)
                with suppress(OSError):
                    peer.sendall(FLOODS[what])
        assert resident_bytes(process.pid) - before < 128 << 20
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
