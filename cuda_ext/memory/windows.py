"""KV windows: the newest tokens and the sinks of a sequence, exact, in device memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy.typing as npt
import torch

from spilld.cuda_ext.device.base import Device

from .arena import Arena

Numbers = npt.NDArray[Any]
"""K and V of one layer of a window, [2, kv_heads, tokens, head_dim], float32 or bf16 bits (uint16)."""


@dataclass(frozen=True)
class KVWindowShape:
    """Shape of a KV window: K and V of so many tokens in every layer.

    Attributes:
        tokens: How many.
        layers: (kv_heads, head_dim) of each layer.
        dtype: Of the numbers.
    """

    tokens: int
    layers: tuple[tuple[int, int], ...]
    dtype: torch.dtype

    @classmethod
    def uniform(
        cls, tokens: int, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> KVWindowShape:
        """Make the shape of so many equal layers."""
        return cls(tokens, ((kv_heads, head_dim),) * layers, dtype)

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """Byte at which each layer begins in a window, and the bytes of a window."""
        nbytes = (math.prod(self.dims(layer)) * self.dtype.itemsize for layer in range(len(self.layers)))
        return tuple(accumulate(nbytes, initial=0))

    @property
    def nbytes(self) -> int:
        """Bytes of a window."""
        return self.begins[-1]

    def dims(self, layer: int) -> tuple[int, int, int, int]:
        """Return the dimensions of Numbers: token-major, so that stock attention kernels run over a layer."""
        kv_heads, head_dim = self.layers[layer]
        return 2, kv_heads, self.tokens, head_dim

    @property
    def alike(self) -> tuple[int, int]:
        """(kv_heads, head_dim) of every layer.

        Raises:
            ValueError: The layers differ.
        """
        if len(set(self.layers)) > 1:
            raise ValueError("the layers of these windows differ: ask for the dimensions of one")
        return self.layers[0]

    @property
    def kv_heads(self) -> int:
        """KV heads of every layer; raises as `alike`."""
        return self.alike[0]

    @property
    def head_dim(self) -> int:
        """Numbers of a head in every layer; raises as `alike`."""
        return self.alike[1]

    @property
    def layer_bytes(self) -> int:
        """Bytes of every layer; raises as `alike`."""
        kv_heads, head_dim = self.alike
        return 2 * kv_heads * self.tokens * head_dim * self.dtype.itemsize


class KVWindows(ABC):
    """As many KV windows as a budget of device bytes holds; those that were taken are backed by memory."""

    def __init__(self, device: Device[Any], shape: KVWindowShape, budget_bytes: int) -> None:
        """Reserve addresses for the windows.

        Raises:
            ValueError: The budget does not hold one window.
            OutOfMemory: No such range of addresses is free.
        """
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
        """Number of windows that can be taken now."""
        return self.capacity - self.arena.taken

    @property
    def used_bytes(self) -> int:
        """Bytes of the windows that are taken."""
        return self.arena.taken * self.shape.nbytes

    def take(self) -> int:
        """Return the number of a window that is now the caller's, uninitialised.

        Raises:
            ArenaFull: No window is free, or the budget backs no more of them.
            OutOfMemory: The window is not backed yet, and the device has no memory for it.
        """
        return self.arena.take()

    def give_back(self, window: int) -> None:
        """Give a window back.

        Raises:
            ValueError: It is not taken.
        """
        self.arena.give_back(window)

    def address(self, window: int, layer: int) -> int:
        """Return the address of a layer's planes, `[2, kv_heads, tokens, head_dim]`."""
        return self.arena.address(window) + self.shape.begins[layer]

    @abstractmethod
    def read(self, window: int) -> list[Numbers]:
        """Return what each layer of a window holds, valid until the device is used again."""

    @abstractmethod
    def written(self, window: int) -> AbstractContextManager[list[Numbers]]:
        """Return a scope that gives memory for what each layer is to hold from the scope's end on.

        What is not written there is undefined.
        """

    @abstractmethod
    def trim(self) -> None:
        """Give back memory of the process behind windows that are not taken."""
