"""Every kernel over the matrix of cases.py, on a GPU: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spilld.cuda_ext.compile.variant import Variant
from spilld.cuda_ext.device.cuda import CudaDevice
from spilld.cuda_ext.errors import LaunchFailed

from .cases import Case, cases
from .conftest import ERRORS
from .kernels import measured
from .on_gpu import OnGpu

pytestmark = pytest.mark.gpu

Load = Callable[[Variant], OnGpu]

LOST_BY = pytest.StashKey[str]()
"""The case after which a GPU refuses everything."""

BOUND = 1e-3
"""What a GPU's tensor cores and its exp2 may differ by; half of a number that was lost differs by more."""


@pytest.fixture(scope="module")
def device() -> Iterator[CudaDevice]:
    device = CudaDevice()
    yield device
    device.close()


@pytest.fixture
def load(device: CudaDevice, cache_folder: Path) -> Load:
    return lambda made: OnGpu(device, device.compiled(made, cache_folder / "cubins"))


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases()])
def test_kernel(case: Case, load: Load, request: pytest.FixtureRequest) -> None:
    stash = request.config.stash
    if lost := stash.get(LOST_BY, ""):
        pytest.skip(f"{lost} lost the GPU for this process")
    try:
        with measured(BOUND) as errors:
            case.check(load(case.variant))
    except LaunchFailed:
        stash[LOST_BY] = case.name
        raise
    stash[ERRORS].setdefault(case.variant.name, []).append(errors)
