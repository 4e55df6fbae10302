"""Geometry: what the store and attention must know of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from spilld.errors import UnsupportedModel
from spilld.offload.record import HEAD_DIMS, Element, Format, Layout
from spilld.offload.store_layout import StoreLayout

from .attention_span import MaskChunks, Sliding
from .state_geometry import StateGeometry, state_geometries

_NO_ATTENTION = {"linear_attention", "conv", "mlp", "moe"}
"""Kinds of layers without attention that transformers names. The first two have a state."""

_OF_IMAGES = "vision"
"""What a config says where tokens of images, which are not served, attend in both directions."""

UNSCALED = ("gemma3n_text", "gemma4_text")
"""Families whose logits are not scaled: the norm of the queries has learned to."""

_ALL_SLIDE = ("mistral", "ministral3", "mixtral", "phi3")
"""Families of which every layer slides if the config has a window, whatever its layer_types may say."""


class HeadSizes(NamedTuple):
    """Number of query heads, number of KV heads, and numbers of a head."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class LayerGeometry:
    """Attention of one layer, `module_layer` in transformers' count of all layers.

    sliding_window is None for full attention, or W where a query at position p sees the positions
    p-W+1..p, or chunks of a mask, of which it sees its own. logit = scaling * q.k, then softcap *
    tanh(logit / softcap) unless softcap is 0. With sink_logits the module gives a logit of each head that
    takes part in the softmax and has no value.
    """

    heads: int
    kv_heads: int
    head_dim: int
    sliding_window: Sliding
    scaling: float
    softcap: float
    module_layer: int
    sink_logits: bool = False

    @property
    def sizes(self) -> HeadSizes:
        """Sizes of the layer's heads."""
        return HeadSizes(self.heads, self.kv_heads, self.head_dim)


@dataclass(frozen=True)
class Geometry:
    """Sizes of one model."""

    layers: tuple[LayerGeometry, ...]
    """Those that attend, in order of the pass."""
    vocab: int
    max_positions: int
    eos: frozenset[int]
    states: tuple[StateGeometry, ...] = ()
    """Layers that have a state of fixed size instead of KV, in order of the pass."""

    @classmethod
    def of(cls, config: Any, generation: Any, tokenizer_eos: int | None) -> Geometry:
        """Return the geometry of a transformers config and generation config.

        Raises:
            UnsupportedModel: spilld cannot serve such a model.
        """
        if getattr(config, "use_bidirectional_attention", None) not in (None, False, _OF_IMAGES):
            raise UnsupportedModel("a model with bidirectional attention cannot be served token by token")
        layers = [_layer(config, *layer) for layer in _sliding_windows(config)]
        if not layers:
            raise UnsupportedModel("a model without attention has no KV, which is all that spilld is about")
        return cls(
            layers=tuple(layers),
            vocab=int(config.vocab_size),
            max_positions=_positions(config),
            eos=_ids(config.eos_token_id) | _ids(generation.eos_token_id) | _ids(tokenizer_eos),
            states=state_geometries(config),
        )

    @cached_property
    def every_sizes(self) -> frozenset[HeadSizes]:
        """The sizes of heads that layers have."""
        return frozenset(layer.sizes for layer in self.layers)

    @property
    def sizes(self) -> HeadSizes:
        """Sizes of every layer's heads, for what computes layers that are alike only.

        Raises:
            UnsupportedModel: Layers differ.
        """
        if len(self.every_sizes) > 1:
            raise UnsupportedModel(
                'layers whose heads differ in size are computed on the CPU only: take device = "cpu"'
            )
        return self.layers[0].sizes

    @cached_property
    def kv_heads(self) -> tuple[tuple[int, int], ...]:
        """(number of KV heads, numbers of a head) of each layer."""
        return tuple((layer.kv_heads, layer.head_dim) for layer in self.layers)

    def layouts(self, form: Format, element: Element) -> StoreLayout:
        """Return how the layers' records are stored in a format, where the model computes in `element`."""
        return StoreLayout(tuple(Layout(form, element, *heads) for heads in self.kv_heads))

    @cached_property
    def grid(self) -> int:
        """Chunks of a prompt begin and end at multiples of so many tokens, but where the prompt does."""
        return math.lcm(*(state.grid for state in self.states))

    @cached_property
    def numbers(self) -> dict[int, int]:
        """Number in `layers` of each layer of transformers that attends."""
        return {layer.module_layer: number for number, layer in enumerate(self.layers)}

    @cached_property
    def token_numbers(self) -> int:
        """How many numbers K and V of one token have, in all layers."""
        return sum(2 * layer.kv_heads * layer.head_dim for layer in self.layers)

    @cached_property
    def sliding_windows(self) -> tuple[Sliding, ...]:
        """Sliding window of each layer."""
        return tuple(layer.sliding_window for layer in self.layers)


def _layer(config: Any, module_layer: int, sliding_window: Sliding) -> LayerGeometry:
    own = config.per_layer_config[module_layer]
    heads = int(own.num_attention_heads)
    head_dim = int(getattr(own, "head_dim", None) or config.hidden_size // heads)
    if head_dim not in HEAD_DIMS:
        raise UnsupportedModel(f"head_dim {head_dim} is not supported; {', '.join(map(str, HEAD_DIMS))} are")
    return LayerGeometry(
        heads=heads,
        kv_heads=int(own.num_key_value_heads),
        head_dim=head_dim,
        sliding_window=sliding_window,
        scaling=_scaling(config, head_dim),
        softcap=float(getattr(config, "attn_logit_softcapping", None) or 0.0),
        module_layer=module_layer,
        sink_logits=config.model_type == "gpt_oss",
    )


def _scaling(config: Any, head_dim: int) -> float:
    """Return the factor of the logits.

    Gemma 2 and 3 and Granite name it, Gemma 3n and 4 have none, the others divide by the root of head_dim.
    """
    if config.model_type in UNSCALED:
        return 1.0
    if scalar := getattr(config, "query_pre_attn_scalar", None):
        return float(scalar**-0.5)
    return float(getattr(config, "attention_multiplier", None) or head_dim**-0.5)


def _positions(config: Any) -> int:
    """Return the most positions of a sequence.

    YaRN's usual recipe names a factor and leaves max_position_embeddings as the model was trained with.
    """
    ropes: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    each = [ropes, *(part for part in ropes.values() if isinstance(part, dict))]
    reached = [
        int(rope["original_max_position_embeddings"] * rope["factor"])
        for rope in each
        if rope.get("rope_type") == "yarn" and rope.get("factor")
    ]
    return max([int(config.max_position_embeddings), *reached])


def _sliding_windows(config: Any) -> list[tuple[int, Sliding]]:
    """Return (its number, its sliding window) of each layer that attends."""
    sliding_window: int | None = getattr(config, "sliding_window", None)
    if config.model_type in _ALL_SLIDE:
        return [(i, sliding_window) for i in range(config.num_hidden_layers)]
    windows: dict[str, Sliding] = {"full_attention": None, "sliding_attention": sliding_window}
    if config.model_type == "llama4_text" and config.attention_chunk_size:
        windows["chunked_attention"] = MaskChunks(config.attention_chunk_size)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if unknown := sorted(set(kinds) - set(windows) - _NO_ATTENTION):
        raise UnsupportedModel(f"layers with {', '.join(unknown)} are not supported")
    return [(i, windows[kind]) for i, kind in enumerate(kinds) if kind in windows]


def _ids(value: int | list[int] | None) -> frozenset[int]:
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else value)
