"""Makes transformers models attend through spilld, unchanged: the attention implementation "spilld"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from spilld.errors import UnsupportedModel
from spilld.kv.attention_span import MaskChunks
from spilld.kv.geometry import Geometry, LayerGeometry

from .base import Attention, AttentionPlan
from .state_layers import Mixer, mix

IMPLEMENTATION = "spilld"

HARMLESS: Mapping[str, object] = {
    "dropout": 0.0,
    "is_causal": True,
    "use_cache": False,
    "output_attentions": False,
    "output_router_logits": False,
    "output_hidden_states": False,
}
"""Keywords of an attention beside those of `_forward`, and the value with which each asks for nothing, as
None does. With any other keyword or value the model would be another than the one asked for."""

_NO_MATTER = frozenset({"position_ids"})
"""Keywords that are ignored: RoPE has been applied, and the batch knows its positions."""


class ModuleAttention(Protocol):
    """What one forward pass of a module passes to every attention call."""

    @property
    def geometry(self) -> Geometry:
        """The geometry that the calls must agree with."""

    @property
    def positions(self) -> Sequence[int]:
        """Positions of the tokens."""

    def forward(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """Map q [total, heads, head_dim] and k, v [total, kv_heads, head_dim] to [total, heads, head_dim]."""

    def mix(self, layer: int, mixer: Mixer, hidden: torch.Tensor) -> torch.Tensor:
        """See StatefulStep.mix."""


@dataclass(frozen=True)
class PlannedAttention:
    """Attention of one step over a packed batch [1, total]."""

    attention: Attention
    plan: AttentionPlan

    @property
    def geometry(self) -> Geometry:
        """See ModuleAttention.geometry."""
        return self.attention.geometry

    @property
    def positions(self) -> Sequence[int]:
        """See ModuleAttention.positions."""
        return self.plan.batch.positions

    def forward(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """See ModuleAttention.forward."""
        return self.attention.forward(layer, q, k, v, self.plan, sink_logits)

    def mix(self, layer: int, mixer: Mixer, hidden: torch.Tensor) -> torch.Tensor:
        """See ModuleAttention.mix."""
        return mix(self.plan.batch, self.geometry.states[layer], layer, mixer, hidden)


def _forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    spilld_attention: ModuleAttention,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Map query [1, heads, total, head_dim] and key, value [1, kv_heads, total, head_dim] to attention.

    Returns:
        [1, total, heads, head_dim], and None.

    Raises:
        UnsupportedModel: The model asks for what spilld's attention does not compute, or for what its
            geometry does not say.
    """
    unknown = [name for name, value in others.items() if not _is_harmless(name, value)]
    if attention_mask is not None:
        unknown.append("attention_mask")
    if unknown:
        raise UnsupportedModel(
            f"{type(module).__name__} asks for an attention with {', '.join(unknown)}, which spilld does not "
            "compute: this model cannot be served"
        )
    geometry = spilld_attention.geometry
    if (layer := geometry.numbers.get(module.layer_idx)) is None:
        raise UnsupportedModel(f"layer {module.layer_idx} attends, which its config does not say")
    _check_sizes(layer, geometry.layers[layer], query, key, value)
    _check_numbers(layer, geometry.layers[layer], scaling, softcap or 0.0, sliding_window)
    if (s_aux is not None) != geometry.layers[layer].sink_logits:
        raise UnsupportedModel(f"layer {layer} attends with other sink logits than its family has")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return spilld_attention.forward(layer, q, k, v, s_aux).to(query.dtype)[None], None


def _check_sizes(
    layer: int, geometry: LayerGeometry, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    total = query.shape[2]
    kv = (1, geometry.kv_heads, total, geometry.head_dim)
    wanted = (1, geometry.heads, total, geometry.head_dim), kv, kv
    found = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if found != wanted:
        raise UnsupportedModel(f"layer {layer} has queries, keys and values {found}, not {wanted}")


def _check_numbers(
    layer: int, geometry: LayerGeometry, scaling: float, softcap: float, sliding_window: int | None
) -> None:
    # No keyword says a chunked mask: the module would choose it where masks are built.
    said = None if isinstance(geometry.sliding_window, MaskChunks) else geometry.sliding_window
    if (softcap, sliding_window) != (geometry.softcap, said):
        raise UnsupportedModel(
            f"layer {layer} attends with softcap {softcap} and window {sliding_window}, not "
            f"{geometry.softcap} and {said} as its config says"
        )
    if scaling != geometry.scaling:
        raise UnsupportedModel(
            f"layer {layer} attends with scaling {scaling}, not {geometry.scaling} as its config says"
        )


def _is_harmless(name: str, value: object) -> bool:
    if value is None or name in _NO_MATTER:
        return True
    return name in HARMLESS and not isinstance(value, torch.Tensor) and value == HARMLESS[name]


AttentionInterface.register(IMPLEMENTATION, _forward)
# Without an entry transformers would build masks: visibility is decided by spilld.
AttentionMaskInterface.register(IMPLEMENTATION, lambda *_args, **_kwargs: None)
