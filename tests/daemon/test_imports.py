"""What may import what: a program that only talks to the daemon starts fast."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ["torch", "numpy", "numba", "transformers", "xxhash", "prometheus_client"]
LIGHT = ["__main__", "client", "protocol", "wire", "errors", "config", "server", "settings", "tables"]
LIGHT += [
    "top",
    "conversation",
    *(f"commands.{path.stem}" for path in (ROOT / "daemon/commands").glob("[a-z]*.py")),
]
ALLOWED = {"daemon": {"offload", "cuda_ext"}, "offload": set[str](), "cuda_ext": set[str]()}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    script = (
        f"import json, sys; import spilld.daemon.{module};"
        f"print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert json.loads(out) == []


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


@pytest.mark.parametrize("package", list(ALLOWED))
def test_direction(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] not in ALLOWED, (
                f"{path}: {name} would be a second module; use spilld.{name}"
            )
            if name.startswith("spilld"):
                assert name.split(".")[1] in ALLOWED[package], f"{path} must not import {name}"
