"""Kernels are compiled in a child, once for the same sources."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spilld.errors import ConfigError, InternalError
from spilld.offload.kernels.linear.forms import Form
from spilld.offload.record import Element, Format, Layout
from spilld.runner import prepare_kernels

LAYOUT = Layout(Format.EXACT, Element.FLOAT32, 1, 64)


def test_child_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    prepare_kernels.prepare(LAYOUT, 2, tmp_path, [Form.Q4_K], lambda *parts: told.append(parts))
    assert told == [(done, 9) for done in range(10)]
    (note,) = (tmp_path / "kernels").iterdir()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    prepare_kernels.prepare(LAYOUT, 2, tmp_path, [Form.Q4_K], lambda *parts: told.append(parts))
    assert len(told) == 10, "there is nothing to tell of"
    with pytest.raises(InternalError, match="cannot be compiled"):
        prepare_kernels.prepare(LAYOUT, 3, tmp_path, [Form.Q4_K])
    assert list((tmp_path / "kernels").iterdir()) == [note], "a failure is tried again"


def test_changed_sources_are_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[object] = []

    def run(command: object, **_: object) -> subprocess.CompletedProcess[str]:
        runs.append(command)
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(subprocess, "run", run)
    source = tmp_path / "kernel.py"
    source.write_text("")
    monkeypatch.setattr(prepare_kernels, "FOLDER", tmp_path)
    for text in ("", "changed"):
        prepare_kernels.prepare(LAYOUT, 2, tmp_path)
        prepare_kernels.prepare(LAYOUT, 2, tmp_path)
        source.write_text(text + "x")
        prepare_kernels.prepare(LAYOUT, 2, tmp_path)
    assert len(runs) == 3


def test_unwritable_cache_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare_kernels.prepare(LAYOUT, 2, tmp_path)
