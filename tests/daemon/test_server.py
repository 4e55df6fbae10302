"""The server at its socket: real frames from plain DEALER sockets, real signals to a real process."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spilld.errors import ConfigError
from spilld.monitoring.sd_notify import Notifier
from spilld.protocol.messages import (
    MAX_FRAME_BYTES,
    REQUESTS,
    Accepted,
    Cancel,
    Done,
    Failed,
    Generate,
    Hello,
    Progress,
    Reply,
    Resume,
    Stats,
    StatsReply,
    Token,
    Welcome,
)
from spilld.protocol.wire import encode
from spilld.server.server import Server

from .peer import Peer, until

if TYPE_CHECKING:
    from tests.daemon.conftest import Running, Start

HEADER = b"spilld\x00\x01"


class Dealer(Peer):
    def generate(self, request_id: str, prompt: str = "a b c", max_tokens: int = 3) -> None:
        self.send(*encode(Generate(request_id=request_id, prompt=prompt, max_tokens=max_tokens)))

    def refusal(self) -> Failed:
        reply = self.reply()
        assert isinstance(reply, Failed)
        return reply

    def to_the_end(self) -> list[Reply]:
        replies = [self.reply()]
        while not isinstance(replies[-1], Done | Failed):
            replies.append(self.reply())
        return replies


def test_two_clients_with_the_same_request_id(running: Running) -> None:
    """An id names one request, whoever sends it; once it has ended it is free."""
    running.echo.pace_s = 0.05
    with Dealer(running.address) as one, Dealer(running.address) as two:
        one.generate("same", "x y", 10)
        assert isinstance(one.reply(), Accepted)
        two.generate("same", "p q", 10)
        assert (two.refusal().code, two.socket.poll(200)) == ("invalid_request", 0)
        assert isinstance(one.to_the_end()[-1], Done)
        two.generate("same", "p q", 2)
        assert isinstance(two.to_the_end()[-1], Done)


def test_duplicate_id_in_flight(running: Running) -> None:
    running.echo.pace_s = 0.05
    with Dealer(running.address) as dealer:
        dealer.generate("x", max_tokens=10**6)
        assert isinstance(dealer.reply(), Accepted)
        dealer.generate("x")
        while isinstance(reply := dealer.reply(), Token):
            pass
        assert isinstance(reply, Failed)
        assert (reply.code, reply.request_id, reply.seq) == ("invalid_request", "x", 0)
        dealer.send(*encode(Cancel(request_id="x")))
        assert [r.code for r in dealer.to_the_end() if isinstance(r, Failed)] == ["cancelled"]
        dealer.generate("x", max_tokens=1)  # an id that has ended is free again
        assert isinstance(dealer.to_the_end()[-1], Done)


def test_refusals_name_the_request(running: Running) -> None:
    def packed(**fields: object) -> bytes:
        return bytes(msgpack.packb(fields))

    cases: list[tuple[list[bytes], str, str]] = [
        ([b"spilld\x00\x02", packed(type="generate", id="v")], "wrong_version", "v"),
        ([HEADER, packed(type="generate", id="p", text="a", max_tokens=-1)], "invalid_request", "p"),
        ([HEADER, packed(type="generate", id="n")], "invalid_request", "n"),
        ([HEADER, packed(type="telepathy", id="t")], "invalid_request", "t"),
        ([HEADER, packed(type="generate", id="i" * 65, text="a")], "invalid_request", ""),
        ([HEADER, packed(type="released", id="r", seq=0, context="c")], "invalid_request", "r"),
        ([HEADER, b"\xc1"], "protocol_error", ""),
        ([HEADER], "protocol_error", ""),
        ([HEADER, b"", b""], "protocol_error", ""),
        ([b"GET / HTTP/1.1"], "protocol_error", ""),
        ([HEADER, b"\x00" * (MAX_FRAME_BYTES + 1)], "frame_too_large", ""),
        (encode(Generate(request_id="b", prompt="bug")), "internal", "b"),
    ]
    with Dealer(running.address) as dealer:
        for frames, code, request_id in cases:
            dealer.send(*frames)
            failed = dealer.refusal()
            assert (failed.code, failed.request_id, failed.seq) == (code, request_id, 0)
        dealer.send(*encode(Hello(request_id="still alive")))
        assert isinstance(dealer.reply(), Welcome)


def test_the_types_that_are_allowed_are_those_of_requests(running: Running) -> None:
    with Dealer(running.address) as dealer:
        for name in ("telepathy", "released"):
            dealer.send(HEADER, bytes(msgpack.packb({"type": name, "id": "t", "context": "c"})))
            said = dealer.refusal().message
            assert set(said.partition("allowed: ")[2].split(", ")) == set(REQUESTS)


def test_unknown_fields_are_tolerated(running: Running) -> None:
    sampling = {"temperature": 0.5, "mirostat": 2}
    body = {
        "type": "generate",
        "id": "x",
        "text": "a",
        "max_tokens": 1,
        "future": {"a": [1]},
        "sampling": sampling,
    }
    with Dealer(running.address) as dealer:
        dealer.send(HEADER, msgpack.packb(body))
        assert isinstance(dealer.to_the_end()[-1], Done)
    assert running.echo.submitted[0].sampling.temperature == 0.5


def test_a_message_beyond_the_socket_limit_closes_only_that_connection(running: Running) -> None:
    with Dealer(running.address) as big, Dealer(running.address) as small:
        big.send(HEADER, b"\x00" * (2 * MAX_FRAME_BYTES + 1))
        assert not big.socket.poll(200)
        small.send(*encode(Hello(request_id="h")))
        assert isinstance(small.reply(), Welcome)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(st.one_of(st.just(HEADER), st.binary(max_size=60)), min_size=1, max_size=4))
def test_garbage_does_not_hurt(running: Running, frames: list[bytes]) -> None:
    with Dealer(running.address) as dealer:
        dealer.send(*frames)
        assert dealer.refusal().code in ("protocol_error", "invalid_request", "wrong_version")
    assert running.thread.is_alive()


def test_an_event_that_cannot_be_sent_fails_its_request(running: Running) -> None:
    running.echo.piece = "x" * (MAX_FRAME_BYTES + 1)
    with Dealer(running.address) as dealer:
        dealer.generate("x", max_tokens=1)
        _, failed = dealer.to_the_end()
        assert isinstance(failed, Failed)
        assert (failed.code, failed.seq) == ("frame_too_large", 1)
        until(running.echo.idle)
        running.echo.piece = ""
        dealer.generate("y", max_tokens=1)
        assert isinstance(dealer.to_the_end()[-1], Done)


def test_a_dead_client_leaves_its_requests_to_be_resumed(running: Running) -> None:
    running.echo.pace_s = 0.01
    with Dealer(running.address) as dealer, Dealer(running.address) as other:
        for name, count in (("a", 200), ("b", 10**6)):
            dealer.generate(name, max_tokens=count)
            dealer.reply()
        dealer.socket.close()
        until(lambda: sorted(name for _, name in running.echo.left) == ["a", "b"])
        assert running.echo.cancelled == []
        other.send(*encode(Resume(request_id="a", next_seq=1)))
        replies = other.to_the_end()
        assert [reply.seq for reply in replies] == list(range(1, 202))
        other.send(*encode(Cancel(request_id="b")))
        until(lambda: running.echo.cancelled == ["b"])
        until(running.echo.idle)
        other.send(*encode(Resume(request_id="b")))
        last = other.to_the_end()[-1]
        assert isinstance(last, Failed)
        assert last.code == "cancelled", "its end is still there"


def test_resume_takes_over_from_a_client_that_lives(running: Running) -> None:
    running.echo.pace_s = 0.01
    with Dealer(running.address) as one, Dealer(running.address) as two:
        one.generate("x", max_tokens=100)
        one.reply()
        two.send(*encode(Resume(request_id="x", next_seq=0)))
        assert [reply.seq for reply in two.to_the_end()] == list(range(102))
        one.send(*encode(Hello(request_id="h")))
        seen = one.reply()
        while not isinstance(seen, Welcome):
            assert isinstance(seen, Token)
            seen = one.reply()


def test_a_resume_that_is_refused_takes_nothing_away(running: Running) -> None:
    """Another tenant knows the id: it learns nothing, and the stream of the one that has it goes on."""
    running.echo.pace_s = 0.01
    with Dealer(running.address) as one, Dealer(running.address) as two:
        one.generate("x", max_tokens=50)
        one.reply()
        two.send(*encode(Resume(request_id="x", tenant="another", next_seq=3)))
        failed = two.refusal()
        assert (failed.code, failed.seq) == ("request_not_found", 3)
        replies = one.to_the_end()
        assert isinstance(replies[-1], Done)
        assert [reply.seq for reply in replies] == list(range(1, 52))


def test_who_resumed_keeps_it_when_the_one_before_goes(running: Running) -> None:
    running.echo.pace_s = 0.01
    with Dealer(running.address) as one, Dealer(running.address) as two:
        one.generate("x", max_tokens=100)
        one.generate("y", max_tokens=10**6)
        until(lambda: len(running.echo.submitted) == 2)
        two.send(*encode(Resume(request_id="x")))
        assert two.reply().seq == 0
        one.socket.close()
        until(lambda: running.echo.left)
        assert isinstance(two.to_the_end()[-1], Done)
        assert {name for _, name in running.echo.left} <= {"x", "y"}
        two.send(*encode(Cancel(request_id="y")))
        until(running.echo.idle)


def test_resume_of_what_is_not_known(running: Running) -> None:
    with Dealer(running.address) as dealer:
        dealer.send(*encode(Resume(request_id="x", next_seq=7)))
        failed = dealer.refusal()
        assert (failed.code, failed.request_id, failed.seq) == ("request_not_found", "x", 7)
        dealer.generate("x", max_tokens=1)
        assert isinstance(dealer.to_the_end()[-1], Done)


STRANGER = """
import os, sys, zmq
address, group, *frames = sys.argv[1:]
os.setgroups([])
os.setgid(int(group))
os.setuid(65534)
socket = zmq.Context().socket(zmq.DEALER)
socket.setsockopt(zmq.LINGER, 0)
socket.connect(address)
socket.send_multipart([bytes.fromhex(frame) for frame in frames])
print(bool(socket.poll(1500)))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize(("to_group", "member"), [(False, False), (False, True), (True, False), (True, True)])
def test_who_connects_is_looked_at(start: Start, to_group: bool, member: bool) -> None:
    """A user whom the modes of the file let in, because somebody has loosened them."""
    with tempfile.TemporaryDirectory(prefix="spilld-open-") as folder:
        Path(folder).chmod(0o755)
        running = start(f"ipc://{folder}/s", open_to_group=to_group)
        Path(folder, "s").chmod(0o777)
        frames = [frame.hex() for frame in encode(Hello(request_id="x"))]
        group = str(os.getegid() if member else 65534)
        command = [sys.executable, "-c", STRANGER, running.address, group, *frames]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert said == str(to_group and member)
        with Dealer(running.address) as mine:
            mine.send(*encode(Hello(request_id="y")))
            assert isinstance(mine.reply(), Welcome)


