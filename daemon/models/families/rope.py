"""RoPE that does not depend on the other sequences in the batch.

transformers recomputes the frequencies of `dynamic` and `longrope` from the largest position in the batch
(modeling_rope_utils.dynamic_rope_update), so a long sequence would change the keys of a short one beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spilld.errors import UnsupportedModel

_FROZEN = "default"
"""A rope_type that transformers' forward leaves alone."""


def fix_rope(module: torch.nn.Module, max_context: int) -> None:
    """Make every RoPE frequency constant for sequences of up to max_context tokens.

    longrope takes its long factors iff max_context exceeds the original context, for short sequences too.

    Raises:
        UnsupportedModel: The type is `dynamic` (NTK), whose frequencies have no one right value.
    """
    for rotary in module.modules():
        kinds = getattr(rotary, "rope_type", None)
        if kinds is None:
            continue
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if "dynamic" in kind:
                raise UnsupportedModel(
                    f"rope type {kind!r} depends on the longest sequence in the batch; it is not supported"
                )
            if kind == "longrope":
                _freeze(rotary, layer_type, max_context)


def rope_bytes(module: torch.nn.Module) -> bytes:
    """Return every frequency and attention scaling in use as bytes, for the fingerprint."""
    parts: list[bytes] = []
    for name, rotary in module.named_modules():
        if not hasattr(rotary, "rope_type"):
            continue
        for key, buffer in sorted(rotary.named_buffers()):
            if key.endswith("inv_freq") and "original" not in key:
                parts += [f"{name}.{key}".encode(), buffer.float().cpu().numpy().tobytes()]
        for key, value in sorted(vars(rotary).items()):
            if key.endswith("attention_scaling"):
                parts += [f"{name}.{key}".encode(), repr(float(value)).encode()]
    return b"\0".join(parts)


def _freeze(rotary: Any, layer_type: str | None, max_context: int) -> None:
    config = rotary.config
    parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    original = parameters["original_max_position_embeddings"]
    inverse, scaling = ROPE_INIT_FUNCTIONS["longrope"](
        config, None, seq_len=original + 1 if max_context > original else original, layer_type=layer_type
    )
    prefix = f"{layer_type}_" if layer_type else ""
    getattr(rotary, f"{prefix}inv_freq").copy_(inverse)
    setattr(rotary, f"{prefix}attention_scaling", scaling)
    if layer_type:
        rotary.rope_type[layer_type] = _FROZEN
    else:
        rotary.rope_type = _FROZEN
