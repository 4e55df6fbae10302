"""Whether the pinned versions install: `make pins`, which .ci/run runs.

pip resolves all that `make` installs against plain PyPI, whatever indexes, folders and constraints this
machine gives it, for every Python in pyproject.toml, and installs nothing; of wheels it reads no more
than the metadata. What it finds must be what constraints.txt pins: nobody shall get what was never tried.

python tests/pins.py PACKAGE...; these are model weights, which are installed without what they require.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIP = "26.3"
"""Before 23.3 pip downloads gigabytes for a dry run; and internals of this one are used."""
LIMIT_S = 300

PYTHON = re.compile(r"Programming Language :: Python :: (\d+\.\d+)")

# pip takes wheels for another Python with --python-version, but judges markers by its own.
ANOTHER = """
import sys
from pip._vendor.packaging import markers
asked, own = sys.argv.pop(1), markers.default_environment
markers.default_environment = lambda: {**own(), "python_version": asked, "python_full_version": asked + ".0"}
from pip._internal.cli.main import main
sys.exit(main())
"""


class DoesNotResolve(Exception):
    """These pins cannot be installed, or are not all; the message is pip's, or says what is amiss."""


class Resolver:
    """pip in a venv of its own, deaf to how this machine configures it once it is there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._python = str(folder / "bin/python")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([self._python, "-m", "pip", "install", "-q", f"pip=={PIP}"], check=True)
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        self._environment["PIP_CONFIG_FILE"] = os.devnull  # --isolated ignores all but the machine's files

    def here(self, *requirements: str) -> dict[str, str]:
        """What a user of this Python gets, as versions by name. Raises DoesNotResolve."""
        return self._resolve(["-m", "pip"], requirements)

    def on(self, version: str, *requirements: str) -> dict[str, str]:
        """The same for another Python; requirements must be wheels. Raises DoesNotResolve."""
        wheels = ["--python-version", version, "--only-binary=:all:", "--target", str(self._folder / "none")]
        return self._resolve(["-c", ANOTHER, version], [*wheels, *requirements])

    def _resolve(self, pip: list[str], requirements: Iterable[str]) -> dict[str, str]:
        report = self._folder / "report.json"
        report.unlink(missing_ok=True)
        options = ["--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--report", str(report)]
        command = [self._python, *pip, "--isolated", "install", *options, "-c", "constraints.txt"]
        done = subprocess.run(
            [*command, *requirements],
            cwd=ROOT,
            env=self._environment,
            timeout=LIMIT_S,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise DoesNotResolve(done.stdout[-2000:] + done.stderr)
        found = (entry["metadata"] for entry in json.loads(report.read_text())["install"])
        return {canonical(entry["name"]): entry["version"] for entry in found}


def canonical(name: str) -> str:
    """As PEP 503 compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonical(name): version for name, version in pairs}


def check(found: dict[str, str]) -> None:
    """Raises DoesNotResolve if a version is not the pinned one, or not pinned."""
    pinned = pins()
    others = [
        f"{name} {version} is not pinned" for name, version in found.items() if pinned.get(name) != version
    ]
    if others:
        raise DoesNotResolve("; ".join(others))


def resolved(resolver: Resolver, models: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """What is resolved for whom, one after another. Raises DoesNotResolve."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(one for extra in extras.values() for one in extra)]
    found = resolver.here(f".[{','.join(sorted(extras))}]")
    del found[project["name"]]
    yield "here", found
    yield "models", resolver.here("--no-deps", *models)
    for version in PYTHON.findall("\n".join(project["classifiers"])):
        yield f"Python {version}", resolver.on(version, *requirements)


def main(models: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        try:
            for title, found in resolved(Resolver(Path(folder)), models):
                check(found)
                print(f"{title}: {len(found)} packages, all of them pinned", flush=True)
        except DoesNotResolve as error:
            print(f"constraints.txt does not install from PyPI:\n{error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
