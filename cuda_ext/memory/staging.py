"""Staging memory for what a step's kernels read and write: it crosses between host and device here."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from spilld.cuda_ext.device.base import Copy, Device, Stream

from .fences import Fences

ALIGNMENT = 256


class StagingFull(Exception):
    """More is to cross at a time than there is staging memory for."""


class Staging:
    """Staging: as much registered host memory as device memory, used from the start again in each `turn`.

    Owned by one thread; all work is on the compute stream.
    """

    def __init__(self, device: Device[Any], nbytes: int) -> None:
        """Allocate and register the memory.

        Raises:
            OutOfMemory: The device has not enough memory.
            RegistrationRefused: The host memory cannot be pinned.
        """
        self.nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._device = device
        self._fences = Fences(device)
        self._here = np.frombuffer(mmap.mmap(-1, self.nbytes), np.uint8)
        self._there = device.allocate(self.nbytes)
        try:
            device.register(self._here.ctypes.data, self.nbytes)
        except BaseException:
            device.free(self._there)
            raise
        self._used = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Return a scope in which staging memory is taken; what the last scope took is free again.

        Raises:
            OutOfMemory: An event could not be recorded.
        """
        self._fences.settle([0])
        self._used = 0
        with self._fences.use(Stream.COMPUTE, writes=[0]):
            yield

    def settle(self) -> None:
        """Block until what was given to the device in the last turn is done.

        Raises:
            OutOfMemory: An event could not be recorded.
        """
        self._fences.settle([0])

    def bring(self, *arrays: npt.NDArray[Any]) -> list[int]:
        """Copy arrays to the device, in C order, and return their addresses there.

        Raises:
            StagingFull: There is not enough staging memory.
            OutOfMemory: The copies could not be begun.
        """
        places = [self._take(array.nbytes) for array in arrays]
        self._send([(array, at, self._there + at) for array, at in zip(arrays, places, strict=True)])
        return [self._there + at for at in places]

    def send(self, array: npt.NDArray[Any], to: int) -> None:
        """Copy an array's numbers, in C order, to an address on the device.

        Raises:
            StagingFull: There is not enough staging memory.
            OutOfMemory: The copy could not be begun.
        """
        self._send([(array, self._take(array.nbytes), to)])

    def room(self, shape: Sequence[int], dtype: npt.DTypeLike = np.float32) -> int:
        """Return the address of uninitialised device memory for an array.

        Raises:
            StagingFull: There is not enough staging memory.
        """
        return self._there + self._take(math.prod(shape) * np.dtype(dtype).itemsize)

    def fetch(
        self, address: int, shape: Sequence[int], dtype: npt.DTypeLike = np.float32
    ) -> npt.NDArray[Any]:
        """Copy an array from the device to the host.

        Args:
            address: Where it lies on the device.
            shape: The array's.
            dtype: The array's.

        Returns:
            The array, which is filled once the turn has settled, and valid until the next turn.

        Raises:
            StagingFull: There is not enough staging memory.
            OutOfMemory: The copy could not be begun.
        """
        found = self._view(self._take(math.prod(shape) * np.dtype(dtype).itemsize), shape, dtype)
        self._device.copy(Stream.COMPUTE, [Copy(found.ctypes.data, address, found.nbytes)])
        return found

    def close(self) -> None:
        """Give back the memory.

        Raises:
            OutOfMemory: It may be called again then.
        """
        self._fences.settle([0])
        self._device.unregister(self._here.ctypes.data)
        self._device.free(self._there)

    def _take(self, nbytes: int) -> int:
        at, self._used = self._used, -(-(self._used + nbytes) // ALIGNMENT) * ALIGNMENT
        if self._used > self.nbytes:
            raise StagingFull(f"{self._used} bytes at a time do not fit {self.nbytes}")
        return at

    def _send(self, pieces: Iterable[tuple[npt.NDArray[Any], int, int]]) -> None:
        """Copy arrays, each given with its place in host memory and its address on the device."""
        copies = []
        for array, at, to in pieces:
            here = self._view(at, array.shape, array.dtype)
            here[...] = array
            if array.nbytes:
                copies.append(Copy(to, here.ctypes.data, array.nbytes))
        self._device.copy(Stream.COMPUTE, copies)

    def _view(self, at: int, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        return self._here[at : at + nbytes].view(dtype).reshape(shape)
