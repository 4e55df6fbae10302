"""KV windows where the CPU is the device."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from spilld.cuda_ext.device.cpu import CpuDevice

from .windows import KVWindows, KVWindowShape, Numbers


class CpuKVWindows(KVWindows):
    """KV windows in ordinary memory.

    Only windows that are taken may be touched.

    Attributes:
        numbers: All of them as one vector.
        layers: Of each layer a view `[windows, 2, kv_heads, tokens, head_dim]`.
    """

    def __init__(self, shape: KVWindowShape, budget_bytes: int) -> None:
        device = CpuDevice()
        super().__init__(device, shape, budget_bytes)
        nbytes = self.capacity * shape.nbytes
        memory = (ctypes.c_uint8 * nbytes).from_address(self.arena.base)
        # The memory goes with the last view of it, not before.
        weakref.finalize(memory, device.close).atexit = False
        self.numbers = torch.frombuffer(memory, dtype=shape.dtype)
        self.layers = [self._view(layer) for layer in range(len(shape.layers))]

    def _view(self, layer: int) -> torch.Tensor:
        dims, size = self.shape.dims(layer), self.shape.dtype.itemsize
        window, first = self.shape.nbytes // size, self.shape.begins[layer] // size
        strides = (window, *(math.prod(dims[axis + 1 :]) for axis in range(len(dims))))
        return self.numbers.as_strided((self.capacity, *dims), strides, first)

    def read(self, window: int) -> list[Numbers]:
        """See KVWindows.read; returns views."""
        return [element_view(planes[window]) for planes in self.layers]

    def trim(self) -> None:
        """See KVWindows.trim."""
        self.arena.trim()

    @contextmanager
    def written(self, window: int) -> Iterator[list[Numbers]]:
        """See KVWindows.written."""
        yield self.read(window)


def element_view(tensor: torch.Tensor) -> npt.NDArray[np.float32] | npt.NDArray[np.uint16]:
    """Return the tensor's memory as a numpy array: float32, or the bits of bfloat16 as uint16."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()
