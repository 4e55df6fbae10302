"""Attention of many queries over a tile of keys and values, by torch's kernels for the CPU."""

from __future__ import annotations

import torch

Partial = tuple[torch.Tensor, torch.Tensor]
"""(output, log-sum-exp of the logits), both float32: what merges exactly."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def additive_mask(hidden: torch.Tensor, group: int) -> torch.Tensor:
    """Return the mask of attend_tile, for use in every layer.

    Args:
        hidden: [M, N] bool, True where a query does not see a token; each query must see at least one.
        group: Query heads of a KV head.

    Returns:
        [group * M, N] float32.
    """
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf).repeat(group, 1)


def attend_tile(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float, softcap: float
) -> Partial:
    """Attend from many queries over a tile.

    All tensors are float32: without AMX torch's flash kernel is a fifth slower in bfloat16.

    Args:
        q: [kv_heads, group, M, head_dim].
        k: [kv_heads, N, head_dim], contiguous.
        v: [kv_heads, N, head_dim], contiguous.
        mask: [group * M, N], of additive_mask.
        scaling: The layer's, as in LayerGeometry.
        softcap: The layer's, as in LayerGeometry.

    Returns:
        Output [kv_heads, group, M, head_dim] and lse [kv_heads, group, M].
    """
    kv_heads, group, m, dim = q.shape
    rows = q.reshape(1, kv_heads, group * m, dim)
    if softcap:
        out, lse = _softcapped(rows[0], k, v, mask, scaling, softcap)
    else:
        # Hazard: the flash kernel silently misreads tensors whose last dimension is strided.
        out, lse = _flash(rows, k[None], v[None], attn_mask=mask[None, None], scale=scaling)
    return out.view(q.shape), lse.view(kv_heads, group, m)


def _softcapped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float, softcap: float
) -> Partial:
    """Attend with a softcap, which torch's flash kernel lacks: the same tile with the logits in memory."""
    logits = torch.matmul(q, k.transpose(1, 2)).mul_(scaling / softcap).tanh_().mul_(softcap)
    logits += mask
    lse = logits.logsumexp(-1)
    return torch.matmul(logits.sub_(lse[..., None]).exp_(), v), lse
