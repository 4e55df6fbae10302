"""Attention over the pool on the fake device, in many orders of its work: the numbers are those of numpy."""

from __future__ import annotations

import contextlib

import pytest

from spilld.cuda_ext.errors import OutOfMemory

from .conftest import Emulate
from .emulator import Emulated
from .fake import FakeDevice
from .kernels import assert_close
from .tier import ATTEND, TOLERANCE, Step, problem


@pytest.fixture(scope="module")
def image(emulate: Emulate) -> Emulated:
    return emulate(ATTEND.source, dict(ATTEND.defines))


def attend(device: FakeDevice, image: Emulated) -> None:
    shape = {"threads": ATTEND.threads, "shared_bytes": ATTEND.shared_bytes}
    step = Step(device, device.load(image, ATTEND.name, **shape))
    records = problem()
    assert_close(step.attend(records), records.oracle(), TOLERANCE)
    step.close()


@pytest.mark.parametrize("seed", range(6))
def test_attention_over_the_pool(image: Emulated, seed: int) -> None:
    device = FakeDevice(seed)
    attend(device, image)
    device.assert_empty()


def test_memory_that_ends_on_the_way_spoils_no_number(image: Emulated) -> None:
    device = FakeDevice(9)
    attend(device, image)
    done = 0
    for n in range(1, device.calls):
        with contextlib.suppress(OutOfMemory):
            attend(FakeDevice(9, fail_at=n), image)
            done += 1
    assert 0 < done < device.calls - 1  # an event that cannot be recorded now is recorded later
