"""State geometry: layers whose memory of a sequence is a state of fixed size instead of KV."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spilld.errors import UnsupportedModel

DELTA_GRID = 64
"""Tokens that transformers' gated delta rule computes together (`chunk_size` of its functions)."""

MOST_TOGETHER = 4096
"""The largest grid: a step computes at least so many tokens of a prompt."""


@dataclass(frozen=True)
class StateGeometry:
    """The state of one layer: what it has seen of a sequence, whatever the sequence's length.

    Attributes:
        module_layer: transformers' number of the layer.
        convolution: Shape of the convolution's window [channels, kernel], in the model's dtype.
        recurrent: Shape of the recurrent state, float32; empty if the layer has none.
        grid: Tokens that are computed together: chunks of prompts begin and end at multiples of it.
    """

    module_layer: int
    convolution: tuple[int, int]
    recurrent: tuple[int, ...]
    grid: int

    def nbytes(self, itemsize: int) -> tuple[int, int]:
        """Return the bytes of window and recurrent state where a number of the model has `itemsize` bytes."""
        recurrent = 4 * math.prod(self.recurrent) if self.recurrent else 0
        return itemsize * math.prod(self.convolution), recurrent


def state_geometries(config: Any) -> tuple[StateGeometry, ...]:
    """Return the layers with state of a model, in order.

    Args:
        config: A transformers config, of the text part if the model has several.

    Raises:
        UnsupportedModel: It has layers with state whose shapes are not known here.
    """
    kinds = list(getattr(config, "layer_types", None) or ())
    layers = [i for i, kind in enumerate(kinds) if kind in ("linear_attention", "conv")]
    if not layers:
        return ()
    if (shapes := _SHAPES.get(str(config.model_type))) is None:
        raise UnsupportedModel(
            f"{config.model_type} has layers with a recurrent state of a kind that spilld does not keep"
        )
    convolution, recurrent, grid = shapes(config)
    if not 1 <= grid <= MOST_TOGETHER or min(convolution + recurrent) < 1:
        raise UnsupportedModel(
            f"layers with a state of {convolution} and {recurrent} that compute {grid} tokens together are "
            f"not supported; at most {MOST_TOGETHER} together are"
        )
    return tuple(StateGeometry(i, convolution, recurrent, grid) for i in layers)


_Shapes = tuple[tuple[int, int], tuple[int, ...], int]


def _delta_rule(config: Any) -> _Shapes:
    """Yang et al. 2024, Gated Delta Networks: a matrix [key_dim, value_dim] for each value head."""
    keys, values = int(config.linear_num_key_heads), int(config.linear_num_value_heads)
    key_dim, value_dim = int(config.linear_key_head_dim), int(config.linear_value_head_dim)
    channels = 2 * keys * key_dim + values * value_dim
    return (channels, int(config.linear_conv_kernel_dim)), (values, key_dim, value_dim), DELTA_GRID


def _mamba(heads: int, head_dim: int, groups: int, state: int, kernel: int, chunk: int) -> _Shapes:
    """Dao and Gu 2024, Mamba 2: a matrix [head_dim, state] for each head."""
    return (heads * head_dim + 2 * groups * state, kernel), (heads, head_dim, state), chunk


def _granite(config: Any) -> _Shapes:
    return _mamba(
        int(config.mamba_n_heads),
        int(config.mamba_d_head),
        int(config.mamba_n_groups),
        int(config.mamba_d_state),
        int(config.mamba_d_conv),
        int(config.mamba_chunk_size),
    )


def _nemotron(config: Any) -> _Shapes:
    return _mamba(
        int(config.mamba_num_heads),
        int(config.mamba_head_dim),
        int(config.n_groups),
        int(config.ssm_state_size),
        int(config.conv_kernel),
        int(config.chunk_size),
    )


def _short_convolution(config: Any) -> _Shapes:
    return (int(config.hidden_size), int(config.conv_L_cache)), (), 1


_SHAPES: dict[str, Callable[[Any], _Shapes]] = {
    "qwen3_next": _delta_rule,
    "qwen3_5_text": _delta_rule,
    "qwen3_5_moe_text": _delta_rule,
    "granitemoehybrid": _granite,
    "nemotron_h": _nemotron,
    "lfm2": _short_convolution,
    "lfm2_moe": _short_convolution,
}
"""By model_type, the shapes of a layer's convolution and recurrent state, and its grid."""
