"""Flash attention over a pool of records, on whatever device, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from spilld.cuda_ext import ops
from spilld.cuda_ext.device.base import Device
from spilld.cuda_ext.flash import Flash
from spilld.cuda_ext.memory.staging import Staging
from spilld.cuda_ext.memory.windows import KVWindowShape
from spilld.cuda_ext.ops import Load, Queries
from spilld.offload.record import Format

from ..offload import reference
from .kernels import Records, by_query
from .numbers import Number, integers, layout_of

QUERIES, GROUP, BLOCKS, TILE = 20, 2, 5, 2


def check(device: Device[Any], load: Load, form: Format, number: Number, *, tile: int = TILE) -> None:
    """In three tiles, the last not full, the numbers of the softmax."""
    layout = layout_of(form, number, 64)
    records = Records(layout, blocks=BLOCKS, queries=QUERIES, group=GROUP)
    records.q *= 4
    if number is Number.BFLOAT16:
        records.q = reference.widen(reference.bf16_nearest(records.q))
    shape = KVWindowShape.uniform(64, 1, layout.kv_heads, layout.head_dim, getattr(torch, number))
    heads = GROUP * layout.kv_heads
    flash = Flash(device, load, integers(layout), shape, heads, tile)
    landing = Staging(device, 4 << 20)
    pool = device.allocate(records.pool.nbytes)
    queries = reference.rotate(records.q) if form is Format.INT4 else records.q
    with landing.turn():
        landing.send(records.pool, pool)
        q, places, positions = landing.bring(queries, records.places, records.positions)
        rows = (layout.kv_heads, QUERIES * GROUP)
        to = ops.Parts(landing.room((*rows, layout.head_dim)), landing.room(rows), 1)
        flash.attend(to, Queries(q, QUERIES), ops.Records(pool, places, positions, BLOCKS), records.scale)
        out, lse = landing.fetch(to.out, (*rows, layout.head_dim)), landing.fetch(to.lse, rows)
    landing.settle()
    out, lse = out.copy(), lse.copy()
    landing.close()
    wanted, wanted_lse = records.oracle()
    tolerance = 2e-5 if number is Number.FLOAT32 else 5e-2
    assert np.abs(by_query(out, GROUP) - wanted).max() < tolerance
    assert np.abs(by_query(lse, GROUP) - wanted_lse).max() < tolerance
