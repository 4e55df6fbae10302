"""KV windows in the memory of a device that the CPU cannot address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from spilld.cuda_ext.device.base import Device, Stream

from .staging import Staging
from .windows import KVWindows, KVWindowShape, Numbers


class DeviceKVWindows(KVWindows):
    """KV windows that are copied to and from the host layer by layer: the staging memory must hold one layer.

    All of them are backed by memory from the start, so that an admitted request does not fail because another
    program has taken the memory.
    """

    def __init__(
        self, device: Device[Any], staging: Staging, shape: KVWindowShape, budget_bytes: int
    ) -> None:
        """Allocate the windows.

        Raises:
            ValueError: The budget does not hold one window.
            OutOfMemory: The device has not enough memory.
        """
        super().__init__(device, shape, budget_bytes)
        for window in [self.take() for _ in range(self.capacity)]:
            self.give_back(window)
        self._staging, self._layers = staging, range(len(shape.layers))
        self._element = np.dtype(np.uint16 if shape.dtype is torch.bfloat16 else np.float32)

    def read(self, window: int) -> list[Numbers]:
        """See KVWindows.read; returns a copy.

        Raises:
            OutOfMemory: The copy could not be made.
        """
        numbers = [np.empty(self.shape.dims(layer), self._element) for layer in self._layers]
        for layer, planes in enumerate(numbers):
            with self._staging.turn(), self.arena.use(Stream.COMPUTE, reads=[window]):
                found = self._staging.fetch(self.address(window, layer), planes.shape, self._element)
            self._staging.settle()
            planes[...] = found
        return numbers

    def trim(self) -> None:
        """See KVWindows.trim; does nothing, as all windows stay backed."""

    @contextmanager
    def written(self, window: int) -> Iterator[list[Numbers]]:
        """See KVWindows.written.

        Raises:
            OutOfMemory: At the end of the scope; the window's contents are undefined then.
        """
        numbers = [np.zeros(self.shape.dims(layer), self._element) for layer in self._layers]
        yield numbers
        for layer, planes in enumerate(numbers):
            with self._staging.turn(), self.arena.use(Stream.COMPUTE, writes=[window]):
                self._staging.send(planes, self.address(window, layer))
        self._staging.settle()
