"""What is open at a time: a daemon with more clients than descriptors."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spilld import Client
from spilld.errors import AccessDenied
from spilld.protocol.messages import (
    Done,
    Generate,
    Hello,
    Welcome,
)

from .peer import Peer
from .raw import connected, zmtp
from .test_flood import served, server

if TYPE_CHECKING:
    from tests.daemon.conftest import Start

LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
from spilld.transport.descriptors import connections, raise_limit
raise_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE), connections(1000), connections(50))
"""


def test_the_limit_is_raised_and_connections_stay_below_it() -> None:
    said = subprocess.run([sys.executable, "-c", LIMITED], check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "(200, 200) 100 50"
    assert "at most 100 clients can be connected" in said.stderr


def test_more_idle_clients_than_descriptors(tmp_path: Path) -> None:
    """Who is connected is served; who comes too late is turned away, and let in once another has gone."""
    with server(tmp_path, "ipc") as (address, process), ExitStack() as stack:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (64, 64))  # after it began: accept(2) fails
        first = stack.enter_context(Peer(address))
        first.say(Hello(request_id="a"))
        assert isinstance(first.reply(), Welcome)
        idle = [connected(address) for _ in range(100)]
        time.sleep(0.3)
        first.say(Generate(request_id="b", prompt="x", max_tokens=1))
        while not isinstance(first.reply(), Done):
            pass
        assert process.poll() is None
        for peer in idle:
            peer.close()
        served(address)


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_as_many_as_may_be(start: Start, tmp_path: Path, kind: str) -> None:
    address = start(
        f"ipc://{tmp_path}/m" if kind == "ipc" else "tcp://127.0.0.1:*", max_connections=8
    ).address
    with ExitStack() as stack:
        peers = [stack.enter_context(zmtp(address)) for _ in range(8)]
        late = stack.enter_context(connected(address))
        with suppress(ConnectionResetError):
            assert late.recv(1) == b"", "it is closed at once"
        with pytest.raises(AccessDenied, match="max_connections"):
            Client(address, connect_timeout=0.5)
        peers[0].close()
        served(address)


def test_who_does_not_shake_hands_makes_way(start: Start) -> None:
    """Else who has no key could keep out all that have one."""
    address = start(max_connections=4).address
    with ExitStack() as stack:
        silent = [stack.enter_context(connected(address)) for _ in range(4)]
        assert [len(peer.recv(64)) for peer in silent] == [64] * 4
        served(address)
