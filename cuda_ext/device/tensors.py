"""Device memory as torch tensors, and torch's GPU errors as errors of a device."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from spilld.cuda_ext.errors import LaunchFailed, OutOfMemory

OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation."""


class Array(NamedTuple):
    """An array in device memory, in C order."""

    address: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_process(array: Array) -> torch.Tensor:
    """Return a tensor that is a view of the process's own memory."""
    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.address)
    return torch.frombuffer(memory, dtype=array.dtype).view(array.shape)


def on_gpu(array: Array, number: int) -> torch.Tensor:
    """Return a tensor that is a view of GPU memory.

    Args:
        array: Memory of torch's GPU of that number, where torch has its primary context.
        number: As torch counts GPUs.
    """
    found = torch.as_tensor(_Bytes(array), device=torch.device("cuda", number))
    return found.view(array.dtype).view(array.shape)


class _Bytes:
    """Foreign GPU memory as torch accepts it; as bytes, since the protocol has no bfloat16."""

    def __init__(self, array: Array) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": (array.nbytes,),
            "typestr": "|u1",
            "data": (array.address, False),
        }


@contextmanager
def gpu_errors() -> Iterator[None]:
    """Raise torch's GPU errors as errors of a device.

    Raises:
        OutOfMemory: Torch or CUDA found no memory.
        LaunchFailed: Any other error of the GPU.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        # Torch's allocator raises OutOfMemoryError; CUDA, when it loads a kernel, an AcceleratorError.
        full = (
            isinstance(error, torch.OutOfMemoryError) or getattr(error, "error_code", None) == OUT_OF_MEMORY
        )
        raise (OutOfMemory if full else LaunchFailed)(f"torch: {error}") from error
