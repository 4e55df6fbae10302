"""Layers with state: makes transformers' mixers run over a packed batch, each sequence with its own state.

A mixer is the module of a layer that keeps a convolution window and perhaps a recurrent state. transformers
runs it over a batch of equally long sequences with a cache. Here it runs over the prompt tokens of one
sequence at a time, and over single tokens of several sequences together, with a cache of just these states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from spilld.errors import InternalError, UnsupportedModel
from spilld.kv.batch import Batch, BatchItem
from spilld.kv.geometry import Geometry
from spilld.kv.recurrent_state import LayerState, RecurrentState, pieces
from spilld.kv.state_geometry import StateGeometry

_CACHES = ("cache_params", "past_key_values")
"""Names that mixers have for their cache."""


class MixerCache:
    """States of one layer, as a mixer knows them from transformers' Cache.

    Attributes:
        convolution: [sequences, channels, kernel]; a mixer changes it in place or by `update_conv_state`.
        recurrent: [sequences, ...] float32, likewise; None if the layer has none.
    """

    def __init__(self, geometry: StateGeometry, states: Sequence[LayerState]) -> None:
        """Take copies of these states."""
        self._geometry = geometry
        self.convolution = torch.stack([state.convolution for state in states])
        recurrent = [state.recurrent for state in states if state.recurrent is not None]
        self.recurrent = torch.stack(recurrent) if recurrent else None

    @property
    def states(self) -> list[LayerState]:
        """The states of the sequences."""
        matrices = [None] * len(self.convolution) if self.recurrent is None else list(self.recurrent)
        return [LayerState(*state) for state in zip(self.convolution, matrices, strict=True)]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        """See transformers' Cache."""
        self._check(layer_idx, state_idx)
        return self.convolution

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """See transformers' Cache."""
        self._check(layer_idx, state_idx)
        return self.recurrent

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int = 0
    ) -> torch.Tensor:
        """Append tokens [sequences, channels, tokens], and return them behind those of the window."""
        self._check(layer_idx, state_idx)
        channels, kernel = self._geometry.convolution
        if conv_kernel_size != kernel or conv_states.shape[1] != channels:
            raise self._differs(f"a convolution over {conv_states.shape[1]} x {conv_kernel_size}")
        seen = torch.cat([self.convolution, conv_states], dim=-1)
        self.convolution = seen[..., -kernel:]
        return seen

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0
    ) -> torch.Tensor:
        """Replace the recurrent state."""
        self._check(layer_idx, state_idx)
        if tuple(recurrent_states.shape[1:]) != self._geometry.recurrent:
            raise self._differs(f"a recurrent state of {tuple(recurrent_states.shape[1:])}")
        self.recurrent = recurrent_states
        return recurrent_states

    def is_recording_past(self, _layer_idx: int) -> bool:
        """Return False: earlier states are not kept here."""
        return False

    def _check(self, layer_idx: int, state_idx: int) -> None:
        if (layer_idx, state_idx) != (self._geometry.module_layer, 0):
            raise self._differs(f"state {state_idx} of layer {layer_idx}")

    def _differs(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(f"a layer asks for {what}, its config says {self._geometry}")


Mixer = Callable[[torch.Tensor, MixerCache], torch.Tensor]
"""Maps hidden states [sequences, tokens, hidden] to as many, and changes the states of the sequences."""


class StatefulStep(Protocol):
    """What one forward pass of a module computes its layers with state by."""

    def mix(self, layer: int, mixer: Mixer, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states [1, total, hidden] of layer Geometry.states[layer] to as many."""


def keep_states(module: Any, geometry: Geometry) -> None:
    """Have a module's mixers run by the step that a forward pass is given, if it is given one.

    Raises:
        UnsupportedModel: A layer with state has no mixer, or several.
    """
    for index, layer in enumerate(geometry.states):
        found = [each for each in module.modules() if _is_mixer(each, layer.module_layer)]
        if len(found) != 1:
            raise UnsupportedModel(f"layer {layer.module_layer} has {len(found)} modules with a state")
        _wrap(found[0], index)


def _is_mixer(module: Any, layer: int) -> bool:
    convolves = any(isinstance(child, torch.nn.Conv1d) for child in module.children())
    return convolves and getattr(module, "layer_idx", None) == layer


def _wrap(mixer: Any, index: int) -> None:
    own = mixer.forward
    names = [name for name in _CACHES if name in inspect.signature(own).parameters]
    if len(names) != 1:
        raise UnsupportedModel(f"{type(mixer).__name__} takes no cache that spilld knows")

    def forward(
        hidden_states: torch.Tensor, spilld_attention: StatefulStep | None = None, **others: object
    ) -> torch.Tensor:
        if spilld_attention is None:
            found: torch.Tensor = own(hidden_states, **others)
            return found
        if asked := [name for name, value in others.items() if value is not None and value is not False]:
            raise UnsupportedModel(
                f"{type(mixer).__name__} is called with {', '.join(asked)}, which spilld does not know: this "
                "model cannot be served"
            )
        return spilld_attention.mix(
            index, lambda hidden, cache: own(hidden, **{names[0]: cache}), hidden_states
        )

    mixer.forward = forward


def mix(
    batch: Batch, geometry: StateGeometry, layer: int, mixer: Mixer, hidden: torch.Tensor
) -> torch.Tensor:
    """Run a mixer over a packed batch.

    What it makes of the states is noted beside these (RecurrentState.put).

    Args:
        batch: The batch.
        geometry: That of the layer.
        layer: Its number among the layers with state.
        mixer: What it computes.
        hidden: Hidden states [1, total, hidden].

    Returns:
        [1, total, hidden].
    """
    single, others = batch.items[: batch.single], batch.items[batch.single :]
    found = []
    if single:
        states = [state_of(item) for item in single]
        cache = MixerCache(geometry, [state[layer] for state in states])
        found.append(mixer(hidden[0, : batch.single, None], cache)[:, 0])
        for state, after in zip(states, cache.states, strict=True):
            state.put(layer, after)
    for item in others:
        state = state_of(item)
        cache = MixerCache(geometry, [state[layer]])
        for start, stop in pieces(item.position, item.last + 1, geometry.grid):
            first = item.start - item.position
            found.append(mixer(hidden[:, first + start : first + stop], cache)[0])
        state.put(layer, cache.states[0])
    return torch.cat(found)[None]


def state_of(item: BatchItem) -> RecurrentState:
    """Return the state that an item's tokens come after.

    Raises:
        InternalError: Its sequence has none of this position.
    """
    state = item.sequence.state
    if state is None or state.position != item.position:
        at = None if state is None else state.position
        raise InternalError(f"the state is that of {at} tokens, {item.position} are computed")
    return state
