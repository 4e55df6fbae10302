"""A kernel on a device with the face of the emulator's: over numpy arrays, between bytes that guard them."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spilld.cuda_ext.device.base import (
    Copy,
    Device,
    Kernel,
    Stream,
)

GUARD = 4096
"""Bytes on both sides of each array, of which a kernel may write none. They are NaN to what reads them."""
POISON = 0xFF


class WroteElsewhere(AssertionError):
    """A kernel changed what is around its arrays, or an array that it only reads."""


class OnGpu:
    copied_bytes = None

    def __init__(self, device: Device[Any], kernel: Kernel) -> None:
        self._device, self._kernel = device, kernel

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        *arguments: Any,
        **_: object,
    ) -> None:
        """Threads and shared memory are the kernel's own, and the device has its own order.

        Raises WroteElsewhere and DeviceError.
        """
        places, nbytes = _places(arguments)
        before = np.full(nbytes, POISON, np.uint8)
        for number, part in places.items():
            before[part] = np.ascontiguousarray(arguments[number]).view(np.uint8).reshape(-1)
        after = self._run(grid, before, arguments, places)
        changed = after != before
        for number, part in places.items():
            array = arguments[number]
            if array.flags.writeable:
                array[...] = after[part].view(array.dtype).reshape(array.shape)
                changed[part] = False
        if changed.any():
            first = int(changed.argmax())
            raise WroteElsewhere(
                f"{kernel} changed {int(changed.sum())} bytes that it may not, {_where(places, first)}"
            )

    def _run(
        self,
        grid: tuple[int, int, int],
        before: NDArray[np.uint8],
        arguments: tuple[Any, ...],
        places: dict[int, slice],
    ) -> NDArray[np.uint8]:
        """The same memory after a launch over it."""
        device, nbytes = self._device, before.nbytes
        host = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        host[:] = before
        there, here = device.allocate(nbytes), host.ctypes.data
        device.register(here, nbytes)
        try:
            values = [there + places[i].start if i in places else x for i, x in enumerate(arguments)]
            device.copy(Stream.COMPUTE, [Copy(there, here, nbytes)])
            self._kernel.launch(Stream.COMPUTE, grid, *values)
            device.copy(Stream.COMPUTE, [Copy(here, there, nbytes)])
            device.record(Stream.COMPUTE).synchronise()
            return host.copy()
        finally:
            device.unregister(here)
            device.free(there)


def _places(arguments: tuple[Any, ...]) -> tuple[dict[int, slice], int]:
    """Of each array its bytes in one allocation, by its number among the arguments, and the bytes of all."""
    places, at = {}, GUARD
    for number, array in enumerate(arguments):
        if isinstance(array, np.ndarray):
            places[number] = slice(at, at + array.nbytes)
            at = -(-(at + array.nbytes + GUARD) // GUARD) * GUARD
    return places, at


def _where(places: dict[int, slice], byte: int) -> str:
    number, part = min(places.items(), key=lambda item: abs(item[1].start - byte))
    nbytes = part.stop - part.start
    return f"the first {byte - part.start} bytes from the start of argument {number}, which has {nbytes}"
