"""Windows where the CPU is the device, and attention over them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from spilld.cuda_ext.device.cpu import CpuDevice

from .cpu_kernels import attend_rows
from .windows import Numbers, Windows, WindowShape

Partial = tuple[torch.Tensor, torch.Tensor]
"""(output, log-sum-exp of the logits), both float32: what merges exactly."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class CpuWindows(Windows):
    """Windows in ordinary memory. `tensor` is all of them, [windows, layers, 2, kv_heads, slots, head_dim]:
    only those that were taken may be touched."""

    def __init__(self, shape: WindowShape, budget_bytes: int) -> None:
        device = CpuDevice()
        super().__init__(device, shape, budget_bytes)
        nbytes = self.capacity * shape.nbytes
        memory = (ctypes.c_uint8 * nbytes).from_address(self.arena.base)
        # The memory goes with the last view of it, not before.
        weakref.finalize(memory, device.close).atexit = False
        self.tensor = torch.frombuffer(memory, dtype=shape.dtype).view(self.capacity, *shape.dims)

    def read(self, window: int) -> Numbers:
        """A view."""
        return element_view(self.tensor[window])

    def trim(self) -> None:
        self.arena.trim()

    @contextmanager
    def written(self, window: int) -> Iterator[Numbers]:
        yield self.read(window)


class CpuBackend:
    """numba for one query, torch's flash kernel for tiles."""

    tile_dtype = torch.float32  # without AMX torch's flash kernel is a fifth slower in bfloat16

    def append_one(
        self, planes: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: tuple[int, ...]
    ) -> None:
        """Write a token's k and v [kv_heads, head_dim] to some slots of a window.

        planes [2, kv_heads, slots, head_dim]: its keys and values.
        """
        for slot in slots:
            planes[0, :, slot] = k
            planes[1, :, slot] = v

    def attend_one(
        self,
        q: torch.Tensor,
        planes: torch.Tensor,
        ranges: npt.NDArray[np.int64],
        scale: float,
        softcap: float,
    ) -> Partial:
        """One query over slots of a window.

        q float32 [heads, head_dim]; planes [2, kv_heads, slots, head_dim]; ranges int64 [n, 2]: visible slots
        [start, stop). Returns output [heads, head_dim] and lse [heads].
        """
        out = torch.empty(q.shape)
        lse = torch.empty(q.shape[0])
        keys, values = element_view(planes)
        attend_rows(q.numpy(), keys, values, ranges, scale, softcap, out.numpy(), lse.numpy())
        return out, lse

    def mask(self, hidden: torch.Tensor, group: int) -> torch.Tensor:
        """What attend_tile takes as `mask`, for reuse in every layer.

        hidden bool [M, N] is True where a query does not see a token; each query must see at least one.
        """
        additive = torch.zeros(hidden.shape, dtype=self.tile_dtype).masked_fill_(hidden, -torch.inf)
        return additive.repeat(group, 1)

    def attend_tile(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float,
    ) -> Partial:
        """Many queries over a tile.

        q [kv_heads, group, M, head_dim]; k, v [kv_heads, N, head_dim], contiguous; without a mask every
        query sees every token. Returns output [kv_heads, group, M, head_dim] and lse [kv_heads, group, M].
        """
        kv_heads, group, m, dim = q.shape
        rows = q.reshape(1, kv_heads, group * m, dim)
        if softcap:
            out, lse = _softcapped(rows[0], k, v, mask, scale, softcap)
        else:
            # Hazard: the flash kernel silently misreads tensors whose last dimension is strided.
            broadcast = None if mask is None else mask[None, None]
            out, lse = _flash(rows, k[None], v[None], attn_mask=broadcast, scale=scale)
        return out.view(q.shape), lse.view(kv_heads, group, m)


def _softcapped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float
) -> Partial:
    """torch's flash kernel has no softcap: the same tile with the logits in memory."""
    logits = torch.matmul(q, k.transpose(1, 2)).mul_(scale / softcap).tanh_().mul_(softcap)
    if mask is not None:
        logits += mask
    lse = logits.logsumexp(-1)
    return torch.matmul(logits.sub_(lse[..., None]).exp_(), v), lse


def element_view(tensor: torch.Tensor) -> npt.NDArray[np.float32] | npt.NDArray[np.uint16]:
    """The tensor's memory as numpy sees it: float32, or the bits of bfloat16."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()
