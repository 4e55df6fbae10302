"""Every kernel over the matrix of cases.py, under the emulator's detector."""

from __future__ import annotations

import pytest
from _pytest.mark import ParameterSet

from .cases import Case, cases
from .conftest import Emulate


def marked(case: Case) -> ParameterSet:
    return pytest.param(case, id=case.name, marks=() if case.always else pytest.mark.slow)


@pytest.mark.parametrize("case", [marked(case) for case in cases()])
def test_kernel(emulate: Emulate, case: Case) -> None:
    case.check(emulate(case.variant.source, dict(case.variant.defines)))
