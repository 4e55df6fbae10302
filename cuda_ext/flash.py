"""Torch's flash attention over records, for prompts: each record is unpacked once for all queries of a call.

The kernels of this package unpack a record again for every 16 rows of queries. With many queries it is faster
to write keys and values to memory, a tile of records at a time, and attend over these. They, and the queries,
are then in the compute dtype. Torch's kernel has no softcap, and here every query sees every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from spilld.cuda_ext.compile.variant import BLOCK
from spilld.cuda_ext.device.base import Device, Stream
from spilld.cuda_ext.device.tensors import Array
from spilld.cuda_ext.memory.windows import KVWindowShape

from .compile import variant
from .ops import (
    Load,
    Parts,
    Queries,
    Records,
)

TILE = 32
"""Records that are unpacked at a time."""


def try_out(device: Device[Any], shape: KVWindowShape) -> None:
    """Run torch's kernel once.

    Raises:
        DeviceError: The device fails.
        RuntimeError: Torch's kernel does not take this head size or dtype.
    """
    memory = device.allocate(BLOCK * shape.head_dim * shape.dtype.itemsize)
    try:
        array = Array(memory, (1, BLOCK, shape.head_dim), shape.dtype)
        device.compute(Stream.COMPUTE, lambda x: _flash(x.zero_(), x, x, 1.0), array)
        device.record(Stream.COMPUTE).synchronise()
    finally:
        device.free(memory)


class Flash:
    """Flash attention over records on a device.

    Arguments are not checked; what is launched is done later, on the compute stream.
    """

    def __init__(
        self,
        device: Device[Any],
        load: Load,
        layout: Mapping[str, int],
        shape: KVWindowShape,
        heads: int,
        tile: int = TILE,
    ) -> None:
        """Allocate memory for a tile.

        Args:
            device: Where the records are.
            load: See Ops.
            layout: See Ops.
            shape: Of the KV windows.
            heads: Query heads.
            tile: Records that are unpacked at a time.

        Raises:
            OutOfMemory: The device has no memory for a tile.
        """
        self._device, self._shape, self._group, self._tile = device, shape, heads // shape.kv_heads, tile
        self._dequantise = load(variant.dequantise(layout))
        self.nbytes = 2 * self._plane(tile).nbytes
        """Device memory for a tile."""
        self._memory = device.allocate(self.nbytes)

    def attend(self, to: Parts, q: Queries, records: Records, scale: float) -> None:
        """Attend over records as Ops.attend_records does, into the first part.

        Args:
            to: Where the result goes.
            q: The queries.
            records: The records, of which each query sees all tokens.
            scale: Factor of the logits.

        Raises:
            OutOfMemory: The part is undefined then.
        """
        rows = q.rows * self._group
        kv_heads, head_dim = self._shape.kv_heads, self._shape.head_dim
        queries = Array(q.address, (q.rows, kv_heads, self._group, head_dim), torch.float32)
        out = Array(to.out, (kv_heads, rows, head_dim), torch.float32)
        lse = Array(to.lse, (kv_heads, rows), torch.float32)
        softmax = _Softmax(scale)
        for first in range(0, records.blocks, self._tile):
            count = min(self._tile, records.blocks - first)
            keys = self._plane(count, self._memory)
            values = self._plane(count, self._memory + self.nbytes // 2)
            grid, places = (count, kv_heads, 2), records.places + 8 * first
            self._dequantise.launch(Stream.COMPUTE, grid, keys.address, values.address, records.pool, places)
            self._device.compute(Stream.COMPUTE, softmax.take, queries, keys, values, out, lse)

    def _plane(self, records: int, address: int = 0) -> Array:
        shape = (self._shape.kv_heads, records * BLOCK, self._shape.head_dim)
        return Array(address, shape, self._shape.dtype)


class _Softmax:
    """Attention merged over the tiles taken so far; done in the order of the stream, as all of torch's."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._rows: torch.Tensor | None = None

    def take(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Attend over one more tile and merge the result into out and lse.

        Args:
            q: `[M, kv_heads, group, head_dim]`, the same in each call.
            k: `[kv_heads, tokens, head_dim]`.
            v: `[kv_heads, tokens, head_dim]`.
            out: `[kv_heads, M * group, head_dim] float32`, the result so far, updated.
            lse: `[kv_heads, M * group] float32`, updated with it.
        """
        if self._rows is None:
            self._rows = q.transpose(0, 1).reshape(out.shape).to(k.dtype)
            found, found_lse = _flash(self._rows, k, v, self._scale)
            out.copy_(found)
            lse.copy_(found_lse)
            return
        found, found_lse = _flash(self._rows, k, v, self._scale)
        total = torch.logaddexp(lse, found_lse)
        out.mul_(torch.exp(lse - total)[..., None]).add_(found * torch.exp(found_lse - total)[..., None])
        lse.copy_(total)


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run torch's kernel: out, like q [heads, M, head_dim], and lse float32 [heads, M]."""
    aten = torch.ops.aten
    kernel = (
        aten._scaled_dot_product_flash_attention
        if q.is_cuda
        else aten._scaled_dot_product_flash_attention_for_cpu
    )
    out, lse = kernel(q[None], k[None], v[None], scale=scale)[:2]
    return out[0], lse[0]
