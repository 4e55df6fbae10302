"""The CPU as the device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .backend import Partial
from .cpu_kernels import attend_rows
from .window import WindowArena, WindowShape

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class CpuBackend:
    """Windows in ordinary memory; numba for one query, torch's flash kernel for tiles."""

    device = torch.device("cpu")
    tile_dtype = torch.float32  # without AMX torch's flash kernel is a fifth slower in bfloat16

    def windows(self, shape: WindowShape, budget_bytes: int) -> WindowArena:
        return WindowArena(shape, budget_bytes, self.device)

    def append_one(
        self, planes: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: tuple[int, ...]
    ) -> None:
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
        out = torch.empty(q.shape)
        lse = torch.empty(q.shape[0])
        keys, values = element_view(planes)
        attend_rows(q.numpy(), keys, values, ranges, scale, softcap, out.numpy(), lse.numpy())
        return out, lse

    def mask(self, hidden: torch.Tensor, group: int) -> torch.Tensor:
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
