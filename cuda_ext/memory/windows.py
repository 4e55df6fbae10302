"""KV windows: the newest tokens and the sinks of a sequence, exact, in device memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from spilld.cuda_ext.device.base import Device

from .arena import Arena

Numbers = npt.NDArray[Any]
"""K and V of one window, [layers, 2, kv_heads, tokens, head_dim], float32 or bf16 bits (uint16)."""


@dataclass(frozen=True)
class KVWindowShape:
    """What one KV window holds: K and V of so many tokens in every layer."""

    tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def layer_bytes(self) -> int:
        return 2 * self.kv_heads * self.tokens * self.head_dim * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.layers * self.layer_bytes

    @property
    def dims(self) -> tuple[int, int, int, int, int]:
        """Of Numbers: token-major, so that stock attention kernels run over a layer."""
        return self.layers, 2, self.kv_heads, self.tokens, self.head_dim


class KVWindows(ABC):
    """As many windows as a budget of device bytes holds; memory stands behind those that were taken."""

    def __init__(self, device: Device[Any], shape: KVWindowShape, budget_bytes: int) -> None:
        """Raises ValueError if the budget does not hold one window, and OutOfMemory."""
        self.shape = shape
        self.budget_bytes = budget_bytes
        self.capacity = budget_bytes // device.page_bytes * device.page_bytes // shape.nbytes
        if self.capacity < 1:
            raise ValueError(
                f"a device budget of {budget_bytes / 2**20:.3g} MiB holds no window of "
                f"{math.ceil(100 * shape.nbytes / 2**20) / 100} MiB"
            )
        self.arena = Arena(device, shape.nbytes, self.capacity, budget_bytes)

    @property
    def free(self) -> int:
        """Windows that can be taken now."""
        return self.capacity - self.arena.taken

    @property
    def used_bytes(self) -> int:
        return self.arena.taken * self.shape.nbytes

    def take(self) -> int:
        """The number of a window that is now the caller's, and holds anything. Raises ArenaFull, and
        OutOfMemory where none is behind it yet."""
        return self.arena.take()

    def give_back(self, window: int) -> None:
        """Raises ValueError if it is not taken."""
        self.arena.give_back(window)

    def address(self, window: int, layer: int) -> int:
        """Of the layer's planes, [2, kv_heads, tokens, head_dim]."""
        return self.arena.address(window) + layer * self.shape.layer_bytes

    @abstractmethod
    def read(self, window: int) -> Numbers:
        """What a window holds, to be looked at before anything else is asked of the device."""

    @abstractmethod
    def written(self, window: int) -> AbstractContextManager[Numbers]:
        """Memory for what a window is to hold from the end of the scope on; what is not written there may be
        anything."""

    @abstractmethod
    def trim(self) -> None:
        """Give back memory of the process that is behind windows that nobody has."""
