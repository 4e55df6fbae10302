"""Kernels that are compiled ahead of time, for the wheel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spilld.cli import cubins
from spilld.cuda_ext.compile import build
from spilld.cuda_ext.compile.variant import KERNELS, Variant
from spilld.cuda_ext.device.base import Stream
from spilld.cuda_ext.device.cpu import CpuDevice
from spilld.cuda_ext.flash import Flash
from spilld.cuda_ext.memory.windows import KVWindowShape
from spilld.cuda_ext.ops import Ops
from spilld.offload.record import (
    SEALED,
    Element,
    Format,
    Layout,
)


class Unused:
    def launch(self, stream: Stream, grid: tuple[int, int, int], *arguments: int | float) -> None:
        raise AssertionError


@pytest.mark.parametrize("form", SEALED)
def test_shipped_kernels_are_those_that_a_model_launches(form: Format) -> None:
    layout = Layout(form, Element.BFLOAT16, 3, 64)
    shape = KVWindowShape.uniform(tokens=576, layers=2, kv_heads=3, head_dim=64, dtype=torch.bfloat16)
    loaded: set[Variant] = set()

    def load(kernel: Variant) -> Unused:
        loaded.add(kernel)
        return Unused()

    Ops(load, layout.constants, shape, 9)
    Flash(CpuDevice(), load, layout.constants, shape, 9)
    assert set(cubins.kernels(layout)) == loaded


def test_what_is_shipped_is_found_and_nothing_else_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cubins"
    monkeypatch.setattr(build, "SHIPPED", folder)
    monkeypatch.setattr(build, "_compile", lambda variant, architecture: variant.name.encode())
    folder.mkdir()
    (folder / "of yesterday").touch()
    layout = Layout(Format.INT4, Element.BFLOAT16, 3, 64)
    paths = cubins.ship([layout], ["sm_80", "sm_90"])
    assert len(set(paths)) == 12
    assert set(folder.iterdir()) == {*paths, folder / build.COMPILER}
    assert (folder / build.COMPILER).read_text() == build.compiler()
    monkeypatch.setattr(build, "_compile", None)
    for kernel in cubins.kernels(layout):
        assert build.cubin(kernel, "sm_90", tmp_path / "cache") == kernel.name.encode()
    assert not (tmp_path / "cache").exists()


def test_what_is_shipped_is_all_of_one_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cubins"
    monkeypatch.setattr(build, "SHIPPED", folder)
    for release in ("13.0.88", "13.0.88", "13.5.37"):
        monkeypatch.setattr(build, "version", lambda name, release=release: release)
        monkeypatch.setattr(
            build, "_compile", lambda variant, architecture, release=release: release.encode()
        )
        paths = cubins.ship([Layout(Format.INT4, Element.BFLOAT16, 3, 64)], ["sm_80"])
        assert {path.read_text() for path in (*paths, folder / build.COMPILER)} == {release}


def test_known_models_have_every_format_once() -> None:
    layouts = list(cubins.known())
    assert len(set(layouts)) == len(layouts) == len(SEALED) * len(cubins.SHAPES)


def test_every_kernel_is_one_that_a_model_launches() -> None:
    launched = {kernel.name for layout in cubins.known() for kernel in cubins.kernels(layout)}
    assert {path.stem for path in KERNELS.glob("*.cu")} == launched
