"""The CPU as a device: ordinary memory, and work that is done when it is given."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spilld.cuda_ext.errors import OutOfMemory

from .base import Copy, Stream
from .ranges import AddressRanges
from .tensors import Array, in_process

Function = Callable[..., None]
"""Takes the grid, then the arguments of a kernel, and does the work of the whole grid."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_NORESERVE, _FIXED = 0x4000, 0x10  # Linux's on x86-64 and arm64; the module mmap does not have them
_NO_ACCESS, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_FAILED = ctypes.c_void_p(-1).value


class _Passed:
    """The event of work that is done when it is given."""

    def before(self, stream: Stream) -> None:
        pass

    def passed(self) -> bool:
        return True

    def synchronise(self) -> None:
        pass


@dataclass(frozen=True)
class _Call:
    function: Function

    def launch(self, stream: Stream, grid: tuple[int, int, int], *arguments: int | float) -> None:
        self.function(grid, *arguments)


class CpuDevice:
    """The CPU behind the interface of a device.

    All memory is the process's own; an image is a mapping of names to Python functions. Work is done when
    it is given, so events have always passed.
    """

    name = "CPU"
    page_bytes = mmap.PAGESIZE

    def __init__(self) -> None:
        self._allocated, self._reserved, self._mapped, self._registered = (AddressRanges() for _ in range(4))

    def load(
        self, image: Mapping[str, Function], name: str, *, threads: int = 32, shared_bytes: int = 0
    ) -> _Call:
        """See Device.load."""
        return _Call(image[name])

    def allocate(self, nbytes: int) -> int:
        """See Device.allocate."""
        address = _map(None, nbytes, _READ_WRITE)
        self._allocated.add(address, nbytes)
        return address

    def free(self, address: int) -> None:
        """See Device.free."""
        _libc.munmap(address, self._allocated.remove(address))

    def register(self, address: int, nbytes: int) -> None:
        """See Device.register.

        Raises:
            ValueError: These are not whole pages, or a part is registered already.
        """
        if address % mmap.PAGESIZE or nbytes % mmap.PAGESIZE:
            raise ValueError(f"{nbytes} bytes at {address:#x} are not whole pages")
        self._registered.add(address, nbytes)

    def unregister(self, address: int) -> None:
        """See Device.unregister."""
        self._registered.remove(address)

    def copy(self, stream: Stream, copies: Sequence[Copy]) -> None:
        """See Device.copy."""
        for to, source, nbytes in copies:
            ctypes.memmove(to, source, nbytes)

    def compute(self, stream: Stream, work: Callable[..., object], *arrays: Array) -> None:
        """See Device.compute."""
        work(*map(in_process, arrays))

    def record(self, stream: Stream) -> _Passed:
        """See Device.record."""
        return _Passed()

    def reserve(self, nbytes: int) -> int:
        """See Device.reserve."""
        _whole_pages(nbytes, self.page_bytes)
        address = _map(None, nbytes, _NO_ACCESS)
        self._reserved.add(address, nbytes)
        return address

    def release(self, address: int) -> None:
        """See Device.release.

        Raises:
            ValueError: Nothing was reserved there, or a part of it is mapped.
        """
        nbytes = self._reserved.size(address)
        if nbytes is None or self._mapped.touched(address, nbytes):
            raise ValueError(f"no range was reserved at {address:#x}, or a part of it is mapped")
        _libc.munmap(address, self._reserved.remove(address))

    def map(self, address: int, nbytes: int) -> None:
        """See Device.map.

        Raises:
            OutOfMemory: Nothing is mapped then.
            ValueError: The range was not reserved, a part of it is mapped, or these are not whole pages.
        """
        _whole_pages(address | nbytes, self.page_bytes)
        if self._reserved.holder(address, nbytes) is None:
            raise ValueError(f"{nbytes} bytes at {address:#x} were not reserved")
        self._mapped.add(address, nbytes)
        try:
            _map(address, nbytes, _READ_WRITE)
        except OutOfMemory:
            self._mapped.remove(address)
            raise

    def unmap(self, address: int, nbytes: int) -> None:
        """See Device.unmap.

        Raises:
            ValueError: No call of `map` backed exactly this range.
        """
        if self._mapped.size(address) != nbytes:
            raise ValueError(f"no call of map backed {nbytes} bytes at {address:#x}")
        self._mapped.remove(address)
        _map(address, nbytes, _NO_ACCESS)

    def close(self) -> None:
        """See Device.close."""
        for ranges in (self._allocated, self._reserved):
            for address, _ in list(ranges):
                _libc.munmap(address, ranges.remove(address))
        for ranges in (self._mapped, self._registered):
            for address, _ in list(ranges):
                ranges.remove(address)


def _whole_pages(number: int, page_bytes: int) -> None:
    if number % page_bytes:
        raise ValueError(f"{number} is not a multiple of {page_bytes}")


def _map(address: int | None, nbytes: int, protection: int) -> int:
    """Map new pages at an address, or anywhere; raises OutOfMemory."""
    if nbytes < 1:
        raise ValueError(f"cannot map a range of {nbytes} bytes")
    flags = (
        _ANONYMOUS | (_FIXED if address is not None else 0) | (_NORESERVE if protection == _NO_ACCESS else 0)
    )
    found: int = _libc.mmap(address, nbytes, protection, flags, -1, 0)
    if found == _FAILED:
        raise OutOfMemory(f"this machine has no {nbytes} bytes left; lower the device budget")
    return found
