"""What every device must do: the CPU, the fake, and CUDA over a fake driver and over a real one."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spilld.cuda_ext.device.base import (
    Copy,
    Device,
    DeviceEvent,
    Kernel,
    Stream,
)
from spilld.cuda_ext.device.tensors import Array
from spilld.cuda_ext.errors import OutOfMemory

Floats = NDArray[np.float32]

TURN_BYTES = 60128
"""Dynamic shared memory of the kernel `turn`."""


class Host:
    """Page-aligned host memory that a device has registered."""

    def __init__(self, device: Device[Any], nbytes: int) -> None:
        self._device = device
        self._memory = mmap.mmap(-1, -(-nbytes // 4096) * 4096)
        self.bytes = np.frombuffer(self._memory, np.uint8)
        self.address = self.bytes.ctypes.data
        device.register(self.address, self.bytes.nbytes)

    def floats(self, at: int, count: int) -> Floats:
        return self.bytes[at : at + 4 * count].view(np.float32)


@contextlib.contextmanager
def allocated(device: Device[Any], nbytes: int) -> Iterator[int]:
    address = device.allocate(nbytes)
    yield address
    device.free(address)


def fill(host: Host, seed: int = 3) -> NDArray[np.uint8]:
    """Random bytes, of which no float32 is NaN, and a copy of them."""
    numbers = np.random.default_rng(seed).standard_normal(host.bytes.nbytes // 4).astype(np.float32)
    host.bytes[:] = numbers.view(np.uint8)
    return host.bytes.copy()


class ComputeContract:
    """What a device does that torch can use; subclasses provide the fixture `device`."""

    def test_torch_between_copies(self, device: Device[Any]) -> None:
        """In a stream's order, over arrays of several kinds at once."""
        host = Host(device, 4096)
        fill(host)
        numbers = host.floats(0, 60).copy().reshape(3, 4, 5)
        halves = torch.from_numpy(numbers).to(torch.bfloat16)
        with allocated(device, 240) as source, allocated(device, 120) as target:
            given = Array(source, (3, 4, 5), torch.float32), Array(target, (4, 15), torch.bfloat16)
            device.copy(Stream.COMPUTE, [Copy(source, host.address, 240)])
            device.compute(Stream.COMPUTE, lambda x, y: y.copy_(x.view(y.shape)), *given)
            device.compute(Stream.COMPUTE, lambda x: x.mul_(2), given[0])
            device.compute(Stream.COMPUTE, lambda x, y: x[1].copy_(y.view(-1)[:20].view(4, 5)), *given)
            back = [Copy(host.address + 1024, source, 240), Copy(host.address + 2048, target, 120)]
            device.copy(Stream.COMPUTE, back)
            device.record(Stream.COMPUTE).synchronise()
        wanted = numbers * 2
        wanted[1] = halves[0].float().numpy()
        np.testing.assert_array_equal(host.floats(1024, 60).reshape(3, 4, 5), wanted)
        np.testing.assert_array_equal(host.bytes[2048:2168], halves.view(torch.uint8).numpy().ravel())
        device.unregister(host.address)

    def test_an_event_behind_torch(self, device: Device[Any]) -> None:
        host = Host(device, 4096)
        with allocated(device, 40) as address:
            device.compute(Stream.COMPUTE, lambda x: x.fill_(7), Array(address, (10,), torch.float32))
            device.record(Stream.COMPUTE).before(Stream.COPY_OUT)
            device.copy(Stream.COPY_OUT, [Copy(host.address, address, 40)])
            device.record(Stream.COPY_OUT).synchronise()
        assert (host.floats(0, 10) == 7).all()
        device.unregister(host.address)


