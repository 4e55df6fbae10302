"""`pip install spilld` without the extra `engine`: the wheel in a venv that has nothing but what it requires.

No index is asked: what the base requires is copied from here, and pip finds it there or fails.
"""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from spilld import Client
from spilld.demo.spawn import Spawned
from spilld.models.model import Model

from .harness import daemon, shared

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "daemon", "offload", "cuda_ext")
QUIETLY = ("--disable-pip-version-check", "--no-index", "-q")
TALK = """
import importlib.util, json, sys
from spilld import Client, Token

with Client(sys.argv[1]) as client:
    generation = client.generate("Once upon a time", max_tokens=12, ignore_eos=True)
    pieces = [event.text for event in generation if isinstance(event, Token)]
    said = {"pieces": pieces, "text": generation.result.text, "stats": client.stats()}
heavy = ("torch", "numpy", "numba", "transformers", "xxhash", "prometheus_client")
said["heavy"] = [name for name in heavy if importlib.util.find_spec(name)]
print(json.dumps(said))
"""


@dataclass(frozen=True)
class Light:
    """A venv with the base of spilld."""

    folder: Path

    def run(self, command: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.folder / "bin" / command), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=self.folder,
            env=environment(),
            **options,
        )


def environment() -> dict[str, str]:
    """Without what would show another spilld to Python, and to pip."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def built(folder: Path) -> Path:
    """The wheel, built from a copy of the sources: the build leaves files beside them."""
    copy = folder / "sources"
    copy.mkdir()
    for source in SOURCES:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, copy / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, copy)
    pip("wheel", *QUIETLY, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, copy)
    (wheel,) = folder.glob("spilld-*.whl")
    return wheel


def pip(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], check=True, env=environment())


def needs(requirements: Iterable[str] | None) -> Iterator[Distribution]:
    """What is required without an extra, and what that requires, as it is installed here."""
    for requirement in map(Requirement, requirements or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found = distribution(requirement.name)
            yield found
            yield from needs(found.requires)


def copy(needed: Distribution, site: Path) -> None:
    for file in needed.files or ():
        if ".." not in file.parts:  # commands
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), site / file)


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Light:
    folder = tmp_path_factory.mktemp("light")
    wheel, venv = built(folder), folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        required = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    for needed in needs(required):
        copy(needed, site)
    pip("--python", venv / "bin/python", "install", *QUIETLY, "--no-compile", wheel)
    return Light(venv)


def test_the_wheel_holds_every_module(light: Light) -> None:
    """An editable install finds a room that pyproject.toml does not name; a wheel does not."""
    (installed,) = light.folder.glob("lib/python*/site-packages/spilld")
    for top, place in (("daemon", "."), ("offload", "offload"), ("cuda_ext", "cuda_ext")):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".md", ".cu", ".cuh", ".typed") and "__pycache__" not in path.parts:
                assert (installed / place / path.relative_to(ROOT / top)).is_file(), path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@pytest.fixture(scope="module")
def running(model: Model) -> Iterator[Spawned]:
    with daemon(model) as running:
        yield running


def test_it_talks_to_a_daemon(light: Light, running: Spawned, model: Model) -> None:
    done = light.run("python", "-c", TALK, running.address)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["heavy"] == []
    with Client(running.address) as client:
        here = client.generate("Once upon a time", max_tokens=12, ignore_eos=True).text()
    assert said["text"] == here
    assert "".join(said["pieces"]) == here
    assert len(said["pieces"]) > 1, "it came as it was made"
    assert said["stats"]["host_budget_bytes"] == 2 << 30


def test_its_commands_work(light: Light, running: Spawned, model: Model) -> None:
    address = f"--address={running.address}"
    asked = light.run("spilld", "ask", "--session=s", address, "-", "Why?", input="Text.")
    assert (asked.returncode, asked.stderr) == (0, "")
    listed = light.run("spilld", "sessions", address)
    assert re.search(r"^│ s +│", listed.stdout, re.MULTILINE), listed
    shown = light.run("spilld", "stats", "--json", address)
    assert json.loads(shown.stdout)["model"] == str(model.folder)
    watched = light.run("spilld", "top", "--once", "--every=0.1", address)
    assert "0 running" in watched.stdout, watched
    made = light.run("spilld", "keys", "--folder", light.folder / "keys")
    assert made.returncode == 0, made
    assert (light.folder / "keys/server.key").exists()


@pytest.mark.parametrize("command", ["serve", "demo", "check", "doctor"])
def test_what_runs_models_says_what_to_install(light: Light, command: str) -> None:
    ended = light.run("spilld", command)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(
        r"spilld: \w+ is not installed: this command runs models, which needs the extra `engine`; .*\n",
        ended.stderr,
    )
