"""A CUDA GPU as a device."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spilld.cuda_ext.compile.build import cubin
from spilld.cuda_ext.compile.variant import SHARED_WITHOUT_ASKING, Variant
from spilld.cuda_ext.errors import (
    DeviceError,
    NoDevice,
    OutOfMemory,
    RegistrationRefused,
)

from .base import Copy, Stream
from .driver import Driver, Refused
from .ranges import AddressRanges
from .tensors import Array, gpu_errors, on_gpu

REGISTER_BYTES = 64 << 30
"""Host memory is registered in parts of this size: a driver may refuse larger ones."""


class CudaDevice:
    """One GPU, called by one thread at a time.

    It works in the GPU's primary context, as torch does, so that each can use the other's memory.
    """

    def __init__(self, number: int = 0, *, register_bytes: int = REGISTER_BYTES) -> None:
        """Open the GPU of this number.

        Args:
            number: As the driver counts GPUs.
            register_bytes: Host memory is registered in parts of this size.

        Raises:
            NoDevice: There is no such GPU, or it cannot map memory on demand.
            DriverMissing: There is no NVIDIA driver.
            DriverTooOld: The driver is too old for the kernels.
        """
        self.driver = Driver()
        api = self.driver.api
        self._number, self._device = number, self.driver("cuDeviceGet", number)
        self.name = self.driver("cuDeviceGetName", 128, self._device).split(b"\0")[0].decode()
        self.architecture = (
            f"sm_{self._attribute('COMPUTE_CAPABILITY_MAJOR')}{self._attribute('COMPUTE_CAPABILITY_MINOR')}"
        )
        if not self._attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"):
            raise NoDevice(
                f"{self.name} cannot map memory on demand; GPUs from sm_80 on can, with their own driver"
            )
        self._register_bytes = register_bytes
        self._allocated, self._reserved, self._mapped, self._registered = (AddressRanges() for _ in range(4))
        self._parts = AddressRanges()  # of registered memory, as the driver knows them
        self._events: list[Any] = []  # all events, idle or not
        self._idle_events: list[Any] = []
        self._libraries: list[Any] = []
        self._streams: dict[Stream, Any] = {}
        self.driver.attach(self.driver("cuDevicePrimaryCtxRetain", self._device))
        self._closed = False
        try:
            self._memory = self._properties()
            minimum = api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
            self.page_bytes = int(self.driver("cuMemGetAllocationGranularity", self._memory, minimum))
            for stream in Stream:
                flag = api.CUstream_flags.CU_STREAM_NON_BLOCKING
                self._streams[stream] = self.driver("cuStreamCreate", flag)
        except DeviceError:
            self.close()
            raise

    def load(self, image: bytes, name: str, *, threads: int = 32, shared_bytes: int = 0) -> CudaKernel:
        """See Device.load.

        Args:
            image: A CUBIN for this GPU's architecture.
            name: The kernel's name in the image.
            threads: Threads of each block.
            shared_bytes: Dynamic shared memory of each block.

        Raises:
            KeyError: The image has no kernel of that name.
            ValueError: The CUBIN is for another architecture, or a block cannot have so much shared memory.
        """
        try:
            library = self.driver("cuLibraryLoadData", image, [], [], 0, [], [], 0)
        except Refused as refused:
            raise ValueError(f"this is not a CUBIN for {self.architecture}: {refused}") from refused
        self._libraries.append(library)
        try:
            kernel = self.driver("cuLibraryGetKernel", library, name.encode())
        except Refused as refused:
            raise KeyError(name) from refused
        if shared_bytes > SHARED_WITHOUT_ASKING:
            attribute = self.driver.api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            try:
                self.driver("cuKernelSetAttribute", attribute, shared_bytes, kernel, self._device)
            except Refused as refused:
                raise ValueError(f"{name} cannot have {shared_bytes} bytes of shared memory") from refused
        function = self.driver("cuKernelGetFunction", kernel)
        return CudaKernel(self, name, function, tuple(self._sizes(kernel)), threads, shared_bytes)

    def compiled(self, variant: Variant, cache: Path) -> CudaKernel:
        """Load a kernel of this package, compiling it if it is not there yet.

        Args:
            variant: The kernel and its constants.
            cache: The folder for compiled kernels.

        Raises:
            CompilerMissing: It has to be compiled, and there is no NVRTC.
            KernelRejected: NVRTC does not compile it.
        """
        image = cubin(variant, self.architecture, cache)
        return self.load(image, variant.name, threads=variant.threads, shared_bytes=variant.shared_bytes)

    def allocate(self, nbytes: int) -> int:
        """See Device.allocate."""
        if nbytes < 1:
            raise ValueError(f"cannot allocate {nbytes} bytes")
        address = int(self.driver("cuMemAlloc", nbytes))
        self._allocated.add(address, nbytes)
        return address

    def free(self, address: int) -> None:
        """See Device.free.

        Raises:
            ValueError: Nothing was allocated there.
        """
        self._known(self._allocated, address)
        self.driver("cuMemFree", address)
        self._allocated.remove(address)

    def register(self, address: int, nbytes: int) -> None:
        """See Device.register.

        Raises:
            RegistrationRefused: None of it is pinned then.
            ValueError: These are not whole pages, or a part is registered already.
        """
        if address % 4096 or nbytes % 4096:
            raise ValueError(f"{nbytes} bytes at {address:#x} are not whole pages")
        self._registered.add(address, nbytes)
        try:
            for start in range(address, address + nbytes, self._register_bytes):
                part = min(self._register_bytes, address + nbytes - start)
                self.driver("cuMemHostRegister", start, part, 0)
                self._parts.add(start, part)
        except (OutOfMemory, Refused) as error:
            self.unregister(address)
            raise RegistrationRefused(
                f"{nbytes} bytes of host memory cannot be pinned ({error}): lower host_budget, or raise the"
                " limit of locked memory (LimitMEMLOCK=infinity in the unit, ulimit -l in a shell)"
            ) from error

    def unregister(self, address: int) -> None:
        """See Device.unregister.

        Raises:
            ValueError: Nothing was registered there.
        """
        nbytes = self._known(self._registered, address)
        for part in self._parts.touched(address, nbytes):
            self.driver("cuMemHostUnregister", part)
            self._parts.remove(part)
        self._registered.remove(address)

    def copy(self, stream: Stream, copies: Sequence[Copy]) -> None:
        """See Device.copy."""
        parts = [part for copy in copies for part in self._within_parts(copy)]
        if not parts:
            return
        api = self.driver.api
        attributes = api.CUmemcpyAttributes()
        # Hazard: any other order lets the driver read a source before the work that writes it.
        attributes.srcAccessOrder = api.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        to, sources, sizes = (list(column) for column in zip(*parts, strict=True))
        # Hazard: batches are refused by the default stream, and cannot be captured into a graph.
        self.driver(
            *("cuMemcpyBatchAsync", [api.CUdeviceptr(x) for x in to], [api.CUdeviceptr(x) for x in sources]),
            *(sizes, len(parts), [attributes], [0], 1, self._streams[stream]),
        )

    def compute(self, stream: Stream, work: Callable[..., object], *arrays: Array) -> None:
        """See Device.compute; only where torch finds this GPU."""
        here, gpu = int(self._streams[stream]), torch.device("cuda", self._number)
        with gpu_errors():
            there = torch.cuda.ExternalStream(here, gpu)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(there):
                work(*(on_gpu(array, self._number) for array in arrays))

    def record(self, stream: Stream) -> CudaEvent:
        """See Device.record."""
        event = CudaEvent(self, self._idle_events.pop() if self._idle_events else self._new_event())
        self.driver("cuEventRecord", event.handle, self._streams[stream])
        return event

    def reserve(self, nbytes: int) -> int:
        """See Device.reserve."""
        self._whole_pages(nbytes)
        try:
            address = int(self.driver("cuMemAddressReserve", nbytes, 0, 0, 0))
        except Refused as refused:
            raise OutOfMemory(f"no range of {nbytes} addresses is free: {refused}") from refused
        self._reserved.add(address, nbytes)
        return address

    def release(self, address: int) -> None:
        """See Device.release.

        Raises:
            ValueError: Nothing was reserved there, or a part of it is mapped.
        """
        nbytes = self._known(self._reserved, address)
        if self._mapped.touched(address, nbytes):
            raise ValueError(f"a part of what was reserved at {address:#x} is mapped")
        self.driver("cuMemAddressFree", address, nbytes)
        self._reserved.remove(address)

    def map(self, address: int, nbytes: int) -> None:
        """See Device.map.

        Raises:
            OutOfMemory: Nothing is mapped then.
            ValueError: The range was not reserved, a part of it is mapped, or these are not whole pages.
        """
        self._whole_pages(address, nbytes)
        if self._reserved.holder(address, nbytes) is None:
            raise ValueError(f"{nbytes} bytes at {address:#x} were not reserved")
        self._mapped.add(address, nbytes)
        try:
            self._map(address, nbytes)
        except DeviceError:
            self._mapped.remove(address)
            raise

    def unmap(self, address: int, nbytes: int) -> None:
        """See Device.unmap.

        Raises:
            ValueError: No call of `map` backed exactly this range.
        """
        if self._mapped.size(address) != nbytes:
            raise ValueError(f"no call of map backed {nbytes} bytes at {address:#x}")
        self.driver("cuMemUnmap", address, nbytes)
        self._mapped.remove(address)

    def close(self) -> None:
        """See Device.close."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(DeviceError):
            self.driver("cuCtxSynchronize")
        for function, arguments in self._release_calls():
            with contextlib.suppress(DeviceError):  # a lost device refuses every call
                self.driver(function, *arguments)
        for ranges in (self._allocated, self._reserved, self._mapped, self._registered, self._parts):
            for address, _ in list(ranges):
                ranges.remove(address)

    def _release_calls(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Yield the driver calls that give everything back."""
        yield from (("cuMemUnmap", mapped) for mapped in self._mapped)
        yield from (("cuMemAddressFree", reserved) for reserved in self._reserved)
        yield from (("cuMemFree", (address,)) for address, _ in self._allocated)
        yield from (("cuMemHostUnregister", (address,)) for address, _ in self._parts)
        yield from (("cuLibraryUnload", (library,)) for library in self._libraries)
        yield from (("cuEventDestroy", (event,)) for event in self._events)
        yield from (("cuStreamDestroy", (stream,)) for stream in self._streams.values())
        yield "cuDevicePrimaryCtxRelease", (self._device,)

    def _new_event(self) -> Any:
        self._events.append(
            self.driver("cuEventCreate", self.driver.api.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        )
        return self._events[-1]

    def _attribute(self, name: str) -> int:
        attribute = getattr(self.driver.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self.driver("cuDeviceGetAttribute", attribute, self._device))

    def _properties(self) -> Any:
        """Properties of memory that `map` takes: this GPU's own."""
        api = self.driver.api
        properties = api.CUmemAllocationProp()
        properties.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = int(self._device)
        return properties

    def _map(self, address: int, nbytes: int) -> None:
        """Create memory and map it. If it fails, nothing is mapped and no memory kept."""
        api = self.driver.api
        access = api.CUmemAccessDesc()
        access.location = self._memory.location
        access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        handle = self.driver("cuMemCreate", nbytes, self._memory, 0)
        try:
            self.driver("cuMemMap", address, nbytes, 0, handle, 0)
            try:
                self.driver("cuMemSetAccess", address, nbytes, [access], 1)
            except DeviceError:
                self.driver("cuMemUnmap", address, nbytes)
                raise
        finally:
            self.driver("cuMemRelease", handle)  # the memory stays as long as it is mapped

    def _sizes(self, kernel: Any) -> Iterator[int]:
        """Yield the bytes of each argument of a kernel."""
        with contextlib.suppress(Refused):
            for number in range(4096 // 4):
                yield int(self.driver("cuKernelGetParamInfo", kernel, number)[1])

    def _within_parts(self, copy: Copy) -> Iterator[Copy]:
        """Yield a copy, cut where its host memory goes from one registered part into the next."""
        ends = (copy.to, copy.source)
        cuts = {part - end for end in ends for part in self._parts.touched(end, copy.nbytes) if part > end}
        starts = [0, *sorted(cuts)] if copy.nbytes else []
        for start, stop in zip(starts, [*starts[1:], copy.nbytes], strict=False):
            yield Copy(copy.to + start, copy.source + start, stop - start)

    def _known(self, ranges: AddressRanges, address: int) -> int:
        nbytes = ranges.size(address)
        if nbytes is None:
            raise ValueError(f"nothing that was allocated, registered or reserved begins at {address:#x}")
        return nbytes

    def _whole_pages(self, *numbers: int) -> None:
        if any(number < 0 or number % self.page_bytes for number in numbers) or numbers[-1] == 0:
            raise ValueError(f"{numbers[-1]} bytes are not whole pages of {self.page_bytes}")


class CudaEvent:
    """An event of the driver, reused once nothing refers to it."""

    def __init__(self, device: CudaDevice, handle: Any) -> None:
        self._device, self.handle = device, handle

    def __del__(self) -> None:
        self._device._idle_events.append(self.handle)

    def before(self, stream: Stream) -> None:
        """See DeviceEvent.before."""
        self._device.driver("cuStreamWaitEvent", self._device._streams[stream], self.handle, 0)

    def passed(self) -> bool:
        """See DeviceEvent.passed."""
        try:
            self._device.driver("cuEventQuery", self.handle)
        except Refused as refused:
            if refused.status != "NOT_READY":
                raise
            return False
        return True

    def synchronise(self) -> None:
        """See DeviceEvent.synchronise."""
        self._device.driver("cuEventSynchronize", self.handle)


@dataclass(frozen=True)
class CudaKernel:
    """A kernel that is loaded on a GPU, with its block size; `sizes` are the bytes of each argument."""

    device: CudaDevice
    name: str
    function: Any
    sizes: tuple[int, ...]
    threads: int
    shared_bytes: int

    def launch(self, stream: Stream, grid: tuple[int, int, int], *arguments: int | float) -> None:
        """See Kernel.launch."""
        if len(arguments) != len(self.sizes):
            raise TypeError(f"{self.name} takes {len(self.sizes)} arguments, not {len(arguments)}")
        types = tuple(self._type(*pair) for pair in zip(arguments, self.sizes, strict=True))
        block = (self.threads, 1, 1)
        handle = self.device._streams[stream]
        self.device.driver(
            *(
                "cuLaunchKernel",
                self.function,
                *grid,
                *block,
                self.shared_bytes,
                handle,
                (arguments, types),
                0,
            )
        )

    def _type(self, argument: int | float, nbytes: int) -> Any:
        kinds = {(float, 4): ctypes.c_float, (int, 4): ctypes.c_int32, (int, 8): ctypes.c_int64}
        if (type(argument), nbytes) not in kinds:
            raise TypeError(f"{self.name} takes no {type(argument).__name__} of {nbytes} bytes")
        return kinds[type(argument), nbytes]
