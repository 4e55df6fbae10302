"""`spilld check`: what lies on disk is verified while no daemon runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spilld.__main__ import main
from spilld.models.model import Model

from .harness import engine, shared, some_tokens

PROMPT = some_tokens(1, 1400)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@pytest.fixture
def state(model: Model, tmp_path: Path) -> Path:
    """A folder that a daemon has left behind, with a session in it."""
    with engine(model, tmp_path / "s", keep_state=True) as harness:
        harness.ask(PROMPT, session="s", max_tokens=4)
    return tmp_path / "s"


def check(state: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = main(["check", f"--state={state}", "--json", *options])
    return status, json.loads(capsys.readouterr().out)


def damage(state: Path, offset: int) -> None:
    segment = next((state / "kv").glob("*.segment"))
    content = bytearray(segment.read_bytes())
    content[offset] ^= 0x10
    segment.write_bytes(content)


def test_a_clean_store(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = check(state, capsys=capsys)
    assert (status, report["clean"], report["damaged"], report["lost"]) == (0, True, [], [])
    assert report["runs"] >= 2, "blocks and a tail"
    assert report["extents"] == 2 * report["runs"], "one a layer"
    sizes = sum(file.stat().st_size for file in (state / "kv").glob("*.segment"))
    assert report["run_bytes"] + report["orphan_bytes"] == sizes


def test_damage_is_found_then_forgotten_then_computed_again(
    state: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(state, 5000)
    for options, status in (((), 1), (("--repair",), 1), ((), 0)):
        found, report = check(state, *options, capsys=capsys)
        assert (found, report["clean"]) == (status, not status)
        assert len(report["damaged"]) == status
        assert all("wrong checksum" in line for line in report["damaged"])
    with engine(model, tmp_path / "a") as harness:
        wanted = harness.ask(PROMPT, max_tokens=9)
    with engine(model, state) as harness:
        assert harness.ask(PROMPT, max_tokens=9) == wanted


def test_what_is_said_to_people(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"--state={state}"]) == 0
    assert "clean" in capsys.readouterr().out
    damage(state, 5000)
    assert main(["check", f"--state={state}"]) == 1
    said = capsys.readouterr().out
    assert "wrong checksum" in said
    assert "DAMAGED" in said


def test_bytes_that_are_gone(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for segment in (state / "kv").glob("*.segment"):
        segment.write_bytes(segment.read_bytes()[:4096])
    status, report = check(state, capsys=capsys)
    assert status == 1
    assert len(report["lost"]) == report["runs"] > 0


def test_an_index_that_is_no_database(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("-wal", "-shm"):
        (state / "kv" / f"index.sqlite{suffix}").unlink(missing_ok=True)
    (state / "kv" / "index.sqlite").write_bytes(b"x" * 8192)
    status, report = check(state, capsys=capsys)
    assert status == 1
    assert report["index"]


def test_a_folder_in_use_or_absent(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with engine(model, tmp_path / "s"):
        assert main(["check", f"--state={tmp_path / 's'}"]) == 1
        assert "in use by another daemon; stop the daemon" in capsys.readouterr().err
    assert main(["check", f"--state={tmp_path / 'nowhere'}"]) == 1
    assert "there is no store" in capsys.readouterr().err