class DeviceContract:
    """Subclasses provide the fixtures `device`, and `shift` and `turn`: the kernels of shift.cu."""

    @pytest.fixture
    def host(self, device: Device[Any]) -> Host:
        return Host(device, 64 << 10)

    def bring(self, device: Device[Any], host: Host, at: int, address: int, nbytes: int) -> DeviceEvent:
        device.copy(Stream.COPY_IN, [Copy(address, host.address + at, nbytes)])
        return device.record(Stream.COPY_IN)

    def take(self, device: Device[Any], host: Host, at: int, address: int, nbytes: int) -> None:
        """Copies out, behind what the copy-out stream waits for, and waits for it."""
        device.copy(Stream.COPY_OUT, [Copy(host.address + at, address, nbytes)])
        device.record(Stream.COPY_OUT).synchronise()

    def test_bytes_come_back(self, device: Device[Any], host: Host) -> None:
        sent = fill(host)[:5000]
        with allocated(device, 5000) as address:
            self.bring(device, host, 0, address, 5000).before(Stream.COPY_OUT)
            self.take(device, host, 8192, address, 5000)
        np.testing.assert_array_equal(host.bytes[8192:13192], sent)
        np.testing.assert_array_equal(host.bytes[:5000], sent)

    def test_a_batch_lands_whole(self, device: Device[Any], host: Host) -> None:
        sent = fill(host)[: 50 * 100]
        with allocated(device, 50 * 256) as address:
            batch = [Copy(address + 256 * (49 - i), host.address + 100 * i, 100) for i in range(50)]
            device.copy(Stream.COPY_IN, batch)
            device.record(Stream.COPY_IN).before(Stream.COPY_OUT)
            back = [Copy(host.address + 8192 + 100 * i, c.to, 100) for i, c in enumerate(batch)]
            device.copy(Stream.COPY_OUT, back)
            device.record(Stream.COPY_OUT).synchronise()
        np.testing.assert_array_equal(host.bytes[8192 : 8192 + 5000], sent)

    def test_an_empty_batch_is_nothing(self, device: Device[Any]) -> None:
        for stream in Stream:
            device.copy(stream, [])
            device.record(stream).synchronise()

    def test_a_kernel_between_copies(self, device: Device[Any], host: Host, shift: Kernel) -> None:
        fill(host)
        numbers, result = host.floats(0, 1000), host.floats(8192, 1000)
        wanted = numbers + np.float32(0.25)
        with allocated(device, 4000) as source, allocated(device, 4000) as target:
            self.bring(device, host, 0, source, 4000).before(Stream.COMPUTE)
            shift.launch(Stream.COMPUTE, (32, 1, 1), target, source, 1000, 0.25)
            device.record(Stream.COMPUTE).before(Stream.COPY_OUT)
            self.take(device, host, 8192, target, 4000)
        np.testing.assert_array_equal(result, wanted)

    def test_a_stream_keeps_its_order(self, device: Device[Any], host: Host, shift: Kernel) -> None:
        fill(host)
        wanted = host.floats(0, 100) + np.float32(8)
        with allocated(device, 400) as address:
            device.copy(Stream.COMPUTE, [Copy(address, host.address, 400)])
            for _ in range(8):
                shift.launch(Stream.COMPUTE, (4, 1, 1), address, address, 100, 1.0)
            device.copy(Stream.COMPUTE, [Copy(host.address + 4096, address, 400)])
            device.record(Stream.COMPUTE).synchronise()
        np.testing.assert_allclose(host.floats(4096, 100), wanted, atol=1e-5)

    def test_much_shared_memory(self, device: Device[Any], host: Host, turn: Kernel) -> None:
        fill(host)
        wanted = host.floats(0, 64).reshape(2, 32)[:, ::-1].ravel()
        with allocated(device, 256) as source, allocated(device, 256) as target:
            self.bring(device, host, 0, source, 256).before(Stream.COMPUTE)
            turn.launch(Stream.COMPUTE, (2, 1, 1), target, source)
            device.record(Stream.COMPUTE).before(Stream.COPY_OUT)
            self.take(device, host, 4096, target, 256)
        np.testing.assert_array_equal(host.floats(4096, 64), wanted)

    def test_an_event_passes_when_asked_often_enough(self, device: Device[Any], host: Host) -> None:
        sent = fill(host)[:4096]
        with allocated(device, 4096) as address:
            device.copy(Stream.COPY_IN, [Copy(address, host.address, 4096)])
            device.copy(Stream.COPY_IN, [Copy(host.address + 4096, address, 4096)])
            event = device.record(Stream.COPY_IN)
            while not event.passed():
                pass
            np.testing.assert_array_equal(host.bytes[4096:8192], sent)
            event.synchronise()
            assert event.passed()

    def test_arguments_must_fit(self, device: Device[Any], shift: Kernel) -> None:
        with allocated(device, 400) as address, pytest.raises(TypeError):
            shift.launch(Stream.COMPUTE, (1, 1, 1), address, address, 100)

    def test_allocations_are_apart_and_aligned(self, device: Device[Any]) -> None:
        addresses = [device.allocate(n) for n in (1, 100, 4096, 5000)]
        assert all(address % 256 == 0 for address in addresses)
        ends = sorted(zip(addresses, (1, 100, 4096, 5000), strict=True))
        assert all(a + n <= b for (a, n), (b, _) in pairwise(ends))
        for address in addresses:
            device.free(address)
        for address in addresses:
            with pytest.raises(ValueError, match="0x"):
                device.free(address)
        with pytest.raises(ValueError, match="bytes"):
            device.allocate(0)

    def test_what_is_not_there_is_refused_and_all_is_as_it_was(self, device: Device[Any], host: Host) -> None:
        page = device.page_bytes
        sent = fill(host)[:1000]
        with allocated(device, 1000) as address:
            self.bring(device, host, 0, address, 1000).before(Stream.COPY_OUT)
            with pytest.raises(OutOfMemory):
                device.allocate(1 << 50)
            with pytest.raises(OutOfMemory):
                device.reserve(1 << 60)
            room = device.reserve(page)
            device.map(room, page)
            self.take(device, host, 4096, address, 1000)
            device.unmap(room, page)
            device.release(room)
        np.testing.assert_array_equal(host.bytes[4096:5096], sent)

    def test_registering(self, device: Device[Any]) -> None:
        memory = mmap.mmap(-1, 4 * 4096)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for start, nbytes in ((address + 1, 4096), (address, 100)):
            with pytest.raises(ValueError, match="pages"):
                device.register(start, nbytes)
        device.register(address, 2 * 4096)
        with pytest.raises(ValueError, match="already"):
            device.register(address + 4096, 4096)
        device.register(address + 2 * 4096, 4096)
        device.unregister(address)
        with pytest.raises(ValueError, match="0x"):
            device.unregister(address)
        device.register(address, 4096)
        device.unregister(address)
        device.unregister(address + 2 * 4096)

    def test_mapped_pages_are_one_range(self, device: Device[Any], host: Host) -> None:
        """Pages that were mapped one by one; some go, and come back."""
        page = device.page_bytes
        sent = fill(host)
        room = device.reserve(4 * page)
        for i in (2, 0, 1):
            device.map(room + i * page, page)
        seam = room + page - 100
        self.bring(device, host, 0, seam, 1000).before(Stream.COPY_OUT)
        self.take(device, host, 4096, seam, 1000)
        np.testing.assert_array_equal(host.bytes[4096:5096], sent[:1000])
        device.unmap(room + page, page)
        device.map(room + page, page)
        self.bring(device, host, 8192, seam, 1000).before(Stream.COPY_OUT)
        self.take(device, host, 4096, seam, 1000)
        np.testing.assert_array_equal(host.bytes[4096:5096], sent[8192:9192])
        for i in range(3):
            device.unmap(room + i * page, page)
        device.release(room)

    def test_a_range_is_reserved_mapped_unmapped_and_released_in_order(self, device: Device[Any]) -> None:
        page = device.page_bytes
        for nbytes in (page + 1, 0):
            with pytest.raises(ValueError, match=r"page|multiple|range"):
                device.reserve(nbytes)
        room = device.reserve(4 * page)
        bad = [(room + 1, page), (room, page + 1), (room + 3 * page, 2 * page), (room + 4 * page, page)]
        for address, nbytes in bad:
            with pytest.raises(ValueError, match=r"reserved|multiple|pages"):
                device.map(address, nbytes)
        device.map(room + page, 2 * page)
        with pytest.raises(ValueError, match="already"):
            device.map(room + 2 * page, page)
        for address, nbytes in ((room + page, page), (room, page)):
            with pytest.raises(ValueError, match="map"):
                device.unmap(address, nbytes)
        with pytest.raises(ValueError, match="mapped"):
            device.release(room)
        device.unmap(room + page, 2 * page)
        device.release(room)
        with pytest.raises(ValueError, match="reserved"):
            device.release(room)

    def test_closing_gives_everything_back(self, device: Device[Any], host: Host) -> None:
        page = device.page_bytes
        address = device.allocate(1000)
        device.map(device.reserve(2 * page), page)
        self.bring(device, host, 0, address, 1000)
        device.close()
        device.close()
