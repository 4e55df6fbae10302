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
    """Shape of a KV window: K and V of so many tokens in every layer."""

    tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer."""
        return 2 * self.kv_heads * self.tokens * self.head_dim * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of a window."""
        return self.layers * self.layer_bytes

    @property
    def dims(self) -> tuple[int, int, int, int, int]:
        """Dimensions of Numbers: token-major, so that stock attention kernels run over a layer."""
        return self.layers, 2, self.kv_heads, self.tokens, self.head_dim


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
        return self.arena.address(window) + layer * self.shape.layer_bytes

    @abstractmethod
    def read(self, window: int) -> Numbers:
        """Return what a window holds, valid until the device is used again."""

    @abstractmethod
    def written(self, window: int) -> AbstractContextManager[Numbers]:
        """Return a scope that gives memory for what the window is to hold from the scope's end on.

        What is not written there is undefined.
        """

    @abstractmethod
    def trim(self) -> None:
        """Give back memory of the process behind windows that are not taken."""
