"""Makes transformers models attend through spilld, unchanged: the attention implementation "spilld"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from .attention import Attention
from .slices import Call, Slice

IMPLEMENTATION = "spilld"


@dataclass(frozen=True)
class Step:
    """What one forward pass carries to every attention call: a packed batch [1, total] cut into slices."""

    attention: Attention
    slices: list[Slice]


def _forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    spilld_step: Step,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_others: object,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, total, head_dim], key, value [1, kv_heads, ...] to [1, total, heads, head_dim]."""
    out = torch.empty(query.transpose(1, 2).shape, dtype=query.dtype, device=query.device)
    for part in spilld_step.slices:
        rows = slice(part.start, part.start + part.count)
        call = Call(module.layer_idx, part, scaling, softcap or 0.0, sliding_window)
        out[0, rows] = spilld_step.attention.attend(
            query[0, :, rows], key[0, :, rows], value[0, :, rows], call
        )
    return out, None


AttentionInterface.register(IMPLEMENTATION, _forward)
# Without an entry transformers would build masks it cannot know: visibility is ours.
AttentionMaskInterface.register(IMPLEMENTATION, lambda *_args, **_kwargs: None)
