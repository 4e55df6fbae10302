"""KV windows in the memory of a device that the CPU does not reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from spilld.cuda_ext.device.base import Device, Stream

from .staging import Landing
from .windows import KVWindows, KVWindowShape, Numbers


class DeviceKVWindows(KVWindows):
    """They cross layer by layer: `landing` must have room for one. Memory is behind all of them from the
    start: a request that was admitted shall not find that another program has taken it."""

    def __init__(
        self, device: Device[Any], landing: Landing, shape: KVWindowShape, budget_bytes: int
    ) -> None:
        """Raises ValueError if the budget does not hold one window, and OutOfMemory."""
        super().__init__(device, shape, budget_bytes)
        for window in [self.take() for _ in range(self.capacity)]:
            self.give_back(window)
        self._landing = landing
        self._element = np.dtype(np.uint16 if shape.dtype is torch.bfloat16 else np.float32)

    def read(self, window: int) -> Numbers:
        """A copy. Raises OutOfMemory."""
        numbers = np.empty(self.shape.dims, self._element)
        for layer, planes in enumerate(numbers):
            with self._landing.turn(), self.arena.use(Stream.COMPUTE, reads=[window]):
                found = self._landing.fetch(self.address(window, layer), planes.shape, self._element)
            self._landing.settle()
            planes[...] = found
        return numbers

    def trim(self) -> None:
        pass

    @contextmanager
    def written(self, window: int) -> Iterator[Numbers]:
        """Raises OutOfMemory at the end of the scope; the window then holds anything."""
        numbers = np.zeros(self.shape.dims, self._element)
        yield numbers
        for layer, planes in enumerate(numbers):
            with self._landing.turn(), self.arena.use(Stream.COMPUTE, writes=[window]):
                self._landing.send(planes, self.address(window, layer))
        self._landing.settle()
