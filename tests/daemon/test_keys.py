"""Keys: the files that `spilld keys` makes, those that people edit, and who gets in by them."""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
import stat
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest

from spilld import AsyncClient, Client
from spilld.__main__ import main
from spilld.auth import keyring
from spilld.auth.authorized_clients import AuthorizedClients, load_clients
from spilld.auth.keyring import (
    CLIENTS,
    SERVER,
    default_folder,
    make_client,
    make_server,
)
from spilld.auth.keys import ClientKey, ServerKey
from spilld.errors import (
    AccessDenied,
    ConfigError,
    SpilldError,
    Unreachable,
)
from spilld.fields import readers
from spilld.protocol.messages import (
    TYPES,
    Accepted,
    Acknowledge,
    Cancel,
    ChangeSession,
    Done,
    ExportSession,
    Failed,
    Generate,
    Hello,
    ImportSession,
    ListSessions,
    Release,
    Released,
    Reply,
    Request,
    Resume,
    Sessions,
    Tenanted,
    Token,
    Welcome,
)
from spilld.server.server import Server
from spilld.transport import connection, router

from .peer import Peer, until

if TYPE_CHECKING:
    from tests.daemon.conftest import Running, Start

LOOPBACK = "tcp://127.0.0.1:*"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with a daemon's key and two clients."""
    make_server(tmp_path / "keys")
    make_client(tmp_path / "keys", "alice", "of alice")
    make_client(tmp_path / "keys", "bob", "of bob")
    return tmp_path / "keys"


@pytest.fixture
def running(start: Start, keys: Path) -> Running:
    return start(LOOPBACK, keys=keys)


# Files


def test_what_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "keys"
    before = os.umask(0)
    try:
        made = make_server(folder), make_client(folder, "alice"), make_client(folder, "bob")
        make_client(folder, "carol", "of alice")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in folder.iterdir()} == {SERVER, CLIENTS, "alice.key", "bob.key", "carol.key"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    server, alice, bob = ServerKey.load(made[0]), ClientKey.load(made[1]), ClientKey.load(made[2])
    assert alice.server == bob.server == server.public
    guests = load_clients(folder / CLIENTS)
    assert list(guests)[:2] == [alice.public, bob.public]
    tenants = [guest.tenant for guest in guests.values()]
    assert [len(tenant) for tenant in tenants] == [32, 32, 8]
    assert len(set(tenants)) == 3
    for secret, path in ((server.secret, made[0]), (alice.secret, made[1])):
        assert secret in path.read_text()
        assert secret not in (folder / CLIENTS).read_text() + repr(server) + repr(alice)


def test_nothing_is_replaced(keys: Path) -> None:
    before = {path: path.read_text() for path in keys.iterdir()}
    with pytest.raises(ConfigError, match=r"server\.key exists and is not replaced"):
        make_server(keys)
    with pytest.raises(ConfigError, match=r"alice\.key exists"):
        make_client(keys, "alice")
    with pytest.raises(ConfigError, match=r"server\.key exists"):
        make_client(keys, "server")
    (keys / "alice.key").rename(keys / "taken to alice")
    with pytest.raises(ConfigError, match=r"clients\.toml, line \d+: there is 'alice' already"):
        make_client(keys, "alice")
    assert not (keys / "alice.key").exists(), "a key that is not authorised is of no use"
    (keys / "taken to alice").rename(keys / "alice.key")
    assert {path: path.read_text() for path in keys.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "tenant", "says"),
    [
        ("", None, "NAME is ''; allowed"),
        ("../alice", None, r"NAME is '\.\./alice'"),
        ("a.b", None, "NAME is"),
        ("a" * 65, None, "NAME is"),
        ("eve", "a\nkey = 1", "tenant is"),
        ("eve", "\x7f", "tenant is"),
        ("eve", "t" * 65, "tenant is"),
    ],
)
def test_names_that_cannot_be(keys: Path, name: str, tenant: str | None, says: str) -> None:
    before = sorted(keys.iterdir()), (keys / CLIENTS).read_text()
    with pytest.raises(ConfigError, match=says):
        make_client(keys, name, tenant)
    assert (sorted(keys.iterdir()), (keys / CLIENTS).read_text()) == before


@pytest.mark.parametrize("tenant", ["", "\\\"'", "\N{SNOWMAN} \N{GRINNING FACE}", "[x]", "t" * 64])
def test_tenants_are_written_as_they_are(keys: Path, tenant: str) -> None:
    key = ClientKey.load(make_client(keys, "eve", tenant))
    assert load_clients(keys / CLIENTS)[key.public].tenant == tenant


