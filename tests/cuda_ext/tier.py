"""A step's attention as the device tier does it: records come into the pool, a kernel waits for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spilld.cuda_ext.compile import variant
from spilld.cuda_ext.compile.variant import ROWS, Variant
from spilld.cuda_ext.device.base import (
    Copy,
    Device,
    Kernel,
    Stream,
)
from spilld.cuda_ext.memory.record_pool import RecordPool
from spilld.offload.record import Element, Format, Layout

from .device_contract import Host
from .kernels import Records, Sums, merged
from .numbers import integers

LAYOUT = Layout(Format.K8V4, Element.BFLOAT16, 2, 64)
ATTEND: Variant = variant.attend_records(integers(LAYOUT))
BLOCKS, QUERIES, GROUP, PER_PART = 5, 2, 4, 2
TOLERANCE = 2e-2
"""Of bfloat16 products, as the matrix of kernels has it."""


def problem() -> Records:
    return Records(LAYOUT, blocks=BLOCKS, queries=QUERIES, group=GROUP)


class Step:
    """A pool that holds the blocks of one problem, and memory for a kernel's arguments."""

    def __init__(self, device: Device[Any], kernel: Kernel) -> None:
        self.device, self.kernel = device, kernel
        self.host = Host(device, 1 << 20)
        self.pool = RecordPool(device, (BLOCKS + 1) * LAYOUT.record_bytes, LAYOUT.record_bytes)
        self.room = device.allocate(256 << 10)
        self.used = 0

    def attend(self, records: Records) -> Sums:
        """Output [M, heads, head_dim] and lse [M, heads]."""
        device, slots = self.device, self.pool.take(BLOCKS)
        sources = [self.put(records.pool[row]) for row in records.rows]
        self.pool.fill(slots, sources)
        places = np.array(slots, np.int64) * LAYOUT.record_bytes
        given = (records.q, places, records.positions, records.low, records.high)
        q, places_at, positions, low, high = [self.bring(array) for array in given]
        parts, rows = -(-BLOCKS // PER_PART), QUERIES * GROUP
        out = np.zeros((parts, LAYOUT.kv_heads, rows, LAYOUT.head_dim), np.float32)
        lse = np.zeros((parts, LAYOUT.kv_heads, rows), np.float32)
        out_at, lse_at = self.place(out.nbytes), self.place(lse.nbytes)
        with self.pool.use(Stream.COMPUTE, reads=slots):
            self.kernel.launch(
                *(Stream.COMPUTE, (parts, LAYOUT.kv_heads, -(-rows // ROWS)), out_at, lse_at, q),
                *(self.pool.address(0), places_at, positions, low, high),
                *(BLOCKS, PER_PART, QUERIES, GROUP, float(records.scale), 0.0),
            )
        self.pool.give_back(slots)
        results = [(out, out_at), (lse, lse_at)]
        there = [self.put(np.zeros_like(array)) for array, _ in results]
        copies = [Copy(to, at, array.nbytes) for to, (array, at) in zip(there, results, strict=True)]
        device.copy(Stream.COMPUTE, copies)
        device.record(Stream.COMPUTE).synchronise()
        for to, (array, _) in zip(there, results, strict=True):
            start = to - self.host.address
            array[...] = self.host.bytes[start : start + array.nbytes].view(np.float32).reshape(array.shape)
        return merged(out, lse, GROUP)

    def close(self) -> None:
        self.pool.close()
        self.device.free(self.room)
        self.device.unregister(self.host.address)

    def bring(self, array: NDArray[Any]) -> int:
        """Its address in device memory, for what computes."""
        to = self.place(array.nbytes)
        self.device.copy(Stream.COMPUTE, [Copy(to, self.put(array), array.nbytes)])
        return to

    def put(self, array: NDArray[Any]) -> int:
        """Its address in host memory that nothing else uses."""
        start = self.place(array.nbytes) - self.room
        self.host.bytes[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        return self.host.address + start

    def place(self, nbytes: int) -> int:
        at = self.used
        self.used = -(-(at + nbytes) // 256) * 256
        assert self.used <= 256 << 10
        return self.room + at
