"""Flash attention on the fake device, in many orders of its work."""

from __future__ import annotations

import contextlib

import pytest

from spilld.cuda_ext.errors import OutOfMemory
from spilld.offload.record import Format

from .conftest import Emulate, loader
from .fake import FakeDevice
from .flash import check
from .numbers import Number


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("form", "number"),
    [
        (Format.EXACT, Number.FLOAT32),
        (Format.INT4, Number.FLOAT32),
        (Format.K8V4, Number.BFLOAT16),
    ],
)
def test_flash_is_the_softmax(form: Format, number: Number, seed: int, emulate: Emulate) -> None:
    device = FakeDevice(seed)
    check(device, loader(device, emulate), form, number)


def test_memory_that_ends_on_the_way_spoils_no_number(emulate: Emulate) -> None:
    device = FakeDevice(9)
    check(device, loader(device, emulate), Format.EXACT, Number.FLOAT32)
    done = 0
    for n in range(1, device.calls):
        again = FakeDevice(9, fail_at=n)
        with contextlib.suppress(OutOfMemory):
            check(again, loader(again, emulate), Format.EXACT, Number.FLOAT32)
            done += 1
    assert 0 < done < device.calls - 1
