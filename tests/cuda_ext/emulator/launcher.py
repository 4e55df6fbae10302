"""Launches emulated kernels over numpy arrays."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Argument = NDArray[Any] | int | float


class EmulatorError(Exception):
    """A kernel did what no kernel may; the message says what, and which thread did it."""


class Order(enum.IntEnum):
    """Which of the threads that can run goes next."""

    ASCENDING = 0
    DESCENDING = 1
    RANDOM = 2


class Staging(enum.IntEnum):
    """When async copies land: a GPU may do either, or anything between."""

    EAGER = 0
    LATE = 1
    RANDOM = 2


class Emulated:
    """The kernels of one library that compile_kernel made."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulator_allocate.restype = ctypes.c_void_p
        self._library.emulator_allocate.argtypes = [ctypes.c_size_t]
        self._library.emulator_launch.restype = ctypes.c_char_p
        self._library.emulator_allow.restype = ctypes.c_bool

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        *arguments: Argument,
        order: Order = Order.RANDOM,
        landing: Staging = Staging.RANDOM,
        seed: int = 0,
    ) -> None:
        """Run a grid. Arrays are copied to device memory of just their size, and back when all is done.

        Raises EmulatorError, and TypeError where the arguments are not what the kernel takes.
        """
        kinds = self.kinds(kernel)
        if len(kinds) != len(arguments):
            raise TypeError(f"{kernel} takes {len(kinds)} arguments, not {len(arguments)}")
        self._library.emulator_free_all()
        arrays = {i: self._put(x) for i, x in enumerate(arguments) if isinstance(x, np.ndarray)}
        values = [_value(kernel, i, x, kinds[i], arrays.get(i)) for i, x in enumerate(arguments)]
        self._run(kernel, grid, threads, shared_bytes, values, order, landing, seed)
        for i, address in arrays.items():
            array = arguments[i]
            assert isinstance(array, np.ndarray)
            if array.flags.writeable:
                ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def __contains__(self, kernel: str) -> bool:
        return hasattr(self._library, f"enter_{kernel}")

    def values(self, kernel: str, arguments: Sequence[int | float]) -> list[Any]:
        """Arguments, addresses among them, as `launch_on` takes them. Raises TypeError if they do not fit."""
        kinds = self.kinds(kernel)
        if len(kinds) != len(arguments):
            raise TypeError(f"{kernel} takes {len(kinds)} arguments, not {len(arguments)}")
        addresses = [
            x if kind == 0 and isinstance(x, int) else None for x, kind in zip(arguments, kinds, strict=True)
        ]
        return [_value(kernel, i, x, kinds[i], addresses[i]) for i, x in enumerate(arguments)]

    def launch_on(
        self,
        memory: tuple[int, int],
        allowed: Iterable[tuple[int, int]],
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        values: list[Any],
        seed: int,
    ) -> None:
        """Run a grid over memory of the caller's, (address, bytes). Raises EmulatorError.

        allowed: what of it the kernel may touch, in ascending order.
        """
        address, nbytes = memory
        self._library.emulator_use(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
        try:
            for start, size in allowed:
                if not self._library.emulator_allow(ctypes.c_void_p(start), ctypes.c_size_t(size)):
                    raise MemoryError("the emulator knows no more ranges")
            self._run(kernel, grid, threads, shared_bytes, values, Order.RANDOM, Staging.RANDOM, seed)
        finally:
            self._library.emulator_use(None, ctypes.c_size_t(0))

    def _run(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        values: list[Any],
        order: Order,
        landing: Staging,
        seed: int,
    ) -> None:
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        wrong = self._library.emulator_launch(
            ctypes.cast(getattr(self._library, f"enter_{kernel}"), ctypes.c_void_p),
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(threads, 1, 1),
            ctypes.c_size_t(shared_bytes),
            pointers,
            ctypes.c_int(order),
            ctypes.c_int(landing),
            ctypes.c_uint64(seed),
        )
        if wrong is not None:
            raise EmulatorError(wrong.decode())

    @property
    def copied_bytes(self) -> int:
        """What the async copies of the last launch have read of device memory."""
        read = self._library.emulator_copied_bytes
        read.restype = ctypes.c_uint64
        return int(read())

    def kinds(self, kernel: str) -> list[int]:
        count = ctypes.c_int.in_dll(self._library, f"kinds_{kernel}").value
        return list((ctypes.c_int * (count + 1)).in_dll(self._library, f"kinds_{kernel}"))[1:]

    def _put(self, array: NDArray[Any]) -> int:
        if not array.flags.c_contiguous:
            raise TypeError("arrays must be C-contiguous")
        address: int | None = self._library.emulator_allocate(array.nbytes)
        if address is None:
            raise MemoryError(f"the emulator has no {array.nbytes} bytes left")
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        return address


_SCALARS: dict[tuple[type, int], Any] = {
    (float, -4): ctypes.c_float,
    (int, 4): ctypes.c_int32,
    (int, 8): ctypes.c_int64,
}


def _value(kernel: str, number: int, argument: Argument, kind: int, address: int | None) -> Any:
    if address is not None and kind == 0:
        return ctypes.c_void_p(address)
    scalar = _SCALARS.get((type(argument), kind)) if address is None else None
    if scalar is None:
        raise TypeError(f"argument {number} of {kernel} cannot be {type(argument).__name__}")
    return scalar(argument)