def test_a_slow_client_is_cancelled_and_told(start: Start) -> None:
    running = start(send_queue=8)
    running.echo.piece = "x" * 100_000  # so that the kernel's buffers are soon full
    with Dealer(running.address, RCVHWM=4) as slow, Dealer(running.address) as other:
        slow.generate("s", max_tokens=10**6)
        until(lambda: running.echo.cancelled)
        other.send(*encode(Hello(request_id="h")))
        assert isinstance(other.reply(), Welcome)
        until(running.echo.idle)
        replies = slow.to_the_end()
        assert [reply.seq for reply in replies] == list(range(len(replies)))  # nothing is missing
        assert isinstance(replies[-1], Failed)
        assert (replies[-1].code, replies[-1].retryable) == ("overloaded", True)
        assert len(running.echo.cancelled) == 1
        slow.send(*encode(Stats(request_id="t")))
        assert isinstance(slow.reply(), StatsReply)


def test_posts_from_many_threads_arrive_in_order(running: Running) -> None:
    running.echo.pace_s = 10
    names = [f"r{i}" for i in range(8)]
    with Dealer(running.address) as dealer:
        for name in names:
            dealer.generate(name)
        until(lambda: len(running.echo._running) == len(names))
        client = running.echo._clients[names[0]]

        def work(name: str) -> None:
            for seq in range(1, 300):
                running.server.post(client, Progress(request_id=name, seq=seq, done=seq, total=300))

        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        seen: dict[str, list[int]] = {name: [] for name in names}
        for _ in range(300 * len(names)):
            reply = dealer.reply()
            seen[reply.request_id].append(reply.seq)
        assert seen == {name: list(range(300)) for name in names}
        for thread in threads:
            thread.join()


