"""Compiling kernels: the cache, and errors in words that help."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from spilld.cuda_ext import build, variant


def test_the_second_time_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = variant.move_records(128)
    first = build.cubin(made, "sm_80", tmp_path)
    assert first[:4] == b"\x7fELF"
    monkeypatch.setattr(build, "_compile", None)
    assert build.cubin(made, "sm_80", tmp_path) == first
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_shipped_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, shipped, cache = variant.move_records(128), tmp_path / "shipped", tmp_path / "cache"
    monkeypatch.setattr(build, "SHIPPED", shipped)
    shipped.mkdir()
    (shipped / build.name_of(made, "sm_80")).write_bytes(b"machine code")
    monkeypatch.setattr(build, "_compile", lambda variant, architecture: b"compiled")
    assert build.cubin(made, "sm_80", cache) == b"machine code"
    assert not cache.exists()
    assert build.cubin(made, "sm_90", cache) == b"compiled"
    monkeypatch.setattr(build, "version", lambda name: "0.0")
    assert build.cubin(made, "sm_80", cache) == b"compiled"


def test_what_the_code_depends_on_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = variant.move_records(128)
    names = {build.recipe(made, "sm_80"), build.recipe(made, "sm_90")}
    names.add(build.recipe(variant.move_records(192), "sm_80"))
    monkeypatch.setattr(build, "version", lambda name: "0.0")
    names.add(build.recipe(made, "sm_80"))
    monkeypatch.setattr(build, "KERNELS", tmp_path)
    names.add(build.recipe(made, "sm_80"))
    assert len(names) == 5


def test_a_kernel_that_the_compiler_refuses(tmp_path: Path) -> None:
    made = variant.attend_window(16, 64)
    wrong = replace(
        made, defines=(*(pair for pair in made.defines if pair[0] != "SHARED_BYTES"), ("SHARED_BYTES", 1))
    )
    with pytest.raises(build.KernelRejected, match=r"variant\.py counts the same"):
        build.cubin(wrong, "sm_80", tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(build, "version", missing)
    with pytest.raises(build.CompilerMissing, match=r"pip install 'spilld\[cuda\]'"):
        build.cubin(variant.move_records(128), "sm_80", tmp_path)


@pytest.mark.parametrize(("driver", "refused"), [(12090, True), (13000, False), (14000, False)])
def test_driver(monkeypatch: pytest.MonkeyPatch, driver: int, refused: bool) -> None:
    monkeypatch.setattr(build, "_driver_version", lambda: driver)
    if refused:
        with pytest.raises(build.DriverTooOld, match=r"is of CUDA 12\.9; kernels need one of CUDA 13\.0"):
            build.check_driver()
    else:
        build.check_driver()
