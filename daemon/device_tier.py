"""A device tier within its budget: how device memory is divided, and what is made of the parts."""

from __future__ import annotations

from typing import Any, NamedTuple

from spilld.cuda_ext.choice import Costs
from spilld.cuda_ext.device import Device
from spilld.cuda_ext.device_windows import DeviceWindows
from spilld.cuda_ext.landing import ALIGNMENT, Landing
from spilld.cuda_ext.ops import Ops
from spilld.cuda_ext.pool import RecordPool
from spilld.offload.store import Store

from .device_attention import DeviceAttention
from .hot import SPARE
from .visibility import CELL, highest_block

WINDOWS_SHARE = 4
"""Windows have at most one part in so many of what is left beside landing."""


class DeviceTier(NamedTuple):
    windows: DeviceWindows
    attention: DeviceAttention


def build(
    device: Device[Any], ops: Ops, store: Store, budget_bytes: int, max_context: int, costs: Costs
) -> DeviceTier:
    """max_context: tokens of the longest sequence. The store's records are pinned.

    Raises ValueError if the budget is too small, OutOfMemory and RegistrationRefused.
    """
    shape, record_bytes = ops.shape, store.layout.record_bytes
    landing_bytes = crossing(ops, highest_block(max_context))
    page = device.page_bytes
    one = -(-shape.nbytes // page) * page
    least = landing_bytes + one + SPARE * record_bytes
    if budget_bytes < least:
        raise ValueError(f"a device budget of {budget_bytes} bytes is less than the least, {least}")
    for_windows = max(one, (budget_bytes - landing_bytes) // WINDOWS_SHARE)
    landing = Landing(device, landing_bytes)
    windows = DeviceWindows(device, landing, shape, min(for_windows, budget_bytes - least + one))
    pool = RecordPool(device, budget_bytes - landing_bytes - windows.budget_bytes, record_bytes)
    store.pin_memory(device.register)
    return DeviceTier(windows, DeviceAttention(device, ops, windows, pool, landing, store, costs))


def crossing(ops: Ops, blocks: int) -> int:
    """The most bytes of landing that a call takes, over at most so many stored blocks."""
    shape = ops.shape
    row = 4 * (shape.head_dim + 1)  # of a result, with its lse
    queries = 5 * CELL * ops.heads * row  # given, rotated, merged, and fetched
    partial = 2 * ops.partial_rows(CELL) * row  # over the window and over records
    kv = 2 * CELL * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
    seen = CELL * 8 * 8 + 16 * blocks  # ranges and bounds; places and positions
    call = queries + partial + kv + seen + 16 * ALIGNMENT
    return -(-max(call, shape.layer_bytes) // 4096) * 4096