def test_stop_fails_what_runs(running: Running) -> None:
    running.echo.pace_s = 0.01
    with Dealer(running.address) as dealer:
        dealer.generate("x", max_tokens=10**6)
        dealer.reply()
        running.server.stop()
        last = dealer.to_the_end()[-1]
        assert isinstance(last, Failed)
        assert (last.code, last.retryable) == ("draining", True)
    running.join()
    assert running.echo.stopped


def test_stop_says_nothing_of_what_is_saved(running: Running) -> None:
    running.echo.pace_s, running.echo.saves = 0.01, True
    with Dealer(running.address) as dealer:
        dealer.generate("x", max_tokens=10**6)
        dealer.reply()
        running.server.stop()
        running.join()
        while dealer.socket.poll(200):
            assert isinstance(dealer.reply(), Token)


# The address


@pytest.mark.parametrize(("group", "mode"), [(False, 0o600), (True, 0o660)])
def test_socket_and_folder_are_private(start: Start, tmp_path: Path, group: bool, mode: int) -> None:
    before = os.umask(0o022)
    os.umask(before)
    path = tmp_path / "new" / "s"
    running = start(f"ipc://{path}", open_to_group=group)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert stat.S_IMODE(Path(f"{path}.lock").stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.umask(before) == before
    running.server.stop()
    running.join()
    running.server.__exit__()
    assert not path.exists()


AS_NOBODY = """
import os, socket, sys
peer = socket.socket(socket.AF_UNIX)
os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    peer.connect(sys.argv[1])
except PermissionError:
    print("refused")
else:
    print("connected")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_cannot_connect(start: Start) -> None:
    """The mode of the socket is enough, and so is that of the folder."""

    def as_nobody(path: Path) -> str:
        command = [sys.executable, "-I", "-c", AS_NOBODY, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        start(f"ipc://{folder}/bare")
        assert as_nobody(folder / "bare") == "refused"
        (folder / "bare").chmod(0o666)
        assert as_nobody(folder / "bare") == "connected", "nothing else kept it out"
        start(f"ipc://{folder}/private/s")
        (folder / "private" / "s").chmod(0o666)
        assert as_nobody(folder / "private" / "s") == "refused"
        (folder / "private").chmod(0o755)
        assert as_nobody(folder / "private" / "s") == "connected"


def test_second_server_on_an_address_is_refused(running: Running) -> None:
    with pytest.raises(ConfigError, match="another spilld"), Server(running.address):
        pass
    with Dealer(running.address) as dealer:
        dealer.send(*encode(Hello(request_id="h")))
        assert isinstance(dealer.reply(), Welcome)


def test_stale_socket_is_replaced_a_live_one_and_a_file_are_not(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ConfigError, match="another process listens"), Server(f"ipc://{path}"):
            pass
        assert path.exists()
    start(f"ipc://{path}")  # nobody listens at it any more
    ordinary = tmp_path / "file"
    ordinary.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"), Server(f"ipc://{ordinary}"):
        pass
    assert ordinary.read_text() == "precious"


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://10.0.0.1:1", "ipc://@abstract"]
)
def test_addresses_open_to_others_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="allowed"), Server(address):
        pass


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "tcp://localhost:0", "tcp://[::1]:*"])
def test_loopback_tcp(start: Start, address: str) -> None:
    if "::1" in address and not _has_ipv6():
        pytest.skip("no IPv6 here")
    running = start(address)
    with Dealer(running.address, IPV6=1) as dealer:
        dealer.generate("x", max_tokens=2)
        assert isinstance(dealer.to_the_end()[-1], Done)
    with pytest.raises(ConfigError, match="cannot listen"), Server(running.address):
        pass


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


# A process: signals and systemd


class Daemon:
    def __init__(self, address: str, process: subprocess.Popen[bytes], notify: socket.socket) -> None:
        self.address = address
        self.process = process
        self._notify = notify

    def told(self) -> str:
        """The next thing it told systemd, without its status."""
        return self._notify.recv(100).decode().splitlines()[0]

    def ends(self) -> int:
        return self.process.wait(10)


ASIDE = """
import runpy, signal, sys, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a program whose main thread is not interrupted by SIGTERM: another takes it."""


@contextmanager
def daemon(tmp_path: Path, *, drain_s: float, pace_s: float, aside: bool = False) -> Iterator[Daemon]:
    address = f"ipc://{tmp_path}/d"
    conftest = Path(__file__).with_name("conftest.py")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(10)
        environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        program = ["-c", ASIDE, str(conftest)] if aside else [str(conftest)]
        command = [sys.executable, *program, address, str(drain_s), str(pace_s)]
        with subprocess.Popen(command, env=environment) as process:
            try:
                running = Daemon(address, process, notify)
                assert running.told() == "READY=1"
                yield running
            finally:
                process.kill()


def test_first_signal_drains(tmp_path: Path) -> None:
    with daemon(tmp_path, drain_s=20, pace_s=0.1) as running, Dealer(running.address) as dealer:
        dealer.generate("x", "a b", 6)
        assert isinstance(dealer.reply(), Accepted)
        running.process.send_signal(signal.SIGTERM)
        assert running.told() == "STOPPING=1"
        with Dealer(running.address) as late:
            late.generate("y")
            refusal = late.refusal()
            assert (refusal.code, refusal.retryable, refusal.seq) == ("draining", True, 0)
            late.send(*encode(Stats(request_id="s")))
            assert isinstance(late.reply(), StatsReply)
        assert isinstance(dealer.to_the_end()[-1], Done)
        assert running.ends() == 0
    assert not (tmp_path / "d").exists()


def test_a_signal_that_does_not_interrupt_the_poll_wakes_it(tmp_path: Path) -> None:
    """As one does that comes just before the poll: it was noticed up to a minute later."""
    with daemon(tmp_path, drain_s=20, pace_s=0, aside=True) as running:
        time.sleep(0.3)
        running.process.send_signal(signal.SIGTERM)
        assert running.told() == "STOPPING=1"
        assert running.ends() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_stops(tmp_path: Path, number: signal.Signals) -> None:
    with daemon(tmp_path, drain_s=60, pace_s=0.05) as running, Dealer(running.address) as dealer:
        dealer.generate("x", max_tokens=10**6)
        dealer.reply()
        running.process.send_signal(number)
        assert running.told() == "STOPPING=1"
        running.process.send_signal(number)
        replies = dealer.to_the_end()
        assert isinstance(replies[-1], Failed)
        assert replies[-1].code == "draining"
        assert [reply.seq for reply in replies] == list(range(1, len(replies) + 1))
        assert running.ends() == 0


def test_a_drain_has_an_end(tmp_path: Path) -> None:
    with daemon(tmp_path, drain_s=0.3, pace_s=0.05) as running, Dealer(running.address) as dealer:
        dealer.generate("x", max_tokens=10**6)
        dealer.reply()
        running.process.send_signal(signal.SIGTERM)
        last = dealer.to_the_end()[-1]
        assert isinstance(last, Failed)
        assert last.code == "draining"
        assert running.ends() == 0


def test_killed_daemon_leaves_an_address_that_can_be_taken(tmp_path: Path, start: Start) -> None:
    with daemon(tmp_path, drain_s=1, pace_s=0) as running:
        running.process.kill()
        running.ends()
        assert (tmp_path / "d").exists()
        start(running.address)
        with Dealer(running.address) as dealer:
            dealer.generate("x", max_tokens=2)
            assert isinstance(dealer.to_the_end()[-1], Done)


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(
    tmp_path: Path, abstract: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("spilld.monitoring.sd_notify.time", SimpleNamespace(monotonic=lambda: now))
    name = f"@spilld-test-{os.getpid()}" if abstract else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name.replace("@", "\0"))
        systemd.settimeout(2)
        notifier = Notifier(
            {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "100000", "WATCHDOG_PID": str(os.getpid())}
        )
        notifier.starting("loading", 90)
        notifier.ready()
        notifier.alive(1)
        notifier.alive(2)  # not due yet
        assert 0 < notifier.due_s() <= 0.05
        now += 0.06
        assert 0 < notifier.due_s() < 0.01, "it is looked again soon"
        notifier.alive(1)  # due, but nothing has moved
        notifier.alive(2)
        notifier.stopping("draining")
        told = [systemd.recv(100).decode() for _ in range(5)]
        assert told == [
            "STATUS=loading\nEXTEND_TIMEOUT_USEC=90000000",
            "READY=1\nSTATUS=serving",
            "WATCHDOG=1",
            "WATCHDOG=1",
            "STOPPING=1\nSTATUS=draining",
        ]
        assert caplog.text.count("has not moved") == 1


def test_notify_without_systemd(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    silent = Notifier({"WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"})
    silent.ready()
    assert silent.watchdog_s is None
    assert not caplog.records
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()
    assert "READY=1" in caplog.text
