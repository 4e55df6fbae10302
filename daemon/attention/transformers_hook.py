"""Makes transformers models attend through spilld, unchanged: the attention implementation "spilld"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from spilld.errors import UnsupportedModel
from spilld.kv.batch import Call, Slice

from .base import Attention

IMPLEMENTATION = "spilld"

HARMLESS: Mapping[str, object] = {
    "dropout": 0.0,
    "is_causal": True,
    "use_cache": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
"""Keywords of an attention beside those of `_forward`, and the value with which each asks for nothing, as
None does. With any other keyword or value the model would be another than the one asked for."""

_NO_MATTER = frozenset({"position_ids"})
"""Whatever their value: RoPE has been applied, and slices know their positions."""


class Manner(NamedTuple):
    """How a layer attends, as transformers has it."""

    scaling: float
    softcap: float
    window: int | None


class Forward(Protocol):
    """What one forward pass carries to every attention call."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, manner: Manner
    ) -> torch.Tensor:
        """query [1, heads, total, head_dim], key, value [1, kv_heads, ...] to [1, total, heads, head_dim]."""


@dataclass(frozen=True)
class Step:
    """A Forward over a packed batch [1, total] that is cut into slices."""

    attention: Attention
    slices: list[Slice]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, manner: Manner
    ) -> torch.Tensor:
        out = torch.empty(query.transpose(1, 2).shape, dtype=query.dtype, device=query.device)
        for part in self.slices:
            rows = slice(part.start, part.start + part.count)
            call = Call(layer, part, *manner)
            out[0, rows] = self.attention.attend(query[0, :, rows], key[0, :, rows], value[0, :, rows], call)
        return out


def _forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    spilld_step: Forward,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Raises UnsupportedModel for what spilld's attention does not compute."""
    unknown = [name for name, value in others.items() if not _is_harmless(name, value)]
    if attention_mask is not None:
        unknown.append("attention_mask")
    if unknown:
        raise UnsupportedModel(
            f"{type(module).__name__} asks for an attention with {', '.join(unknown)}, which spilld does not "
            "compute: this model cannot be served"
        )
    manner = Manner(scaling, softcap or 0.0, sliding_window)
    return spilld_step.attend(module.layer_idx, query, key, value, manner), None


def _is_harmless(name: str, value: object) -> bool:
    if value is None or name in _NO_MATTER:
        return True
    return name in HARMLESS and not isinstance(value, torch.Tensor) and value == HARMLESS[name]


AttentionInterface.register(IMPLEMENTATION, _forward)
# Without an entry transformers would build masks it cannot know: visibility is ours.
AttentionMaskInterface.register(IMPLEMENTATION, lambda *_args, **_kwargs: None)