def test_a_client_before_the_daemon(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make the daemon's key first, by `spilld keys`"):
        make_client(tmp_path, "alice")
    with pytest.raises(ConfigError, match="cannot make"):
        make_server(Path("/proc/none"))


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@needs_root
def test_what_root_makes_is_the_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever root's umask: the daemon's user must get at it."""
    service = pwd.getpwnam("nobody")
    monkeypatch.setattr(keyring, "SERVICE_USER", service.pw_name)
    before = os.umask(0o077)
    try:
        make_server(tmp_path / "spilld/keys")
        make_client(tmp_path / "spilld/keys", "laptop")
    finally:
        os.umask(before)
    made = list((tmp_path / "spilld").rglob("*"))
    assert len(made) == 4
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in (tmp_path / "spilld", *made)}
    assert owners == {(service.pw_uid, service.pw_gid)}
    assert tmp_path.stat().st_uid == 0, "that was there"


@needs_root
def test_what_root_adds_to_a_folder_is_its_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "SERVICE_USER", "no such user")
    make_server(tmp_path / "new")
    assert {path.stat().st_uid for path in (tmp_path / "new").iterdir()} == {0}
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 54321)
    make_server(folder)
    make_client(folder, "laptop")
    assert {(path.stat().st_uid, path.stat().st_gid) for path in folder.iterdir()} == {(12345, 54321)}


def test_a_list_that_is_a_link_is_not_followed(keys: Path, tmp_path: Path) -> None:
    """Root may add to a list in a folder that is another's, who could have it append to any file."""
    (keys / CLIENTS).rename(tmp_path / "elsewhere")
    (keys / CLIENTS).symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_text()
    with pytest.raises(ConfigError, match=r"cannot write .*clients\.toml"):
        make_client(keys, "carol")
    assert (tmp_path / "elsewhere").read_text() == before
    assert not (keys / "carol.key").exists()


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_folder({}) == Path("/etc/spilld/keys")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_folder({}) == Path.home() / ".config/spilld/keys"
    assert default_folder({"XDG_CONFIG_HOME": "/x"}) == Path("/x/spilld/keys")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda text: text.replace("secret", "sceret"), r"line 2: unknown 'sceret'; allowed: secret, server"),
        (
            lambda text: text.replace('secret = "', 'secret = "x'),
            r"line 2: secret is '\*\*\*'; allowed: a key",
        ),
        (lambda text: text.replace("server = ", "# "), "server is None; allowed: it must be given"),
        (lambda text: text + "server", "is not TOML"),
        (lambda _: 'server = ""\nsecret = "' + "#" * 40 + '"', r"line 2: secret is '\*\*\*'"),
        (lambda _: 'server = ""\nsecret = "' + "\N{SNOWMAN}" * 40 + '"', r"line 2: secret is '\*\*\*'"),
        (lambda _: 'server = ""\nsecret = 7', r"line 2: secret is '\*\*\*'"),
    ],
)
def test_key_files_that_cannot_be_used(keys: Path, edit: Any, says: str) -> None:
    path = keys / "alice.key"
    secret = ClientKey.load(path).secret
    path.write_text(edit(path.read_text()))
    with pytest.raises(ConfigError, match=says) as caught:
        Client("tcp://127.0.0.1:1", keys=path)
    assert secret[:8] not in str(caught.value), "an error must not tell a secret"


def test_key_files_that_others_can_read(keys: Path) -> None:
    (keys / "alice.key").chmod(0o640)
    with pytest.raises(ConfigError, match="open to others"):
        AsyncClient("tcp://127.0.0.1:1", keys=keys / "alice.key")
    (keys / SERVER).chmod(0o604)
    with pytest.raises(ConfigError, match="open to others"):
        Server(LOOPBACK, keys=keys)
    (keys / SERVER).unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*server\.key"):
        Server(LOOPBACK, keys=keys)


@pytest.mark.parametrize("name", [CLIENTS, SERVER, "."])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_files_that_others_can_write(keys: Path, name: str, mode: int) -> None:
    """Or replace: who can, lets in whom they like."""
    path = keys / name
    path.chmod(path.stat().st_mode | mode)
    says = "open to others" if name == SERVER else f"can be written by others.*chmod go-w {path}"
    with pytest.raises(ConfigError, match=says):
        Server(LOOPBACK, keys=keys)


