"""What attending to a record costs, measured on the fake device: every rate comes, and nothing stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spilld.attention.device.costs import measure
from spilld.cuda_ext.flash import Flash
from spilld.cuda_ext.memory.windows import KVWindowShape
from spilld.cuda_ext.ops import Ops
from spilld.offload.kernels.attention.partial import Partial
from spilld.offload.record import Element, Format, Layout

from ..cuda_ext.conftest import Emulate, emulate, loader
from ..cuda_ext.fake import FakeDevice
from .fake_device import WARPS

__all__ = ["emulate"]


@pytest.mark.parametrize("prompts", [False, True])
def test_every_rate_comes(prompts: bool, emulate: Emulate) -> None:
    device, layout = FakeDevice(3), Layout(Format.K8V4, Element.FLOAT32, 1, 64)
    shape = KVWindowShape.uniform(tokens=64, layers=1, kv_heads=1, head_dim=64, dtype=torch.float32)
    load = loader(device, emulate)
    ops = Ops(load, layout.constants, shape, 2, warps=WARPS)
    flash = Flash(device, load, layout.constants, shape, 2, tile=3) if prompts else None
    held = device.used_bytes
    costs = measure(device, ops, flash, layout, records=7)
    assert min(costs.one.fetch_bytes, costs.many.cpu_bytes, costs.copy_bytes) > 0
    assert (costs.flash_bytes > 0) == prompts
    assert device.used_bytes == held
    assert not list(device.registered)


def test_what_is_timed_is_not_zeros(emulate: Emulate, monkeypatch: pytest.MonkeyPatch) -> None:
    device, layout = FakeDevice(3), Layout(Format.K8V4, Element.FLOAT32, 1, 64)
    shape = KVWindowShape.uniform(tokens=64, layers=1, kv_heads=1, head_dim=64, dtype=torch.float32)
    ops = Ops(loader(device, emulate), layout.constants, shape, 2, warps=WARPS)
    real, seen = Partial.attend, 0

    def attend(self: Partial, q: Any, memory: Any, places: Any, *rest: Any) -> None:
        nonlocal seen
        seen = max(seen, len(places))
        assert (q != 0).all()
        assert memory[: 5 * layout.record_bytes].reshape(5, -1).any(axis=1).all()
        real(self, q, memory, places, *rest)

    monkeypatch.setattr(Partial, "attend", attend)
    measure(device, ops, None, layout, records=5)
    assert seen == 5
