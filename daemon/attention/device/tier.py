"""Device tier: windows, and attention over them and the store, within the device's budget."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from spilld.attention.base import Attention
from spilld.attention.cpu import CpuAttention
from spilld.config.config import Config
from spilld.cuda_ext.device.base import Device
from spilld.cuda_ext.device.cuda import CudaDevice
from spilld.cuda_ext.errors import DeviceError
from spilld.cuda_ext.flash import Flash, try_out
from spilld.cuda_ext.memory.cpu_windows import CpuKVWindows
from spilld.cuda_ext.memory.device_windows import DeviceKVWindows
from spilld.cuda_ext.memory.record_pool import RecordPool
from spilld.cuda_ext.memory.staging import ALIGNMENT, Staging
from spilld.cuda_ext.memory.windows import KVWindows, KVWindowShape
from spilld.cuda_ext.ops import Ops
from spilld.cuda_ext.transfer_costs import Costs
from spilld.errors import ConfigError
from spilld.kv.attention_span import CELL, WINDOW_TOKENS, highest_block
from spilld.kv.geometry import Geometry
from spilld.kv.recurrent_state import StateShape
from spilld.offload.size import size
from spilld.offload.store.store import Store

from .block_cache import SPARE
from .costs import measure
from .gpu_attention import DeviceAttention

log = logging.getLogger(__name__)

WINDOWS_SHARE = 4
"""Windows take at most this fraction, as its denominator, of what working memory leaves."""

DEFAULT_WINDOWS = 4
"""Windows without a device_budget where the CPU is the device."""


class DeviceTier(NamedTuple):
    """KV windows, and attention over them and the store."""

    windows: KVWindows
    attention: Attention


def on_cpu(config: Config, store: Store, geometry: Geometry) -> DeviceTier:
    """Build the tier where the CPU is the device.

    Raises:
        ValueError: The budget holds no window.
    """
    shape = window_shape(config, geometry)
    windows = CpuKVWindows(shape, _for_windows(config.device_budget, shape, geometry))
    return DeviceTier(windows, CpuAttention(geometry, store, windows))


def _for_windows(budget: int | None, shape: KVWindowShape, geometry: Geometry) -> int:
    """Return the bytes of a budget that are for windows: each sequence needs memory for its state, too.

    Raises:
        ValueError: It holds no window with a state.
    """
    if budget is None:
        return DEFAULT_WINDOWS * shape.nbytes
    if (states := StateShape.of(geometry, shape.dtype)) is None:
        return budget
    sequence = shape.nbytes + states.sequence_bytes
    if budget < sequence:
        raise ValueError(
            f"a device budget of {size(budget)} is less than {size(sequence, least=True)}, which the window "
            "and the state of one sequence take"
        )
    return -(-(budget // sequence * shape.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE


def on_cuda(config: Config, store: Store, geometry: Geometry) -> DeviceTier:
    """Build the tier on the first GPU.

    Raises:
        ConfigError: There is no budget.
        ValueError: The budget is too small.
        DeviceError: The GPU cannot be used.
        BuildError: A kernel cannot be compiled.
    """
    if config.device_budget is None:
        raise ConfigError('device = "cuda" takes a device_budget: memory of the GPU that is for spilld alone')
    device = CudaDevice()
    try:
        load = partial(device.compiled, cache=config.cache / "cubins")
        constants, shape, heads = store.layout.constants, window_shape(config, geometry), geometry.sizes.heads
        ops = Ops(load, constants, shape, heads)
        flash = Flash(device, load, constants, shape, heads) if has_flash(device, shape, geometry) else None
        longest = config.max_context or geometry.max_positions
        costs = measure(device, ops, flash, store.layout)
        return build(device, ops, geometry, store, config.device_budget, longest, costs, flash)
    except BaseException:
        device.close()
        raise


def has_flash(device: Device[Any], shape: KVWindowShape, geometry: Geometry) -> bool:
    """Return whether prompts can use torch's flash attention.

    torch must find the GPU, and flash attention must take the dtype, suit a layer of the model, and run.
    """
    of_use = any(layer.sliding_window is None and not layer.softcap for layer in geometry.layers)
    if not torch.cuda.is_available() or shape.dtype is torch.float32 or not of_use:
        return False
    try:
        try_out(device, shape)
    except (DeviceError, RuntimeError) as error:
        log.warning("prompts take our own kernels: torch's flash attention does not run here: %s", error)
        return False
    return True


Tier = Callable[[Config, Store, Geometry], DeviceTier]

TIERS: dict[str, Tier] = {"cpu": on_cpu, "cuda": on_cuda}
"""What builds the tier, by the configured device."""


def window_shape(config: Config, geometry: Geometry) -> KVWindowShape:
    """Return the shape of a KV window of the model in the configured dtype."""
    return KVWindowShape(
        tokens=WINDOW_TOKENS,
        layers=geometry.kv_heads,
        dtype=getattr(torch, config.dtype),
    )


def build(
    device: Device[Any],
    ops: Ops,
    geometry: Geometry,
    store: Store,
    budget_bytes: int,
    max_context: int,
    costs: Costs,
    flash: Flash | None,
) -> DeviceTier:
    """Build the tier within a budget. The store's records are pinned.

    Args:
        device: The device.
        ops: Its kernels.
        geometry: Sizes of the model.
        store: The tiers below.
        budget_bytes: Device memory that the tier may take.
        max_context: Tokens of the longest sequence.
        costs: What attending to a record costs.
        flash: What prompts use in place of our kernels; None for our kernels.

    Raises:
        ValueError: The budget is too small.
        OutOfMemory: The device has less memory than the budget.
        RegistrationRefused: Host memory cannot be registered with the device.
    """
    shape, record_bytes = ops.shape, store.layout.record_bytes
    staging_bytes = crossing(ops, highest_block(max_context))
    working_bytes = staging_bytes + (flash.nbytes if flash else 0)
    page = device.page_bytes
    one = -(-shape.nbytes // page) * page
    least = working_bytes + one + SPARE * record_bytes
    if budget_bytes < least:
        raise ValueError(
            f"a device budget of {size(budget_bytes)} is less than the least, {size(least, least=True)}"
        )
    share = min((budget_bytes - working_bytes) // WINDOWS_SHARE, budget_bytes - least + one)
    for_windows = max(1, share // shape.nbytes) * shape.nbytes
    staging = Staging(device, staging_bytes)
    windows = DeviceKVWindows(device, staging, shape, -(-for_windows // page) * page)
    pool = RecordPool(device, budget_bytes - working_bytes - windows.budget_bytes, record_bytes)
    store.pin_memory(device.register)
    attention = DeviceAttention(geometry, store, device, ops, windows, pool, staging, costs, flash)
    return DeviceTier(windows, attention)


def crossing(ops: Ops, blocks: int) -> int:
    """Return the most bytes of staging that a call takes, over at most so many stored blocks."""
    shape = ops.shape
    row = 4 * (shape.head_dim + 1)  # of a result, with its lse
    queries = 5 * CELL * ops.heads * row  # given, rotated, merged, and fetched
    partial = 2 * ops.partial_rows(CELL) * row  # over the window and over records
    kv = 2 * CELL * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
    seen = CELL * 8 * 8 + 16 * blocks  # ranges and bounds; places and positions
    call = queries + partial + kv + seen + 16 * ALIGNMENT
    return -(-max(call, shape.layer_bytes) // 4096) * 4096