def test_a_list_that_becomes_writable_is_not_read(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    guests, eve = AuthorizedClients(keys / CLIENTS), ClientKey.load(make_client(keys, "eve")).public
    (keys / CLIENTS).chmod(0o666)
    assert guests.find(eve) is None
    assert "chmod go-w" in caplog.text
    (keys / CLIENTS).chmod(0o600)
    assert guests.find(eve) is not None


@needs_root
@pytest.mark.parametrize("name", [CLIENTS, "."])
def test_files_of_another_user(keys: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read what is the service's; the service takes its own files and root's."""
    os.chown(keys / name, 12345, 12345)
    Server(LOOPBACK, keys=keys)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    Server(LOOPBACK, keys=keys)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(ConfigError, match="is another user's"):
        Server(LOOPBACK, keys=keys)


KEY = "q*7#9jp65M@BGabMhgEuHUIEHqbcdB<s2)EURP-Y"
"""A public key; always the same, since it is part of the tests' names."""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f'[alice]\nkey = "{KEY}"\n', r"clients\.toml, line 1: tenant is None; allowed: it must be given"),
        (
            f'[a]\nkey = "{KEY}"\ntenant = ""\n\n[b]\ntenant = ""\nkey = "{KEY}"',
            "line 7: key is that of another",
        ),
        (f'[a]\nkey = "{KEY[:-1]}"\ntenant = ""', r"line 2: key is '\*\*\*'"),
        (f'[a]\nkey = "{KEY}"\ntenant = 5', "line 3: tenant is 5; allowed: a string"),
        (f'[a]\nkey = "{KEY}"\ntenant = ""\nquota = 5', "line 4: unknown 'quota'; allowed: key, tenant"),
        ("\nalice = 3", "line 2: alice is 3; allowed: a table of key, tenant"),
        ("\n[alice", r"is not TOML: .*\(at line 2, the end\)"),
    ],
)
def test_clients_that_are_wrong(keys: Path, text: str, says: str) -> None:
    (keys / CLIENTS).write_text(text)
    with pytest.raises(ConfigError, match=says):
        Server(LOOPBACK, keys=keys)


