"""Checks what a module asks of attention before it serves, by running its code without its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import getfile
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spilld.attention.state_layers import Mixer, MixerCache
from spilld.attention.transformers_hook import PlannedAttention
from spilld.errors import UnsupportedModel
from spilld.kv.geometry import Geometry
from spilld.kv.recurrent_state import LayerState
from spilld.models.parity.passed_once import pass_once

_TOKENS = 3


def probe_once(module: Any, geometry: Geometry, cache: Path) -> None:
    """Run `probe`, unless it has passed before; that saves half a second at each start.

    A pass is noted in `cache/probes`, for the same config and the same code, ours and transformers'.

    Raises:
        UnsupportedModel: As in `probe`.
    """
    known = (module.config.to_json_string(), repr(geometry))
    pass_once("probes", cache, known, (__file__, getfile(PlannedAttention)), lambda: probe(module, geometry))


def probe(module: Any, geometry: Geometry) -> None:
    """Run a forward pass over tensors that have shapes only: no weight is read.

    Args:
        module: A model with the attention implementation "spilld".
        geometry: What its calls must agree with.

    Raises:
        UnsupportedModel: Attention is not called once for every layer, is called with other heads, sliding
            windows, scaling or softcap than `geometry` has, or asks for something that spilld does not
            compute.
    """
    seen = ProbedAttention(geometry)
    with FakeTensorMode() as mode, torch.inference_mode(), _experts_of_any_dtype(module.config):
        tensors = (*module.named_parameters(), *module.named_buffers())
        shapes: dict[str, torch.Tensor] = {name: mode.from_tensor(tensor) for name, tensor in tensors}
        tokens = torch.zeros(1, _TOKENS, dtype=torch.long)
        inputs = {"input_ids": tokens, "position_ids": tokens, "use_cache": False, "spilld_attention": seen}
        torch.func.functional_call(module, shapes, kwargs=inputs)
    if seen.states != list(range(len(geometry.states))):
        raise UnsupportedModel(
            f"{type(module).__name__} runs the layers with state {seen.states} of {len(geometry.states)}"
        )
    if seen.layers != list(range(len(geometry.layers))):
        raise UnsupportedModel(
            f"{type(module).__name__} attends in layers {seen.layers} of {len(geometry.layers)}: spilld "
            "serves models that attend once in every layer"
        )


@contextmanager
def _experts_of_any_dtype(config: Any) -> Iterator[None]:
    """Compute experts in a way that needs no numbers: torch's grouped product takes bfloat16 only here."""
    before = config._experts_implementation
    config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        config._experts_implementation = before


@dataclass
class ProbedAttention:
    """A ModuleAttention that computes nothing: each call is checked before it gets here."""

    geometry: Geometry
    positions: Sequence[int] = (0,) * _TOKENS
    layers: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)

    def forward(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """Note the layer and return the queries; shapes as in ModuleAttention.forward."""
        self.layers.append(layer)
        return q

    def mix(self, layer: int, mixer: Mixer, hidden: torch.Tensor) -> torch.Tensor:
        """Run the mixer over the tokens and one more, with states that have shapes only."""
        self.states.append(layer)
        geometry = self.geometry.states[layer]
        window = torch.zeros(geometry.convolution, dtype=hidden.dtype)
        recurrent = torch.zeros(geometry.recurrent) if geometry.recurrent else None
        cache = MixerCache(geometry, [LayerState(window, recurrent)])
        mixed = mixer(hidden, cache)
        mixer(hidden[:, :1], cache)
        return mixed
