"""The driver's functions over a FakeDevice: what they check themselves, and what it does for them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from functools import partial
from typing import Any

from spilld.cuda_ext.device.base import Copy, Stream
from spilld.cuda_ext.errors import LaunchFailed, OutOfMemory

from ..emulator import Emulated
from ..fake import FakeDevice, FakeEvent, FakeKernel, Fault
from .compiler import NAME

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE, INVALID_DEVICE, NO_BINARY = 0, 1, 2, 100, 101, 209
NOT_FOUND, NOT_READY, ILLEGAL_ADDRESS, REGISTERED, NOT_REGISTERED, LAUNCH_FAILED = (
    500,
    600,
    700,
    712,
    713,
    719,
)

CONTEXT, INVALID_CONTEXT = 0x1000, 201
WITHOUT_CONTEXT = {
    *("cuInit", "cuDriverGetVersion", "cuCtxSetCurrent"),
    *("cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute"),
    *("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease"),
}
"""What a thread may call whose current context is none."""
ATTRIBUTES = {75: 9, 76: 0, 97: 227 << 10, 102: 1}
"""By their numbers: compute capability 9.0, shared memory of a block, mapping on demand."""
MOST_SHARED, SHARED_WITHOUT_ASKING, MAX_DYNAMIC_SHARED = 227 << 10, 48 << 10, 8
IN_STREAM_ORDER = 1

_signatures: dict[str, tuple[Any, ...]] = {}


def function(*types: Any) -> Callable[[Any], Any]:
    def note(method: Any) -> Any:
        _signatures[method.__name__] = types
        return method

    return note


@dataclass
class Handle:
    """Physical memory."""

    nbytes: int
    kept: bool = True
    at: int | None = None
    accessible: bool = False


@dataclass
class Loaded:
    """A kernel of a CUBIN."""

    name: str
    shared_bytes: int = SHARED_WITHOUT_ASKING


class FakeDriver:
    """One GPU, which is `device`; kernels are the emulator's, and must be in the CUBIN that is loaded.

    faults: what the program did that no program may. most_registered: bytes that one call may register.
    """

    def __init__(self, device: FakeDevice, kernels: Mapping[str, Emulated]) -> None:
        self.device, self.kernels = device, kernels
        self.version, self.gpus, self.most_registered = 13000, 1, 1 << 60
        self.attributes = dict(ATTRIBUTES)
        self.faults: list[Fault] = []
        self.contexts = 0
        self.threads: set[int] = set()  # those whose current context there is
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, FakeEvent | None] = {}
        self.images: dict[int, bytes] = {}
        self.loaded: dict[int, Loaded] = {}
        self.memory: dict[int, Handle] = {}
        self._next = 0x2000

    def connect(self) -> None:
        """From now on the process's driver is this one."""
        global _current
        _current = self
        if not _kept:
            library = ctypes.CDLL(NAME)
            for name, types in _signatures.items():
                code = ctypes.CFUNCTYPE(c_int, *types)(partial(_answer, name))
                _kept.append((name.encode(), code))
                library.fake_provide(*_kept[-1])

    def assert_empty(self) -> None:
        assert self.faults == []
        self.device.assert_empty()
        assert self.device.held_bytes == 0
        assert self.contexts == 0
        for left in (self.streams, self.events, self.images, self.memory):
            assert not left

    def _handle(self) -> int:
        self._next += 16
        return self._next

    @function(c_uint)
    def cuInit(self, flags: int) -> int:
        return SUCCESS if self.gpus else NO_DEVICE

    @function(c_void_p)
    def cuDriverGetVersion(self, version: int) -> None:
        c_int.from_address(version).value = self.version

    @function(c_void_p, c_int)
    def cuDeviceGet(self, device: int, number: int) -> int | None:
        if number >= self.gpus:
            return INVALID_DEVICE
        c_int.from_address(device).value = number
        return None

    @function(c_void_p, c_int, c_int)
    def cuDeviceGetName(self, name: int, size: int, device: int) -> None:
        ctypes.memmove(name, b"no GPU\0", 7)

    @function(c_void_p, c_int, c_int)
    def cuDeviceGetAttribute(self, value: int, attribute: int, device: int) -> None:
        c_int.from_address(value).value = self.attributes[attribute]

    @function(c_void_p, c_int)
    def cuDevicePrimaryCtxRetain(self, context: int, device: int) -> None:
        self.device.call("create")
        self.contexts += 1
        c_void_p.from_address(context).value = CONTEXT

    @function(c_int)
    def cuDevicePrimaryCtxRelease(self, device: int) -> None:
        self.contexts -= 1

    @function(c_void_p)
    def cuCtxSetCurrent(self, context: int) -> None:
        assert context == CONTEXT
        self.threads.add(threading.get_ident())

    @function()
    def cuCtxSynchronize(self) -> None:
        self.device.call("synchronise")
        self.device.synchronise()

    @function(c_void_p, c_void_p)
    def cuMemGetInfo(self, free: int, total: int) -> None:
        c_size_t.from_address(total).value = self.device.memory_bytes
        c_size_t.from_address(free).value = self.device.memory_bytes - self.device.used_bytes

    @function(c_void_p, c_size_t)
    def cuMemAlloc(self, address: int, nbytes: int) -> None:
        c_uint64.from_address(address).value = self.device.allocate(nbytes)

    @function(c_uint64)
    def cuMemFree(self, address: int) -> None:
        self.device.free(address)

    @function(c_void_p, c_size_t, c_uint)
    def cuMemHostRegister(self, address: int, nbytes: int, flags: int) -> int | None:
        if nbytes > self.most_registered:
            return INVALID_VALUE
        if self.device.registered.touched(address, nbytes):
            return REGISTERED
        self.device.register(address, nbytes)
        return None

    @function(c_void_p)
    def cuMemHostUnregister(self, address: int) -> int | None:
        if self.device.registered.size(address) is None:
            return NOT_REGISTERED
        self.device.unregister(address)
        return None

    @function(c_void_p, c_void_p, c_uint)
    def cuMemGetAllocationGranularity(self, nbytes: int, properties: int, option: int) -> None:
        c_size_t.from_address(nbytes).value = self.device.page_bytes

    @function(c_void_p, c_size_t, c_size_t, c_uint64, c_uint64)
    def cuMemAddressReserve(self, address: int, nbytes: int, align: int, at: int, flags: int) -> None:
        c_uint64.from_address(address).value = self.device.reserve(nbytes)

    @function(c_uint64, c_size_t)
    def cuMemAddressFree(self, address: int, nbytes: int) -> int | None:
        if self.device.reserved.size(address) != nbytes or self._mappings(address, nbytes):
            return INVALID_VALUE
        self.device.release(address)
        return None

    @function(c_void_p, c_size_t, c_void_p, c_uint64)
    def cuMemCreate(self, handle: int, nbytes: int, properties: int, flags: int) -> int | None:
        if nbytes % self.device.page_bytes:
            return INVALID_VALUE
        self.device.call("create")
        self.device.charge(nbytes)
        self.device.held_bytes += nbytes
        c_uint64.from_address(handle).value = number = self._handle()
        self.memory[number] = Handle(nbytes)
        return None

    @function(c_uint64)
    def cuMemRelease(self, handle: int) -> None:
        self.memory[handle].kept = False
        self._forget(handle)

    @function(c_uint64, c_size_t, c_size_t, c_uint64, c_uint64)
    def cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> int | None:
        memory = self.memory[handle]
        if memory.nbytes != nbytes or self._mappings(address, nbytes):
            return INVALID_VALUE
        self.device.call("create")
        memory.at = address
        return None

    @function(c_uint64, c_size_t, c_void_p, c_size_t)
    def cuMemSetAccess(self, address: int, nbytes: int, descriptions: int, count: int) -> int | None:
        found = self._mappings(address, nbytes)
        if len(found) != 1 or self.memory[found[0]].at != address:
            return INVALID_VALUE
        self.device.held_bytes -= nbytes
        try:
            self.device.map(address, nbytes)
        except (OutOfMemory, LaunchFailed):
            self.device.held_bytes += nbytes
            raise
        self.memory[found[0]].accessible = True
        return None

    @function(c_uint64, c_size_t)
    def cuMemUnmap(self, address: int, nbytes: int) -> int | None:
        found = self._mappings(address, nbytes)
        if len(found) != 1 or self.memory[found[0]].at != address or self.memory[found[0]].nbytes != nbytes:
            return INVALID_VALUE
        memory = self.memory[found[0]]
        if memory.accessible:
            self.device.unmap(address, nbytes)
            self.device.held_bytes += nbytes
        memory.at, memory.accessible = None, False
        self._forget(found[0])
        return None

    @function(c_void_p, c_uint)
    def cuStreamCreate(self, stream: int, flags: int) -> int | None:
        free = [kind for kind in Stream if kind not in self.streams.values()]
        if not free:
            return OUT_OF_MEMORY
        self.device.call("create")
        c_void_p.from_address(stream).value = handle = self._handle()
        self.streams[handle] = free[0]
        return None

    @function(c_void_p)
    def cuStreamDestroy(self, stream: int) -> None:
        del self.streams[stream]

    @function(c_void_p, c_void_p, c_uint)
    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        recorded = self.events[event]
        if recorded is not None:
            recorded.before(self.streams[stream])

    @function(c_void_p, c_uint)
    def cuEventCreate(self, event: int, flags: int) -> None:
        self.device.call("create")
        c_void_p.from_address(event).value = handle = self._handle()
        self.events[handle] = None

    @function(c_void_p)
    def cuEventDestroy(self, event: int) -> None:
        del self.events[event]

    @function(c_void_p, c_void_p)
    def cuEventRecord(self, event: int, stream: int) -> None:
        self.events[event] = self.device.record(self.streams[stream])

    @function(c_void_p)
    def cuEventQuery(self, event: int) -> int:
        recorded = self.events[event]
        return SUCCESS if recorded is None or recorded.passed() else NOT_READY

    @function(c_void_p)
    def cuEventSynchronize(self, event: int) -> None:
        recorded = self.events[event]
        if recorded is not None:
            recorded.synchronise()

    @function(c_uint64, c_uint64, c_size_t, c_void_p)
    def cuMemcpyAsync(self, to: int, source: int, nbytes: int, stream: int) -> int | None:
        if stream not in self.streams:
            return INVALID_VALUE
        self.device.copy(self.streams[stream], [Copy(to, source, nbytes)])
        return None

    @function(c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_void_p, c_size_t, c_void_p)
    def cuMemcpyBatchAsync(
        self,
        to: int,
        sources: int,
        sizes: int,
        count: int,
        attributes: int,
        starts: int,
        kinds: int,
        stream: int,
    ) -> int | None:
        if stream not in self.streams or not 0 < kinds <= count or c_size_t.from_address(starts).value:
            return INVALID_VALUE
        if c_int.from_address(attributes).value != IN_STREAM_ORDER:
            raise Fault("sources are read out of the stream's order")
        columns = ((c_uint64 * count).from_address(column) for column in (to, sources, sizes))
        self.device.copy(self.streams[stream], [Copy(*row) for row in zip(*columns, strict=True)])
        return None

    @function(c_void_p, c_void_p, c_void_p, c_void_p, c_uint, c_void_p, c_void_p, c_uint)
    def cuLibraryLoadData(self, library: int, image: int, *options: Any) -> int | None:
        if ctypes.string_at(image, 4) != b"\x7fELF":
            return NO_BINARY
        self.device.call("create")
        sections = c_uint64.from_address(image + 40).value
        size, count = (ctypes.c_uint16.from_address(image + at).value for at in (58, 60))
        c_void_p.from_address(library).value = handle = self._handle()
        self.images[handle] = ctypes.string_at(image, sections + size * count)
        return None

    @function(c_void_p)
    def cuLibraryUnload(self, library: int) -> None:
        del self.images[library]

    @function(c_void_p, c_void_p, c_char_p)
    def cuLibraryGetKernel(self, kernel: int, library: int, name: bytes) -> int | None:
        if name.decode() not in self.kernels or b".text." + name + b"\0" not in self.images[library]:
            return NOT_FOUND
        c_void_p.from_address(kernel).value = handle = self._handle()
        self.loaded[handle] = Loaded(name.decode())
        return None

    @function(c_void_p, c_void_p)
    def cuKernelGetFunction(self, function: int, kernel: int) -> None:
        c_void_p.from_address(function).value = kernel

    @function(c_int, c_int, c_void_p, c_int)
    def cuKernelSetAttribute(self, attribute: int, value: int, kernel: int, device: int) -> int | None:
        if attribute != MAX_DYNAMIC_SHARED or value > MOST_SHARED:
            return INVALID_VALUE
        self.loaded[kernel].shared_bytes = value
        return None

    @function(c_void_p, c_size_t, c_void_p, c_void_p)
    def cuKernelGetParamInfo(self, kernel: int, number: int, offset: int, nbytes: int) -> int | None:
        sizes = self._sizes(self.loaded[kernel].name)
        if number >= len(sizes):
            return INVALID_VALUE
        c_size_t.from_address(nbytes).value = sizes[number]
        return None

    @function(c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p)
    def cuLaunchKernel(self, kernel: int, *rest: Any) -> int | None:
        gx, gy, gz, bx, by, bz, shared_bytes, stream, parameters, _ = rest
        loaded = self.loaded[kernel]
        if min(gx, gy, gz, bx) < 1 or max(gy, gz) > 65535 or bx > 1024 or (by, bz) != (1, 1):
            return INVALID_VALUE
        if shared_bytes > loaded.shared_bytes:
            return INVALID_VALUE
        image = self.kernels[loaded.name]
        pointers = (c_void_p * len(self._sizes(loaded.name))).from_address(parameters)
        kinds = image.kinds(loaded.name)
        arguments = [_argument(pointer, kind) for pointer, kind in zip(pointers, kinds, strict=True)]
        fake = FakeKernel(self.device, image, loaded.name, bx, shared_bytes)
        fake.launch(self.streams[stream], (gx, gy, gz), *arguments)
        return None

    def _sizes(self, name: str) -> list[int]:
        return [abs(kind) or 8 for kind in self.kernels[name].kinds(name)]

    def _mappings(self, address: int, nbytes: int) -> list[int]:
        """Handles of memory that is mapped to a part of this range."""
        return [
            handle
            for handle, memory in self.memory.items()
            if memory.at is not None and memory.at < address + nbytes and address < memory.at + memory.nbytes
        ]

    def _forget(self, handle: int) -> None:
        memory = self.memory[handle]
        if not memory.kept and memory.at is None:
            self.device.held_bytes -= memory.nbytes
            del self.memory[handle]


# cuda.bindings asks for each function once and calls it until the process ends.
_kept: list[tuple[bytes, Any]] = []
_current: FakeDriver


def _answer(name: str, *arguments: Any) -> int:
    if name not in WITHOUT_CONTEXT and threading.get_ident() not in _current.threads:
        return INVALID_CONTEXT
    try:
        return getattr(_current, name)(*arguments) or SUCCESS
    except OutOfMemory:
        return OUT_OF_MEMORY
    except LaunchFailed:
        return LAUNCH_FAILED
    except Fault as fault:
        _current.faults.append(fault)
        return ILLEGAL_ADDRESS
    except (ValueError, TypeError):
        return INVALID_VALUE


def _argument(pointer: int | None, kind: int) -> int | float:
    """kind: as the emulator says it."""
    assert pointer is not None
    types: dict[int, Any] = {-4: ctypes.c_float, 4: c_int, 8: ctypes.c_int64, 0: c_uint64}
    value: int | float = types[kind].from_address(pointer).value
    return value
