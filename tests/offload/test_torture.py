"""kill -9 at any call, in any transaction, at any moment: what was promised is there, nothing else is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

TORTURE = Path(__file__).with_name("torture.py")


def lives(folder: Path, seed: int, count: int, *options: str) -> list[dict[str, Any]]:
    """The checks that were made in so many lives in one folder."""
    command = [sys.executable, str(TORTURE), str(folder), str(seed), str(count), *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


def assert_not_idle(checks: list[dict[str, Any]], count: int) -> None:
    """Many lives ended in a death, and there was something to lose."""
    assert len(checks) > count // 4
    assert sum(check["signal"] != 0 for check in checks) > len(checks) // 4
    assert sum(check["runs"] for check in checks) > len(checks)
    assert any(check["served"] for check in checks)
    assert any(check["moves"] for check in checks)


@pytest.mark.parametrize("options", [(), ("instants",)], ids=["calls", "instants"])
def test_a_store_that_is_killed_keeps_what_it_promised(tmp_path: Path, options: tuple[str, ...]) -> None:
    assert_not_idle(lives(tmp_path / "kv", 7, 20, *options), 20)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("options", [(), ("instants",)], ids=["calls", "instants"])
def test_a_store_that_is_killed_often(tmp_path: Path, seed: int, options: tuple[str, ...]) -> None:
    checks = lives(tmp_path / "kv", 100 + seed, 30, *options)
    assert_not_idle(checks, 30)
    if not options:
        assert len(Counter(check["died"] for check in checks)) > 4, "it always died alike"
