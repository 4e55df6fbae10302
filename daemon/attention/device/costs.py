"""Costs of attending to a record, measured at start: by the device that fetches it, or by the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from spilld.cuda_ext.compile.variant import ROWS
from spilld.cuda_ext.device.base import Device, Stream
from spilld.cuda_ext.flash import Flash
from spilld.cuda_ext.memory.record_pool import RecordPool
from spilld.cuda_ext.memory.staging import Staging
from spilld.cuda_ext.ops import Ops, Queries, Records
from spilld.cuda_ext.transfer_costs import PROMPT, Costs, Rates
from spilld.offload.kernels.attention.partial import Partial
from spilld.offload.kernels.codec import samples
from spilld.offload.record import BLOCK, Layout
from spilld.offload.system import PAGE, page_aligned

MEASURED = 256
"""Records of a measurement: megabytes, so that a call's fixed time matters little."""

ROUNDS = 3
LEAST_S = 1e-9


def measure(
    device: Device[Any], ops: Ops, flash: Flash | None, layout: Layout, records: int = MEASURED
) -> Costs:
    """Time the device and the CPU with one query and with ROWS of them, and flash attention.

    Raises:
        OutOfMemory: The device has no memory for the trial.
        RegistrationRefused: Host memory cannot be registered with the device.
    """
    trial = _Trial(device, ops, flash, layout, records)
    try:
        one, many = (_rates(trial, records, queries) for queries in (1, ROWS))
        copied, _ = _line(trial.copy, records, ROWS)
        flashed = _line(trial.flash, records, PROMPT)[0] if flash else 0.0
        return Costs(one, many, copied * trial.record_bytes, flashed * trial.record_bytes)
    finally:
        trial.close()


def _rates(trial: _Trial, records: int, queries: int) -> Rates:
    fetched, fetch_s = _line(trial.fetch, records, queries)
    attended, cpu_s = _line(trial.attend, records, queries)
    return Rates(fetched * trial.record_bytes, fetch_s, attended * trial.record_bytes, cpu_s)


def _line(work: Callable[[int, int], None], records: int, queries: int) -> tuple[float, float]:
    """Return records a second, and seconds of a call with one record: the best of some rounds."""
    seconds = []
    for count in (1, records):
        rounds = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            work(count, queries)
            rounds.append(time.perf_counter() - began)
        seconds.append(min(rounds))
    return (records - 1) / max(LEAST_S, seconds[1] - seconds[0]), seconds[0]


class _Trial:
    """Random records in registered host memory, and random queries."""

    def __init__(
        self, device: Device[Any], ops: Ops, flash: Flash | None, layout: Layout, records: int
    ) -> None:
        self._device, self._ops, self._flash, self._layout = device, ops, flash, layout
        self.record_bytes = layout.record_bytes
        self._host = page_aligned(-(-records * layout.record_bytes // PAGE) * PAGE)
        samples.fill(layout, self._host[: records * layout.record_bytes].reshape(records, -1))
        shape = (max(ROWS, PROMPT), ops.heads, layout.head_dim)
        self._queries = np.random.default_rng(0).standard_normal(shape, np.float32)
        self._positions = np.arange(1, records + 1) * BLOCK
        self._places = np.arange(records) * layout.record_bytes
        self._bounds = np.zeros(ROWS, np.int64), np.full(ROWS, (records + 1) * BLOCK)
        self._partial = Partial(layout)
        rows = max(3 * ROWS * ops.heads + ops.partial_rows(ROWS), 2 * PROMPT * ops.heads)
        self._staging = Staging(device, 4 * rows * (layout.head_dim + 1) + 16 * records + PAGE)
        self._pool = RecordPool(device, records * layout.record_bytes, layout.record_bytes)
        self._slots = self._pool.take(records)
        device.register(self._host.ctypes.data, self._host.nbytes)

    def copy(self, count: int, queries: int) -> None:
        sources = (self._host.ctypes.data + self._places[:count]).tolist()
        self._pool.fill(self._slots[:count], sources).synchronise()

    def fetch(self, count: int, queries: int) -> None:
        ops, staging, pool, slots = self._ops, self._staging, self._pool, self._slots[:count]
        pool.fill(slots, (self._host.ctypes.data + self._places[:count]).tolist())
        with staging.turn(), pool.use(Stream.COMPUTE, reads=slots):
            low, high = (bound[:queries] for bound in self._bounds)
            places = np.array(slots) * self._layout.record_bytes
            q = self._queries[:queries]
            at = staging.bring(q, low, high, places, self._positions[:count])
            to = ops.room(staging, ops.parts(count, queries), queries)
            records = Records(pool.address(0), at[3], at[4], count)
            ops.attend_records(to, Queries(at[0], queries), records, at[1], at[2], 1.0, 0.0)
            staging.fetch(to.out, q.shape)
        staging.settle()

    def flash(self, count: int, queries: int) -> None:
        """Run flash attention over what `copy` has brought."""
        assert self._flash is not None
        staging, pool, slots = self._staging, self._pool, self._slots[:count]
        with staging.turn(), pool.use(Stream.COMPUTE, reads=slots):
            places = np.array(slots) * self._layout.record_bytes
            at = staging.bring(self._queries[:queries], places, self._positions[:count])
            to = self._ops.room(staging, 1, queries)
            records = Records(pool.address(0), at[1], at[2], count)
            self._flash.attend(to, Queries(at[0], queries), records, 1.0)
            staging.fetch(to.lse, (1,))
        staging.settle()

    def attend(self, count: int, queries: int) -> None:
        low, high = (bound[:queries] for bound in self._bounds)
        q = self._queries[:queries]
        out, lse = np.empty_like(q), np.empty(q.shape[:2], np.float32)
        places, positions = self._places[:count], self._positions[:count]
        self._partial.attend(q, self._host, places, positions, low, high, 1.0, 0.0, out, lse)

    def close(self) -> None:
        self._pool.close()
        self._staging.close()
        self._device.unregister(self._host.ctypes.data)
