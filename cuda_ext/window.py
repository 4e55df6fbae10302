"""Windows: the newest tokens and the sinks of a sequence, exact, in device memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WindowShape:
    """What one window holds: K and V of `slots` tokens in every layer."""

    slots: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.slots * self.head_dim * self.dtype.itemsize


class WindowArena:
    """A fixed number of windows within a budget of device bytes, allocated once.

    `tensor` is [windows, layers, 2, kv_heads, slots, head_dim]: token-major, so that stock
    attention kernels run over a layer of it.
    """

    def __init__(self, shape: WindowShape, budget_bytes: int, device: torch.device) -> None:
        """Raises ValueError if the budget does not hold one window."""
        self.shape = shape
        self.budget_bytes = budget_bytes
        self.capacity = budget_bytes // shape.nbytes
        if self.capacity < 1:
            raise ValueError(
                f"a device budget of {budget_bytes} bytes holds no window of {shape.nbytes} bytes"
            )
        dims = (self.capacity, shape.layers, 2, shape.kv_heads, shape.slots, shape.head_dim)
        self.tensor = torch.empty(dims, dtype=shape.dtype, device=device)
        self._free = list(range(self.capacity))

    @property
    def free(self) -> int:
        """Windows that can be taken now."""
        return len(self._free)

    @property
    def used_bytes(self) -> int:
        return (self.capacity - len(self._free)) * self.shape.nbytes

    def take(self) -> int:
        """The index of a window that is now the caller's. Raises IndexError when none is free."""
        return self._free.pop()

    def give_back(self, index: int) -> None:
        if index in self._free or not 0 <= index < self.capacity:
            raise ValueError(f"window {index} is not taken")
        self._free.append(index)
