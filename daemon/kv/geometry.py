"""What the store and the attention must know of a model: sizes, windows, where a sequence ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spilld.errors import UnsupportedModel
from spilld.offload.record import HEAD_DIMS


@dataclass(frozen=True)
class Geometry:
    """Sizes of one model.

    sliding_windows has one entry per layer: None for full attention, or W where a query at position p sees
    the positions p-W+1..p. softcap is the cap of the attention logits, 0.0 for none.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    sliding_windows: tuple[int | None, ...]
    softcap: float
    eos: frozenset[int]

    @classmethod
    def of(cls, config: Any, generation: Any, tokenizer_eos: int | None) -> Geometry:
        """From a transformers config and generation config. Raises UnsupportedModel."""
        if getattr(config, "use_bidirectional_attention", None):
            raise UnsupportedModel("a model with bidirectional attention cannot be served token by token")
        heads = int(config.num_attention_heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        if head_dim not in HEAD_DIMS:
            raise UnsupportedModel(
                f"head_dim {head_dim} is not supported; {', '.join(map(str, HEAD_DIMS))} are"
            )
        return cls(
            layers=int(config.num_hidden_layers),
            heads=heads,
            kv_heads=int(config.num_key_value_heads),
            head_dim=head_dim,
            vocab=int(config.vocab_size),
            max_positions=_positions(config),
            sliding_windows=_windows(config),
            softcap=float(getattr(config, "attn_logit_softcapping", None) or 0.0),
            eos=_ids(config.eos_token_id) | _ids(generation.eos_token_id) | _ids(tokenizer_eos),
        )


def _positions(config: Any) -> int:
    """YaRN's usual recipe names a factor and leaves max_position_embeddings as the model was trained with."""
    ropes: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    each = [ropes, *(part for part in ropes.values() if isinstance(part, dict))]
    reached = [
        int(rope["original_max_position_embeddings"] * rope["factor"])
        for rope in each
        if rope.get("rope_type") == "yarn" and rope.get("factor")
    ]
    return max([int(config.max_position_embeddings), *reached])


def _windows(config: Any) -> tuple[int | None, ...]:
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type in ("mistral", "phi3"):  # every layer slides, whatever layer_types may say
        return (window,) * int(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise UnsupportedModel(f"layers with {', '.join(unknown)} are not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _ids(value: int | list[int] | None) -> frozenset[int]:
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else value)
