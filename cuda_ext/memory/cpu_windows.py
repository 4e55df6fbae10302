"""KV windows where the CPU is the device."""

from __future__ import annotations

import ctypes
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

    `tensor` is a view of all of them, `[windows, layers, 2, kv_heads, tokens, head_dim]`: only windows
    that are taken may be touched.
    """

    def __init__(self, shape: KVWindowShape, budget_bytes: int) -> None:
        device = CpuDevice()
        super().__init__(device, shape, budget_bytes)
        nbytes = self.capacity * shape.nbytes
        memory = (ctypes.c_uint8 * nbytes).from_address(self.arena.base)
        # The memory goes with the last view of it, not before.
        weakref.finalize(memory, device.close).atexit = False
        self.tensor = torch.frombuffer(memory, dtype=shape.dtype).view(self.capacity, *shape.dims)

    def read(self, window: int) -> Numbers:
        """See KVWindows.read; returns a view."""
        return element_view(self.tensor[window])

    def trim(self) -> None:
        """See KVWindows.trim."""
        self.arena.trim()

    @contextmanager
    def written(self, window: int) -> Iterator[Numbers]:
        """See KVWindows.written."""
        yield self.read(window)


def element_view(tensor: torch.Tensor) -> npt.NDArray[np.float32] | npt.NDArray[np.uint16]:
    """Return the tensor's memory as a numpy array: float32, or the bits of bfloat16 as uint16."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()
