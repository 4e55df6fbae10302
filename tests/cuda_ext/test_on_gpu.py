"""The matrix as a GPU runs it: what it would catch there, and that it runs, over the fake driver."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from spilld.cuda_ext.compile import build, variant
from spilld.cuda_ext.device.base import Kernel
from spilld.cuda_ext.device.cpu import CpuDevice
from spilld.cuda_ext.errors import LaunchFailed

from . import compile_matrix, test_matrix_gpu
from .cases import cases
from .driver.process import run_tests
from .kernels import assert_near, frozen, measured
from .on_gpu import GUARD, OnGpu, WroteElsewhere

COUNT = 5


def at(address: int, count: int = COUNT) -> NDArray[np.float32]:
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


def doubles(grid: tuple[int, int, int], out: int, source: int) -> None:
    at(out)[:] = 2 * at(source)


def writes_one_more(grid: tuple[int, int, int], out: int, source: int) -> None:
    at(out, COUNT + 1)[:] = 1


def writes_one_before(grid: tuple[int, int, int], out: int, source: int) -> None:
    at(out - 4)[:] = 1


def writes_its_source(grid: tuple[int, int, int], out: int, source: int) -> None:
    at(source)[2] = 1


def kernel(function: object) -> Kernel:
    return CpuDevice().load({"it": function}, "it")  # type: ignore[dict-item]


def launched(function: object) -> NDArray[np.float32]:
    out, source = np.zeros(COUNT, np.float32), frozen(np.arange(COUNT, dtype=np.float32))
    OnGpu(CpuDevice(), kernel(function)).launch("it", (1, 1, 1), 32, 0, out, source)
    return out


def test_what_a_kernel_leaves_comes_back() -> None:
    np.testing.assert_array_equal(launched(doubles), [0, 2, 4, 6, 8])


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (writes_one_more, "changed 4 bytes that it may not, the first 20 bytes from the start of argument 0"),
        (writes_one_before, "changed 4 bytes that it may not, the first -4 bytes"),
        (writes_its_source, "the first 10 bytes from the start of argument 1"),
    ],
)
def test_a_kernel_that_writes_elsewhere(function: object, words: str) -> None:
    with pytest.raises(WroteElsewhere, match=words):
        launched(function)


def test_what_no_argument_covers_is_nan() -> None:
    seen: list[float] = []

    def looks(grid: tuple[int, int, int], out: int, source: int) -> None:
        seen.extend([at(out - GUARD)[0], at(out + 4 * COUNT)[0], at(source - 4)[0], at(source)[0]])

    launched(looks)
    assert np.isnan(seen).tolist() == [True, True, True, False]


def test_errors_are_noted_up_to_a_bound() -> None:
    wanted = np.array([1.0, np.nan, -np.inf])
    with measured(1e-3) as errors:
        assert_near(wanted + 1e-6, wanted, 2e-5)
        assert_near(wanted + 5e-4, wanted, 2e-5)
        assert (errors.beyond, round(errors.largest, 6)) == (1, 5e-4)
        with pytest.raises(AssertionError):
            assert_near(wanted + 2e-3, wanted, 2e-5)
        with pytest.raises(AssertionError):
            assert_near(np.nan_to_num(wanted), wanted, 2e-5)
    with pytest.raises(AssertionError):
        assert_near(wanted + 5e-4, wanted, 2e-5)


def test_what_a_lost_gpu_refuses_is_no_failure_of_the_next_kernel() -> None:
    def lost(_: variant.Variant) -> OnGpu:
        raise LaunchFailed("illegal address")

    first, second, *_ = cases()
    run = cast(pytest.FixtureRequest, SimpleNamespace(config=SimpleNamespace(stash=pytest.Stash())))
    with pytest.raises(LaunchFailed):
        test_matrix_gpu.test_kernel(first, lost, run)
    with pytest.raises(pytest.skip.Exception, match=f"{first.name} lost the GPU"):
        test_matrix_gpu.test_kernel(second, lost, run)


def test_kernels_are_compiled_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cuda.core")
    assert {case.variant for case in cases()} < set(compile_matrix.variants())
    made = [variant.rotate(head_dim) for head_dim in (64, 128)]
    monkeypatch.setattr(compile_matrix, "variants", lambda: made)
    monkeypatch.setattr(compile_matrix, "default_cache", lambda: tmp_path)
    compile_matrix.main()
    names = {path.name for path in (tmp_path / "cubins").rglob("*.cubin")}
    assert names == {build.name_of(each, compile_matrix.architecture()) for each in made}
    assert capsys.readouterr().out.startswith("== 2 kernels for sm_")


def test_the_matrix_over_the_fake_driver(cache_folder: Path) -> None:
    some = "merge-80 or rotate-80 or seal-int8-bfloat16-64 or int8-bfloat16-80-bounds"
    said = run_tests(Path(__file__).with_name("matrix_under_driver.py"), cache_folder, "-k", some)
    assert "4 passed" in said
    assert "attend_records: error " in said
