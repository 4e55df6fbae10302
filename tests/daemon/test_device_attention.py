"""Attention with the device tier on the fake device, in many orders of its work, against the same oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spilld.attention.base import Attention
from spilld.attention.device.gpu_attention import DeviceAttention
from spilld.cuda_ext.device.tensors import gpu_errors
from spilld.cuda_ext.errors import LaunchFailed, OutOfMemory
from spilld.cuda_ext.memory.staging import Staging
from spilld.cuda_ext.memory.windows import KVWindows, KVWindowShape
from spilld.kv.attention_span import MaskChunks
from spilld.kv.geometry import Geometry
from spilld.offload.record import Element, Format
from spilld.offload.store.store import Store

from ..cuda_ext.conftest import Emulate, emulate
from ..cuda_ext.fake import FakeDevice
from .elsewhere import GPU, Elsewhere, Gpu
from .fake_device import fake_tier
from .test_attention import Case, Tier, prepared

__all__ = ["emulate"]

CASES = [
    Case(777, 1, Format.EXACT, kv_heads=1, group=2),
    Case(777, 1, Format.K8V4, kv_heads=1, softcap=3.0),
    Case(777, 1, Format.INT4, kv_heads=1, window=300),
    Case(777, 1, Format.EXACT, kv_heads=1, group=2, window=300, sink_logits=True),
    Case(777, 1, Format.EXACT, kv_heads=1, window=MaskChunks(500)),
    Case(767, 3, Format.INT8, kv_heads=1, group=1, head_dim=80),
    Case(640, 200, Format.K8V4, kv_heads=1, group=2, element=Element.BFLOAT16),
    Case(500, 300, Format.EXACT, kv_heads=1, group=1, element=Element.BFLOAT16, disk=False),
]


PROMPTS = [
    Case(777, 60, Format.EXACT, kv_heads=1, group=2),
    Case(1000, 100, Format.K8V4, kv_heads=2, group=2, element=Element.BFLOAT16),
    Case(900, 40, Format.INT4, kv_heads=1, group=2, disk=False),
    Case(777, 20, Format.EXACT, kv_heads=1, softcap=3.0),
    Case(777, 20, Format.EXACT, kv_heads=1, window=300),
]
"""The last two are not for flash attention."""


def on(device: FakeDevice, emulate: Emulate, hot: int = 12, *, flash: bool = False) -> Tier:
    def tier(store: Store, shape: KVWindowShape, geometry: Geometry) -> tuple[KVWindows, Attention]:
        return fake_tier(device, emulate, store, shape, geometry, hot=hot, flash=flash)

    return tier


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_the_oracles(case: Case, tmp_path: Path, emulate: Emulate) -> None:
    device = FakeDevice(case.start + case.m)
    with prepared(case, tmp_path, on(device, emulate)) as setup:
        part = setup.part(case.start, case.m)
        found = setup.attend(part).double().numpy()
        tolerance = 2e-5 if case.element is Element.FLOAT32 and case.format is Format.EXACT else 2e-2
        assert np.abs(found - setup.expected()).max() < tolerance
    device.assert_empty()


@pytest.mark.parametrize("case", PROMPTS, ids=str)
def test_prompts_by_flash_attention_are_the_oracles(case: Case, tmp_path: Path, emulate: Emulate) -> None:
    device = FakeDevice(case.start + case.m)
    with prepared(case, tmp_path, on(device, emulate, flash=True)) as setup:
        computed = device.computed
        found = setup.attend(setup.part(case.start, case.m)).double().numpy()
        tolerance = 2e-5 if case.element is Element.FLOAT32 and case.format is Format.EXACT else 2e-2
        assert np.abs(found - setup.expected()).max() < tolerance
        assert (device.computed > computed) == (case not in PROMPTS[-2:])
    device.assert_empty()


def test_rows_of_a_decode_step(tmp_path: Path, emulate: Emulate) -> None:
    case, device = Case(777, 1, Format.K8V4, kv_heads=1, group=2), FakeDevice(1)
    with prepared(case, tmp_path, on(device, emulate)) as setup:
        setup.part(case.start, 1)
        q, k, v = torch.split(torch.cat([x[-1:] for x in (setup.q, setup.k, setup.v)], 1), [2, 1, 1], 1)
        out = setup.attention.forward(0, q, k, v, setup.plan)
        assert np.abs(out.numpy() - setup.expected()).max() < 2e-2


def test_what_the_device_has_is_not_read_from_disk(tmp_path: Path, emulate: Emulate) -> None:
    case, device = Case(777, 1, Format.EXACT, kv_heads=1), FakeDevice(4)
    with prepared(case, tmp_path, on(device, emulate, hot=5)) as setup:
        on_disk = {block for ref in setup.sequence.table.runs for block in ref.blocks}
        part = setup.part(case.start, case.m)
        found = setup.attend(part).double().numpy()
        assert np.abs(found - setup.expected()).max() < 2e-5
        size = case.layout.record_bytes
        assert on_disk == {2, 3, 4, 5, 6, 7}
        assert part.read_bytes["disk"] == 2 * size  # 1 to 5 are hot
        assert part.read_bytes["host"] == 0
    device.assert_empty()


def test_what_comes_from_a_gpu_goes_back_there(tmp_path: Path, emulate: Emulate) -> None:
    """And so do the zeros of a slice that has failed."""
    case, device = Case(300, 1, Format.EXACT, kv_heads=1, group=1, disk=False), FakeDevice(2)
    with prepared(case, tmp_path, on(device, emulate)) as setup, Gpu():
        wanted = setup.expected()
        setup.q, setup.k, setup.v = Elsewhere(setup.q), Elsewhere(setup.k), Elsewhere(setup.v)
        part = setup.part(case.start, 1)
        found = setup.attend(part)
        assert found.device == GPU
        assert np.abs(found.cpu().double().numpy() - wanted).max() < 2e-5
        part.failure = OutOfMemory("none")
        zeros = setup.attend(part)
        assert zeros.device == GPU
        assert not zeros.cpu().any()
    device.assert_empty()


@pytest.mark.parametrize(("hot", "first"), [(0, 1), (3, 4), (100, 7)])
def test_memory_that_ends_fails_a_call_or_changes_nothing(
    hot: int, first: int, tmp_path: Path, emulate: Emulate
) -> None:
    """A slice that fails leaves nothing behind: the same call gives the same later."""
    case, device = Case(640, 100, Format.K8V4, kv_heads=1, disk=False), FakeDevice(hot)
    with prepared(case, tmp_path, on(device, emulate, hot)) as setup:
        wanted, failed = setup.expected(), 0
        for n in range(first, 60, 9):
            part, device.fail_at = setup.part(case.start, case.m), device.calls + n
            found, device.fail_at = setup.attend(part).double().numpy(), 0
            if part.failure is not None:
                assert isinstance(part.failure, OutOfMemory)
                assert not found.any()
                failed += 1
            else:
                assert np.abs(found - wanted).max() < 2e-2
        assert failed
    device.assert_empty()


def test_memory_that_ends_between_tiles_fails_a_call_or_changes_nothing(
    tmp_path: Path, emulate: Emulate
) -> None:
    """Of flash attention, among others: whatever is half done, the same call gives the same again."""
    case, device = Case(900, 20, Format.K8V4, kv_heads=1, group=1, disk=False), FakeDevice(3)
    with prepared(case, tmp_path, on(device, emulate, 100, flash=True)) as setup:
        wanted, failed = setup.expected(), set[str]()
        for n in range(1, 26):
            setup.attention.forget(setup.sequence)
            part, device.fail_at = setup.part(case.start, case.m), device.calls + n
            found, device.fail_at = setup.attend(part), 0
            if part.failure is not None:
                failed.add(str(part.failure))
                found = setup.attend(setup.part(case.start, case.m))
            assert np.abs(found.double().numpy() - wanted).max() < 2e-2
        assert any("compute" in words for words in failed)
        assert any("copy" in words for words in failed)
    device.assert_empty()


def test_what_failed_no_longer_reads_host_memory(tmp_path: Path, emulate: Emulate) -> None:
    """What a call has fetched before it failed: the engine gives its records to others."""
    case, device = Case(768, 1, Format.EXACT, kv_heads=1, disk=False), FakeDevice(6, between=0)
    with prepared(case, tmp_path, on(device, emulate, 100)) as setup:
        wanted, records, fetched = setup.expected(), setup.store.memory, 0
        for n in range(2, 12):
            setup.attention.forget(setup.sequence)
            part, device.fail_at = setup.part(case.start, 1), device.calls + n
            found, device.fail_at = setup.attend(part), 0
            if part.failure is not None:
                fetched += part.read_bytes["host"]
                device.idle("overwrites", records.ctypes.data, records.nbytes)
            else:
                assert np.abs(found.double().numpy() - wanted).max() < 2e-5
        assert fetched
    device.assert_empty()


def test_hot_slots_are_another_sequences_when_they_have_been_read(
    tmp_path: Path, emulate: Emulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not the call that reads them waited for it."""
    case, device = Case(777, 1, Format.EXACT, kv_heads=1, disk=False), FakeDevice(7, between=0)
    with prepared(case, tmp_path, on(device, emulate, 100)) as setup:
        attention = setup.attention
        assert isinstance(attention, DeviceAttention)
        monkeypatch.setattr(Staging, "settle", lambda _: None)
        part = setup.part(case.start, 1)
        setup.attend(part)
        assert part.read_bytes["host"] == 0
        pool, held = attention._pool, setup.store.memory.ctypes.data
        attention.forget(setup.sequence)
        pool.fill(pool.take(pool.capacity), [held] * pool.capacity).synchronise()
        device.synchronise()


def test_a_failure_of_torchs_keeps_no_tensors(
    tmp_path: Path, emulate: Emulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        with gpu_errors():
            raise torch.OutOfMemoryError("tried to allocate 20 MiB")

    case, device = Case(777, 20, Format.EXACT, kv_heads=1, group=1, disk=False), FakeDevice(5)
    with prepared(case, tmp_path, on(device, emulate, flash=True)) as setup:
        monkeypatch.setattr(device, "compute", full)
        part = setup.part(case.start, case.m)
        assert not setup.attend(part).any()
        assert isinstance(part.failure, OutOfMemory)
        kept = part.failure.__traceback__, part.failure.__cause__, part.failure.__context__
        assert kept == (None, None, None)


def test_a_lost_device_is_no_wrong_number(tmp_path: Path, emulate: Emulate) -> None:
    case, device = Case(500, 30, Format.K8V4, kv_heads=1, disk=False), FakeDevice(1)
    with prepared(case, tmp_path, on(device, emulate)) as setup:
        device.lose_at = device.calls + 9
        with pytest.raises(LaunchFailed):
            setup.attend(setup.part(case.start, case.m))
