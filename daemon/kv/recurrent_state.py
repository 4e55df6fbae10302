"""Recurrent state: what the layers of a model that keep a state have seen of one sequence.

It is that after `position` tokens and cannot step back, so a step writes beside it: what was before stays
until the step has succeeded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from spilld.offload.system import Bytes

from .geometry import Geometry
from .state_geometry import StateGeometry

ALIGNMENT = 64
"""Each tensor of a state begins at a multiple of so many bytes."""


class LayerState(NamedTuple):
    """State of one layer: [channels, kernel] in the model's dtype, and float32 if it has a recurrent one."""

    convolution: torch.Tensor
    recurrent: torch.Tensor | None


@dataclass(frozen=True)
class StateShape:
    """How a state lies in memory and in a checkpoint: layer by layer, the convolution's window first."""

    layers: tuple[StateGeometry, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, geometry: Geometry, dtype: torch.dtype) -> StateShape | None:
        """Return the shape of a model's states, None if no layer has one."""
        return cls(geometry.states, dtype) if geometry.states else None

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one state."""
        return sum(_padded(part) for layer in self.layers for part in layer.nbytes(self.dtype.itemsize))

    @cached_property
    def grid(self) -> int:
        """Tokens that are computed together."""
        return math.lcm(*(layer.grid for layer in self.layers))

    @property
    def sequence_bytes(self) -> int:
        """Bytes that a sequence takes: its state, and the one that a step makes of it."""
        return 2 * self.nbytes

    def views(self, memory: torch.Tensor) -> list[LayerState]:
        """Return the layers' tensors in memory, uint8 [nbytes]."""
        found, at = [], 0
        for layer in self.layers:
            convolution, recurrent = layer.nbytes(self.dtype.itemsize)
            window = memory[at : at + convolution].view(self.dtype).view(layer.convolution)
            at += _padded(convolution)
            numbers = memory[at : at + recurrent].view(torch.float32)
            at += _padded(recurrent)
            found.append(LayerState(window, numbers.view(layer.recurrent) if layer.recurrent else None))
        return found


class RecurrentState:
    """The state of one sequence, and memory for the next one.

    Attributes:
        shape: How it lies in memory.
        position: Tokens that it has seen.
    """

    def __init__(self, shape: StateShape) -> None:
        """Make the state of an empty sequence."""
        self.shape = shape
        self.position = 0
        self._memory = [torch.zeros(shape.nbytes, dtype=torch.uint8) for _ in range(2)]
        self._views = [shape.views(memory) for memory in self._memory]

    def __getitem__(self, layer: int) -> LayerState:
        """Return what one of the layers with state has seen; it is not to be changed."""
        return self._views[0][layer]

    def put(self, layer: int, found: LayerState) -> None:
        """Note what a step has made of one layer's state, which counts from `advance` on."""
        for into, tensor in zip(self._views[1][layer], found, strict=True):
            if into is not None and tensor is not None:
                into.copy_(tensor)

    def advance(self, position: int) -> None:
        """Take what `put` has noted, or what was written to `next`, as the state after `position` tokens."""
        self._memory.reverse()
        self._views.reverse()
        self.position = position

    def reset(self) -> None:
        """Be the state of an empty sequence again."""
        self._memory[0].zero_()
        self.position = 0

    @property
    def bytes(self) -> Bytes:
        """The state, uint8 [nbytes]; it is not to be changed."""
        return self._memory[0].numpy()

    @property
    def next(self) -> Bytes:
        """Memory for the next state, uint8 [nbytes]."""
        return self._memory[1].numpy()


def pieces(start: int, stop: int, grid: int) -> list[tuple[int, int]]:
    """Split positions [start, stop) of a prompt so that what is computed does not depend on chunks before.

    A layer computes `grid` tokens together, counted from the first that it is given, and one token by
    another rule than several. So what comes before the first multiple of the grid is a piece, and a token
    that is alone behind the last is one. Chunks that end at multiples of the grid then have the pieces of
    one long chunk.
    """
    first = min(stop, -(-start // grid) * grid)
    last = max(first, stop // grid * grid)
    if stop - last > 1:
        last = stop
    return [(a, b) for a, b in ((start, first), (first, last), (last, stop)) if a < b]


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
