"""The house: what lies in which room, and which rooms it may import, as each room's `__init__` says."""

from __future__ import annotations

import ast
import builtins
import collections.abc
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = {"daemon": "spilld", "offload": "spilld.offload", "cuda_ext": "spilld.cuda_ext"}
MOST_FILES = 10

HEAVY = ["torch", "numpy", "numba", "transformers", "xxhash", "prometheus_client"]
LIGHT_ROOMS = ("client", "protocol", "auth", "transport", "cli.commands")
LIGHT = ["__main__", "errors", "config.config", "config.settings", "server.server"]
LIGHT += ["cli.tables", "cli.top", "cli.conversation"]


def dotted(path: Path) -> str:
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([TOPS[top], *rest]).removesuffix(".__init__")


SOURCES = {dotted(path): path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))}
ROOMS = {name: path.parent for name, path in SOURCES.items() if path.name == "__init__.py"}
LIGHT += [name.removeprefix("spilld.") for room in LIGHT_ROOMS for name in SOURCES if f".{room}." in name]


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of spilld that a module imports, wherever in it."""
    return frozenset(_imports(module, ast.parse(SOURCES[module].read_text())))


def _imports(module: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            inner = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in SOURCES else base for name in inner]
        else:
            continue
        for name in names:
            assert name.split(".")[0] not in ("daemon", "offload", "cuda_ext"), (
                f"{module}: {name} would be a second module; it is spilld's"
            )
            if name.split(".")[0] == "spilld":
                assert name in SOURCES, f"{module} imports {name}, which is not there"
                yield name


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    assert node.level == 1, f"{module}: across rooms imports are absolute"
    package = module if module in ROOMS else module.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package


def room(module: str) -> str:
    """The room a module is in; each module beside the rooms is by itself."""
    inside = module if module in ROOMS else module.rpartition(".")[0]
    return module if inside in TOPS.values() else inside


def may_import(name: str) -> list[str]:
    described = ast.get_docstring(ast.parse(SOURCES[name].read_text())) or ""
    found = re.search(r"^May import: (.*)\.$", described, re.MULTILINE | re.DOTALL)
    assert found, f"{name}: its __init__ says which rooms it may import"
    words = found[1].split()
    return [] if words == ["nothing"] else [word.strip(",") for word in words]


INNER = [name for name in ROOMS if name not in TOPS.values()]


@pytest.mark.parametrize("name", INNER)
def test_a_room_imports_what_it_says(name: str) -> None:
    allowed = may_import(name)
    used = set()
    for module in SOURCES:
        if room(module) != name:
            continue
        for imported in imports(module):
            parts = imported.split(".")[1:]
            ways = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
            assert room(imported) == name or ways & set(allowed), f"{module} must not import {imported}"
            used |= ways & set(allowed)
    assert used == set(allowed), "it uses what it says, all of it"


@pytest.mark.parametrize("top", ["spilld.offload", "spilld.cuda_ext"])
def test_below_the_daemon(top: str) -> None:
    for module in SOURCES:
        if module.startswith(top):
            for imported in imports(module):
                assert imported.startswith(top), f"{module} must not import {imported}"


def test_rooms_have_an_order() -> None:
    graph: dict[str, set[str]] = {}
    for module in SOURCES:
        graph.setdefault(room(module), set()).update(map(room, imports(module)))
    for name, others in graph.items():
        others.discard(name)
    assert list(TopologicalSorter(graph).static_order()), "or CycleError names the rooms"


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_can_be_overlooked(name: str) -> None:
    assert len(set(ROOMS[name].glob("*.py")) - {ROOMS[name] / "__init__.py"}) <= MOST_FILES


def test_no_two_classes_share_a_name() -> None:
    names: dict[str, list[str]] = {}
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(module)
    assert {name: where for name, where in names.items() if len(where) > 1} == {}
    assert not set(names) & {*vars(collections.abc), *vars(builtins)}, "nor do they shadow Python's own"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    script = (
        f"import json, sys; import spilld.{module};"
        f"print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert json.loads(out) == []


def test_every_room_is_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(ROOMS)


def test_kernels_are_where_their_rules_hold() -> None:
    """mypy's exception for numba's decorators, and the cache of compiled kernels, are of one folder."""
    for module, path in SOURCES.items():
        if re.search(r"^(?:from|import) (?:numba|llvmlite)\b", path.read_text(), re.MULTILINE):
            assert module.startswith("spilld.offload.kernels.") or module in NUMBA_ELSEWHERE, module


NUMBA_ELSEWHERE = ("spilld.assembly", "spilld.runner.prepare_kernels")


def test_links_for_checkers() -> None:
    links = ROOT / "tests/typings/spilld"
    entries = {path.name for path in (ROOT / "daemon").iterdir() if path.is_file() or any(path.glob("*.py"))}
    assert {path.name for path in links.iterdir()} - {"__pycache__"} == entries | {"offload", "cuda_ext"}
    assert all(path.exists() for path in links.iterdir())


def lives_there(name: str) -> str:
    """What a room's `__init__` says of it, in one line."""
    described = ast.get_docstring(ast.parse(SOURCES[name].read_text())) or ""
    return " ".join(described.partition("\n\n")[0].split())


def test_the_page_agrees_with_the_rooms() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| `([a-z_.]+)` \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    told = {f"spilld.{name}": (what, [] if may == "nothing" else may.split(", ")) for name, what, may in rows}
    assert told == {name: (lives_there(name), may_import(name)) for name in INNER}


def test_the_glossary_is_short() -> None:
    words = (ROOT / "ARCHITECTURE.md").read_text().partition("\n## Words\n")[2]
    rows = re.findall(r"^\| (\w[\w ]*) \| (.+) \|$", words, re.MULTILINE)[1:]
    assert 10 < len(rows) <= 30
    assert len({word for word, _ in rows}) == len(rows)
