"""Sessions that move between daemons as files: over sockets, by both clients and the command line."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spilld import AsyncClient, Client, Token
from spilld.__main__ import main
from spilld.client.query import ask
from spilld.demo.spawn import Spawned
from spilld.errors import (
    ContextNotFound,
    CorruptArchive,
    InvalidRequest,
    TransferNotFound,
    Unreachable,
)
from spilld.models.model import Model
from spilld.protocol.messages import (
    ExportSession,
    OpenTransfer,
    ReadTransfer,
    Transfer,
    WriteTransfer,
)

from .forked import spawned
from .harness import shared, some_tokens

FIELDS: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
PROMPT, MORE = some_tokens(1, 3000), some_tokens(2, 300)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


def settings(model: Model, state: Path) -> dict[str, object]:
    return {
        "model": model.folder,
        "cache": model.folder / "cache",
        "state": state,
        "dtype": "float32",
        "format": "exact",
        "threads": 1,
    }


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def running(model: Model, state: Path) -> Iterator[Spawned]:
    with spawned(settings(model, state)) as process:
        yield process


@pytest.fixture
def client(running: Spawned) -> Iterator[Client]:
    with Client(running.address, tenant="mine") as client:
        if not any(info.name == "s" for info in client.sessions()):
            client.generate(PROMPT, session="s", **FIELDS).text()
        yield client


def answer(client: Client, session: str) -> tuple[list[int], int]:
    """Tokens, and how many of the session's needed no prefill."""
    stream = client.generate(MORE, session=session, **FIELDS)
    return [event.token for event in stream if isinstance(event, Token)], stream.result.usage.cached_tokens


@pytest.fixture(scope="module")
def wanted(running: Spawned) -> list[int]:
    with Client(running.address, tenant="elsewhere") as client:
        client.generate(PROMPT, session="s", **FIELDS).text()
        return answer(client, "s")[0]


def test_a_client(client: Client, running: Spawned, wanted: list[int], state: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    exported = client.export_session("s", file)
    assert (exported.tokens, exported.cached_tokens) == (3008, 3007)
    assert file.stat().st_size == exported.nbytes
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with Client(running.address, tenant="another") as other:
        imported = other.import_session(file, "new")
        assert (imported.session.name, imported.cached_tokens, imported.note) == ("new", 3007, "")
        assert [info.name for info in other.sessions()] == ["new"]
        assert answer(other, "new") == (wanted, 3007)
    assert list((state / "transfers").iterdir()) == []


def test_an_async_client(client: Client, running: Spawned, wanted: list[int], tmp_path: Path) -> None:
    file = tmp_path / "file"

    async def move() -> None:
        async with AsyncClient(running.address, tenant="mine") as first:
            exported = await first.export_session("s", file)
            assert file.stat().st_size == exported.nbytes
        async with AsyncClient(running.address, tenant="async") as second:
            assert (await second.import_session(file, "new")).cached_tokens == 3007
            with pytest.raises(InvalidRequest, match="there is a session 'new' already"):
                await second.import_session(file, "new")

    asyncio.run(move())
    with Client(running.address, tenant="async") as second:
        assert answer(second, "new") == (wanted, 3007)


def test_the_command_line(client: Client, running: Spawned, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "file"
    mine = ("--address", running.address, "--tenant", "mine")
    theirs = ("--address", running.address, "--tenant", "theirs")
    assert main(["sessions", *mine, "export", "s", str(file)]) == 0
    assert "3,008 tokens, the KV of 3,007" in capsys.readouterr().out.replace("\n", "")
    assert main(["sessions", *theirs, "import", str(file), "new"]) == 0
    assert "new: 3,008 tokens, 3,007 need not be computed" in capsys.readouterr().out
    for command in (["export", "s", str(file)], ["import", str(file), "s"]):
        assert main(["sessions", *mine, *command]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_what_fails_leaves_no_file(client: Client, running: Spawned, state: Path, tmp_path: Path) -> None:
    with pytest.raises(ContextNotFound):
        client.export_session("unknown", tmp_path / "file")
    with pytest.raises(InvalidRequest, match="name a new file"):
        client.export_session("s", tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CorruptArchive, match="cannot read"):
        client.import_session(tmp_path / "file", "new")
    bad = tmp_path / "bad"
    for content in (b"", b"SPILLARC", os.urandom(5_000_000)):
        bad.write_bytes(content)
        with pytest.raises(CorruptArchive, match="no whole archive of a session"):
            client.import_session(bad, "new")
    assert [info.name for info in client.sessions()] == ["s"]
    assert list((state / "transfers").iterdir()) == []


def files(state: Path) -> list[Path]:
    return list((state / "transfers").iterdir())


def test_killed_while_it_is_built(model: Model, tmp_path: Path) -> None:
    """Half an export and half of what was sent are gone after a restart, and were never a session."""
    with spawned(settings(model, tmp_path)) as process, Client(process.address) as client:
        client.generate(PROMPT, session="s", **FIELDS).text()
        begun = client._run(ask(OpenTransfer(request_id="o", nbytes=9), Transfer, 10.0))
        half = WriteTransfer(request_id="w", transfer=begun.transfer, offset=0, data=b"half")
        client._run(ask(half, Transfer, 10.0))
        client._start(ExportSession(request_id="e", session="s"), None)
        give_up = time.monotonic() + 30
        while len(files(tmp_path)) < 2:
            assert time.monotonic() < give_up, "no export began"
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(Unreachable):
            client.hello()
    assert len(files(tmp_path)) == 2
    assert main(["check", f"--state={tmp_path}"]) == 0
    with spawned(settings(model, tmp_path)) as process, Client(process.address) as client:
        assert files(tmp_path) == []
        assert [info.name for info in client.sessions()] == ["s"]
        with pytest.raises(TransferNotFound):
            client._run(ask(ReadTransfer(request_id="r", transfer=begun.transfer, offset=0), Transfer, 10.0))
