"""A device tier on the fake device, whose kernels the emulator runs."""

from __future__ import annotations

from typing import Any

from spilld.attention.device import tier
from spilld.attention.device.block_cache import SPARE
from spilld.attention.device.tier import DeviceTier, Tier, window_shape
from spilld.config.config import Config
from spilld.cuda_ext.flash import Flash
from spilld.cuda_ext.memory.windows import KVWindowShape
from spilld.cuda_ext.ops import Ops
from spilld.cuda_ext.transfer_costs import Costs, Rates
from spilld.kv.attention_span import highest_block
from spilld.kv.geometry import Geometry
from spilld.offload.store.store import Store

from ..cuda_ext.conftest import Emulate, loader
from ..cuda_ext.fake import FakeDevice

SAME = Rates(fetch_bytes=1e9, fetch_s=0, cpu_bytes=1e9, cpu_s=0)
EVEN = Costs(SAME, SAME, copy_bytes=1e9)
"""Half of the cold records are fetched."""

WARPS = 8
FLASH_TILE = 3
MAX_CONTEXT = 4096


def tier_of(device: FakeDevice, emulate: Emulate, **options: Any) -> Tier:
    """As an engine takes it; options: those of fake_tier."""

    def tier(config: Config, store: Store, geometry: Geometry) -> DeviceTier:
        shape = window_shape(config, geometry)
        return fake_tier(device, emulate, store, shape, geometry, **options)

    return tier


def fake_tier(
    device: FakeDevice,
    emulate: Emulate,
    store: Store,
    shape: KVWindowShape,
    geometry: Geometry,
    *,
    hot: int = 12,
    windows: int = 1,
    costs: Costs = EVEN,
    flash: bool = False,
) -> DeviceTier:
    """hot: records that may stay on the device. flash: whether prompts take it."""
    heads, load, constants = geometry.sizes.heads, loader(device, emulate), store.layout.constants
    ops = Ops(load, constants, shape, heads, warps=WARPS)
    prompts = Flash(device, load, constants, shape, heads, tile=FLASH_TILE) if flash else None
    working = tier.crossing(ops, highest_block(MAX_CONTEXT)) + (prompts.nbytes if prompts else 0)
    records = (SPARE + hot) * store.layout.record_bytes
    budget = working + records + windows * -(-shape.nbytes // device.page_bytes) * device.page_bytes
    return tier.build(device, ops, geometry, store, budget, MAX_CONTEXT, costs, prompts)
