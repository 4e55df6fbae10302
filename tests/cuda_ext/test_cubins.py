"""Kernels that are compiled ahead of time, for the wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from spilld.cuda_ext import build
from spilld.daemon import cubins
from spilld.offload.record import SEALED, Element, Format, Layout


def test_shipped_kernels_are_all_that_a_model_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cubins"
    monkeypatch.setattr(build, "SHIPPED", folder)
    monkeypatch.setattr(build, "_compile", lambda variant, architecture: variant.name.encode())
    folder.mkdir()
    (folder / "of yesterday").touch()
    layout = Layout(Format.INT4, Element.BFLOAT16, 3, 64)
    paths = cubins.ship([layout], ["sm_80", "sm_90"])
    assert len(set(paths)) == 14
    assert set(folder.iterdir()) == set(paths)
    monkeypatch.setattr(build, "_compile", None)
    for kernel in cubins.kernels(layout):
        assert build.cubin(kernel, "sm_90", tmp_path / "cache") == kernel.name.encode()
    assert not (tmp_path / "cache").exists()


def test_known_models_have_every_format_once() -> None:
    layouts = list(cubins.known())
    assert len(set(layouts)) == len(layouts) == len(SEALED) * len(cubins.SHAPES)
