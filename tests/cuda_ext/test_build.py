"""Compiling kernels: the cache, and errors in words that help."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from spilld.cuda_ext.compile import build, variant

MADE = variant.rotate(64)


def version_of(installed: str | None) -> Callable[[str], str]:
    """What packages say of themselves where this NVRTC is installed; None: none is."""

    def version(name: str) -> str:
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    return version


def test_the_second_time_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.cubin(MADE, "sm_80", tmp_path)
    assert first[:4] == b"\x7fELF"
    monkeypatch.setattr(build, "_compile", None)
    assert build.cubin(MADE, "sm_80", tmp_path) == first
    assert [path.parent.name for path in tmp_path.rglob("*.cubin")] == [f"nvrtc-{build.compiler()}"]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of CUBINs that came with spilld: of MADE for sm_80, by an NVRTC that is nowhere now."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / build.name_of(MADE, "sm_80")).write_bytes(b"machine code")
    (folder / build.COMPILER).write_text("13.5.37")
    monkeypatch.setattr(build, "SHIPPED", folder)
    monkeypatch.setattr(build, "_compile", lambda variant, architecture: b"compiled")
    return folder


def test_what_was_shipped_is_not_compiled(shipped: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert build.cubin(MADE, "sm_80", cache) == b"machine code"
    assert not cache.exists()
    assert build.cubin(MADE, "sm_90", cache) == b"compiled"


@pytest.mark.parametrize("installed", ["13.0.88", None])
def test_what_was_shipped_serves_beside_any_compiler(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str | None
) -> None:
    monkeypatch.setattr(build, "version", version_of(installed))
    assert build.cubin(MADE, "sm_80", tmp_path / "cache") == b"machine code"


def test_what_was_shipped_of_another_source_is_compiled(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "kernels"
    shutil.copytree(variant.KERNELS, sources)
    monkeypatch.setattr(variant, "KERNELS", sources)
    monkeypatch.setattr(build, "KERNELS", sources)
    assert build.cubin(MADE, "sm_80", tmp_path / "cache") == b"machine code"
    for path in (MADE.source, next(sources.glob("*.cuh"))):
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        assert build.cubin(MADE, "sm_80", tmp_path / "cache") == b"compiled"
        path.write_bytes(before)


def test_what_an_older_compiler_made_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for release in (b"13.0.88", b"13.5.37"):
        monkeypatch.setattr(build, "version", version_of(release.decode()))
        monkeypatch.setattr(build, "_compile", lambda variant, architecture, code=release: code)
        assert build.cubin(MADE, "sm_80", tmp_path) == release


def test_what_the_code_depends_on_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {build.recipe(MADE, "sm_80"), build.recipe(MADE, "sm_90")}
    names.add(build.recipe(variant.rotate(96), "sm_80"))
    monkeypatch.setattr(build, "OPTIONS", ("c++20",))
    names.add(build.recipe(MADE, "sm_80"))
    assert len(names) == 4


def test_a_kernel_that_the_compiler_refuses(tmp_path: Path) -> None:
    made = variant.attend_window(16, 64)
    wrong = replace(
        made, defines=(*(pair for pair in made.defines if pair[0] != "SHARED_BYTES"), ("SHARED_BYTES", 1))
    )
    with pytest.raises(build.KernelRejected, match=r"variant\.py counts the same"):
        build.cubin(wrong, "sm_80", tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "version", version_of(None))
    with pytest.raises(build.CompilerMissing, match=r"pip install 'spilld\[cuda\]'"):
        build.cubin(variant.rotate(64), "sm_80", tmp_path)


@pytest.mark.parametrize(("driver", "refused"), [(12090, True), (13000, False), (14000, False)])
def test_driver(monkeypatch: pytest.MonkeyPatch, driver: int, refused: bool) -> None:
    monkeypatch.setattr(build, "_driver_version", lambda: driver)
    if refused:
        with pytest.raises(build.DriverTooOld, match=r"is of CUDA 12\.9; kernels need one of CUDA 13\.0"):
            build.check_driver()
    else:
        build.check_driver()


@pytest.mark.parametrize("release", ["13.0.88", "13.5.37", "14.0.1"])
def test_a_driver_must_take_what_was_shipped_and_what_is_compiled(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    monkeypatch.setattr(build, "_driver_version", lambda: 13000)
    for shipped_by, installed in ((release, "13.0.88"), (release, None), ("13.0.88", release)):
        (shipped / build.COMPILER).write_text(shipped_by)
        monkeypatch.setattr(build, "version", version_of(installed))
        if release == "14.0.1":
            with pytest.raises(build.DriverTooOld, match=r"kernels need one of CUDA 14\.0"):
                build.check_driver()
        else:
            build.check_driver()