def test_clients_are_seen_when_they_change(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    guests = AuthorizedClients(keys / CLIENTS)
    alice = ClientKey.load(keys / "alice.key").public
    eve = ClientKey.load(make_client(keys, "eve")).public
    assert guests.find(alice) is not None
    assert guests.find(eve) is not None
    text = (keys / CLIENTS).read_text()
    (keys / CLIENTS).write_text(text + "[half")
    assert guests.find(alice) is not None, "what was right before still holds"
    assert guests.find(eve) is not None
    assert [record.levelname for record in caplog.records] == ["ERROR"], "said once"
    assert "as they were" in caplog.text
    (keys / CLIENTS).write_text(text[: text.index("[eve]")])
    assert guests.find(alice) is not None
    assert guests.find(eve) is None
    (keys / CLIENTS).unlink()
    assert guests.find(alice) is None
    (keys / CLIENTS).write_text(text)
    assert guests.find(alice) is not None


# Who gets in


def test_with_a_key(running: Running, keys: Path) -> None:
    with Client(running.address, keys=keys / "alice.key") as client:
        assert client.hello().model == "echo"
        assert client.generate("a b", max_tokens=2).text() == "a b "
    assert running.echo.submitted[0].tenant == "of alice"

    async def ask() -> str:
        async with AsyncClient(running.address, keys=str(keys / "bob.key"), tenant="of bob") as client:
            return await client.generate("x", max_tokens=2).text()

    assert asyncio.run(ask()) == "x x "
    assert running.echo.submitted[1].tenant == "of bob"


def test_heartbeats_of_who_has_a_key_are_no_messages(
    start: Start, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each side asks the other a few times whether it is there."""
    monkeypatch.setattr(connection, "HEARTBEAT_MS", 50)
    monkeypatch.setattr(router, "LOOK_S", 0.02)
    running, key = start(LOOPBACK, keys=keys), ClientKey.load(keys / "alice.key")
    secured = {
        "CURVE_SERVERKEY": key.server.encode(),
        "CURVE_PUBLICKEY": key.public.encode(),
        "CURVE_SECRETKEY": key.secret.encode(),
    }
    with (
        Peer(running.address, **secured) as asked,
        Peer(running.address, **secured, HEARTBEAT_IVL=50) as asking,
    ):
        for peer in (asked, asking):
            peer.say(Hello(request_id="h"))
            assert isinstance(peer.reply(), Welcome)
        for peer in (asked, asking):
            assert not peer.socket.poll(300)
            peer.say(Hello(request_id="h"))
            assert isinstance(peer.reply(), Welcome)


def test_a_restart_does_not_matter_to_who_has_a_key(start: Start, keys: Path) -> None:
    first = start(LOOPBACK, keys=keys)
    with Client(first.address, keys=keys / "alice.key") as client:
        assert client.hello().model == "echo"
        first.server.stop()
        first.join()
        first.server.__exit__()
        start(first.address, keys=keys)
        deadline = time.monotonic() + 5
        while True:
            try:
                assert client.hello().model == "echo"
                break
            except Unreachable:
                assert time.monotonic() < deadline


def test_keys_hold_for_ipc_too(start: Start, keys: Path, tmp_path: Path) -> None:
    running = start(f"ipc://{tmp_path}/s", keys=keys)
    with Client(running.address, keys=keys / "alice.key") as client:
        assert client.hello().model == "echo"
    with pytest.raises(AccessDenied, match="wants a key"):
        Client(running.address, connect_timeout=1)


def refused(address: str, key: Path | None) -> str:
    """What both clients say, at their deadline and not long after."""
    began = time.monotonic()
    with pytest.raises(AccessDenied) as caught:
        Client(address, keys=key, connect_timeout=0.7)

    async def connect() -> None:
        async with AsyncClient(address, keys=key, connect_timeout=0.7):
            pass

    with pytest.raises(AccessDenied) as again:
        asyncio.run(connect())
    assert time.monotonic() - began < 4
    assert (again.value.message, again.value.retryable) == (caught.value.message, False)
    return caught.value.message


def test_without_a_key(running: Running) -> None:
    said = refused(running.address, None)
    assert running.address in said
    assert "it wants a key" in said
    assert "--keys FILE" in said


def test_with_a_key_that_is_not_authorised(
    running: Running, keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    eve = make_client(keys, "eve")
    text = (keys / CLIENTS).read_text()
    (keys / CLIENTS).write_text(text[: text.index("[eve]")])
    said = refused(running.address, eve)
    assert "clients.toml does not have this client's key" in said
    assert "`spilld keys --client NAME`" in said
    assert f"not authorised: {ClientKey.load(eve).public}" in caplog.text
    (keys / CLIENTS).write_text(text)
    with Client(running.address, keys=eve) as client:
        assert client.hello().model == "echo"


def test_with_another_daemons_key(running: Running, tmp_path: Path) -> None:
    make_server(tmp_path / "other")
    said = refused(running.address, make_client(tmp_path / "other", "alice"))
    assert "it has no keys, or another than this client's key file says" in said


def test_with_a_key_where_there_are_none(start: Start, keys: Path) -> None:
    said = refused(start(LOOPBACK).address, keys / "alice.key")
    assert "it has no keys, or another" in said


def test_who_is_let_in_once_is_refused_once_removed(running: Running, keys: Path) -> None:
    with Client(running.address, keys=keys / "bob.key") as client:
        client.hello()
        text = (keys / CLIENTS).read_text()
        (keys / CLIENTS).write_text(text[: text.index("[bob]")])
        with pytest.raises(AccessDenied, match="not authorised any more"):
            client.generate("a").text()
        with pytest.raises(AccessDenied, match="not authorised any more"):
            client.hello()
    assert running.echo.submitted == []


def test_a_generation_that_cannot_be_resumed_says_why(start: Start, keys: Path) -> None:
    """The daemon comes back, but does not let the client in: typed, within reconnect_s."""
    first = start(LOOPBACK, keys=keys)
    first.echo.pace_s, first.echo.saves = 0.01, True
    with Client(first.address, keys=keys / "bob.key", reconnect_s=1.5) as client:
        generation = client.generate("a", max_tokens=10**6)
        next(generation)
        text = (keys / CLIENTS).read_text()
        (keys / CLIENTS).write_text(text[: text.index("[bob]")])
        first.server.stop()
        first.join()
        first.server.__exit__()
        start(first.address, keys=keys)
        began = time.monotonic()
        with pytest.raises(AccessDenied, match=r"clients\.toml does not have"):
            generation.text()
        assert time.monotonic() - began < 5


def test_a_daemon_with_another_key_in_its_place(start: Start, keys: Path, tmp_path: Path) -> None:
    """libzmq tries again and again, and hears nothing; the generation ends within reconnect_s."""
    first = start(LOOPBACK, keys=keys)
    first.echo.pace_s, first.echo.saves = 0.01, True
    with Client(first.address, keys=keys / "alice.key", reconnect_s=1.5) as client:
        generation = client.generate("a", max_tokens=10**6)
        next(generation)
        first.server.stop()
        first.join()
        first.server.__exit__()
        make_server(tmp_path / "other")
        start(first.address, keys=tmp_path / "other")
        began = time.monotonic()
        with pytest.raises(AccessDenied, match="another than this client's key file says"):
            generation.text()
        assert 1 < time.monotonic() - began < 5


# Tenants


class KeyedDealer(Peer):
    """With a key."""

    def __init__(self, address: str, key: ClientKey) -> None:
        curve = {"CURVE_SERVERKEY": key.server, "CURVE_PUBLICKEY": key.public, "CURVE_SECRETKEY": key.secret}
        super().__init__(address, **{name: text.encode() for name, text in curve.items()})

    def ask(self, request: Request) -> Reply:
        """The first reply to it."""
        self.say(request)
        while (reply := self.reply()).request_id != request.request_id:
            pass
        return reply


SILENT: list[Cancel | Acknowledge] = [Cancel(request_id="x"), Acknowledge(request_id="x", next_seq=1)]
"""Those that have no answer, unless they are refused."""

REQUESTS: list[Tenanted] = [
    Generate(request_id="x", prompt="a", max_tokens=1),
    Resume(request_id="x"),
    Release(request_id="x", context="c"),
    ListSessions(request_id="x"),
    ChangeSession(request_id="x", session="s", action="pin"),
    ExportSession(request_id="x", session="s"),
    ImportSession(request_id="x", session="s", transfer="0" * 32),
]


def test_every_request_that_names_a_tenant_is_known() -> None:
    named = {cls for cls in TYPES.values() if "tenant" in readers(cls)}
    assert set(get_args(Tenanted)) == {type(request) for request in (*REQUESTS, *SILENT)} == named


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: type(request).__name__)
def test_a_key_speaks_for_its_tenant_alone(running: Running, keys: Path, request_: Tenanted) -> None:
    with KeyedDealer(running.address, ClientKey.load(keys / "alice.key")) as alice:
        for other in ("of bob", "of alice ", "\0"):
            failed = alice.ask(replace(request_, tenant=other))
            assert isinstance(failed, Failed)
            assert (failed.code, failed.request_id, failed.retryable) == ("access_denied", "x", False)
        echo = running.echo
        assert (echo.submitted, echo.managed, echo.resumed, echo.transferred) == ([], [], [], [])
        for own in ("", "of alice"):
            seen = alice.ask(replace(request_, request_id=own or "none", tenant=own))
            assert not isinstance(seen, Failed) or seen.code != "access_denied"
        arrived: list[Any] = [*echo.submitted, *echo.managed, *echo.resumed, *echo.transferred]
        assert [asked.tenant for asked in arrived] == ["of alice", "of alice"]


@pytest.mark.parametrize("request_", SILENT, ids=lambda request: type(request).__name__)
def test_a_request_is_another_tenants_whoever_knows_its_id(
    running: Running, keys: Path, request_: Cancel | Acknowledge
) -> None:
    """Ids are in logs; what can be done with them is its own tenant's to do."""
    running.echo.pace_s = 0.01
    laptop = make_client(keys, "laptop", "of alice")
    done: list[Any] = running.echo.cancelled if isinstance(request_, Cancel) else running.echo.acknowledged
    with (
        KeyedDealer(running.address, ClientKey.load(keys / "alice.key")) as alice,
        KeyedDealer(running.address, ClientKey.load(keys / "bob.key")) as bob,
        KeyedDealer(running.address, ClientKey.load(laptop)) as other,
    ):
        assert isinstance(alice.ask(Generate(request_id="x", prompt="a", max_tokens=10**6)), Accepted)
        failed = bob.ask(replace(request_, tenant="of alice"))
        assert isinstance(failed, Failed)
        assert failed.code == "access_denied"
        for tenant in (None, "", "of bob"):
            bob.say(replace(request_, tenant=tenant))
        assert isinstance(bob.ask(ListSessions(request_id="l")), Sessions)
        assert not done
        other.say(request_)
        until(lambda: done)


def test_two_keys_of_one_tenant_share_and_others_do_not(running: Running, keys: Path) -> None:
    running.echo.pace_s = 0.01
    laptop = make_client(keys, "laptop", "of alice")
    with Client(running.address, keys=keys / "alice.key") as alice:
        generation = alice.generate("a b", max_tokens=20)
        next(generation)
        with Client(running.address, keys=keys / "bob.key") as bob, pytest.raises(SpilldError) as caught:
            bob.resume(generation.id).text()
        assert caught.value.code == "request_not_found"
        with Client(running.address, keys=laptop) as other:
            assert len(list(other.resume(generation.id))) == 22


def test_what_has_no_tenant_passes(running: Running, keys: Path) -> None:
    with KeyedDealer(running.address, ClientKey.load(keys / "alice.key")) as alice:
        assert isinstance(alice.ask(Release(request_id="r", context="c")), Released)
        assert isinstance(alice.ask(ListSessions(request_id="l")), Sessions)
        reply = alice.ask(Generate(request_id="g", prompt="a", max_tokens=1))
        while not isinstance(reply, Done):
            assert not isinstance(reply, Failed)
            reply = alice.reply()


def test_one_key_does_not_have_all_connections(start: Start, keys: Path) -> None:
    running = start(LOOPBACK, keys=keys, max_connections=4)
    alice = ClientKey.load(keys / "alice.key")
    with ExitStack() as stack:
        for number in range(2):
            peer = stack.enter_context(KeyedDealer(running.address, alice))
            assert isinstance(peer.ask(ListSessions(request_id=f"l{number}")), Sessions)
        third = stack.enter_context(KeyedDealer(running.address, alice))
        third.say(ListSessions(request_id="l"))
        assert not third.socket.poll(300)
        with Client(running.address, keys=keys / "bob.key") as bob:
            assert bob.hello().model == "echo"
        peer.socket.close()

        def let_in() -> int:
            third.say(ListSessions(request_id="l"))
            return third.socket.poll(200)

        until(let_in)  # libzmq tries again and again


# The address


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://[::]:1", "tcp://10.0.0.1:1"]
)
def test_without_keys_only_the_loopback(address: str) -> None:
    with pytest.raises(ConfigError, match=r"without keys.*`spilld keys`"), Server(address):
        pass


def test_the_log_says_that_the_loopback_is_open(
    start: Start, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(LOOPBACK, keys=keys)
    assert "every user" not in caplog.text
    start(LOOPBACK)
    assert [record.levelname for record in caplog.records if "every user" in record.message] == ["WARNING"]


def test_peers_that_speak_no_zmtp(running: Running, keys: Path) -> None:
    host, port = running.address.removeprefix("tcp://").split(":")
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" + b"\x00" * 8 + b"\x7f", os.urandom(5000)):
        with socket.create_connection((host, int(port)), 5) as peer:
            peer.sendall(words)
            with Client(running.address, keys=keys / "alice.key") as client:
                assert client.hello().model == "echo"


# Commands


def test_commands(running: Running, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path / "keys")
    assert main(["keys", "--folder", folder]) == 1
    assert "exists and is not replaced" in capsys.readouterr().err
    assert main(["keys", "--folder", folder, "--client", "carol", "--tenant", "of alice"]) == 0
    assert f"{folder}/carol.key" in capsys.readouterr().out
    ask = ["stats", "--json", "--wait=1", "--address", running.address]
    assert main([*ask, "--keys", f"{folder}/carol.key"]) == 0
    assert '"model": "echo"' in capsys.readouterr().out
    monkeypatch.setenv("SPILLD_KEYS", f"{folder}/carol.key")
    assert main(ask) == 0
    assert '"model": "echo"' in capsys.readouterr().out
    monkeypatch.delenv("SPILLD_KEYS")
    assert main(ask) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--keys FILE" in said
    assert main(["keys", "--folder", str(tmp_path / "new")]) == 0
    assert f'`keys = "{tmp_path}/new"`' in capsys.readouterr().out


def test_token_by_token(running: Running, keys: Path) -> None:
    """Encrypted or not, the stream is the same."""
    with Client(running.address, keys=keys / "alice.key") as client:
        events = list(client.generate("a b c", max_tokens=500))
    assert [event.seq for event in events] == list(range(502))
    assert sum(isinstance(event, Token) for event in events) == 500
