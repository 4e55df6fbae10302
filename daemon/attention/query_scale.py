"""Query scales: a factor of the queries that a module takes from each token's position.

Llama 4 has one in its layers without RoPE. transformers counts from how many tokens its cache has, which in a
packed batch are other numbers for every sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class PositionedStep(Protocol):
    """What one forward pass of a module has its positions from."""

    @property
    def positions(self) -> Sequence[int]:
        """Positions of the tokens."""


class CountingCache:
    """Stands for transformers' Cache in a layer that asks it for nothing but how many tokens came before."""

    def __init__(self, positions: torch.Tensor) -> None:
        """Take positions [total] int64."""
        self._before = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, _layer_idx: int = 0) -> torch.Tensor:
        """Return, for each token, what is its position beside its place in the batch: [total]."""
        return self._before

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, _layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values: attention puts them away itself."""
        return keys, values


def tell_positions(module: Any) -> None:
    """Have layers that scale queries by position do so in a packed batch as well."""
    for part in module.modules():
        if getattr(part, "attn_temperature_tuning", False):
            _wrap(part)


def _wrap(layer: Any) -> None:
    own = layer.forward

    def forward(
        hidden_states: torch.Tensor, spilld_attention: PositionedStep | None = None, **others: Any
    ) -> Any:
        if spilld_attention is None:
            return own(hidden_states, **others)
        positions = torch.tensor(spilld_attention.positions, device=hidden_states.device)
        cache = CountingCache(positions)
        return own(hidden_states, **others | {"past_key_values": cache}, spilld_attention=spilld_attention)

    layer.forward = forward
