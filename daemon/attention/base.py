"""attend(queries[M], sequence): exact attention over a window, host records and disk extents.

Decode is M = 1, a prefill chunk M = 512; verification of drafts will be M in between. Each tier gives
a partial (output, log-sum-exp) and the partials merge exactly. Records are read where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Protocol

import numpy as np
import torch

from spilld.cuda_ext.memory.cpu_windows import CpuBackend, CpuWindows, element_view
from spilld.kv.batch import (
    Blocks,
    Call,
    Slice,
    places,
    slots,
)
from spilld.kv.sequence import Sequence
from spilld.kv.visibility import (
    BLOCKS_PER_CELL,
    CELL,
    SINKS,
    segments,
    slot,
)
from spilld.offload.kernels.attention.rows import Row, RowAttention, Scan
from spilld.offload.kernels.codec.codec import Codec
from spilld.offload.record import BLOCK, Layout
from spilld.offload.store import Store

from .records import Floats, StoredAttention

Scans = dict[int | None, Scan]
NOTHING: Blocks = np.empty(0, np.int64)


class Attention(Protocol):
    """attend(queries[M], sequence), wherever windows and records lie."""

    calls: int
    """How many times a layer has attended so far."""

    @property
    def layout(self) -> Layout:
        """Of the records."""

    @property
    def device_bytes(self) -> int:
        """Device memory beside the windows: how much there is."""

    @property
    def device_used_bytes(self) -> int:
        """Of device_bytes."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Append K/V of the newest M tokens of a sequence and attend over everything they see.

        q [heads, M, head_dim], k, v [kv_heads, M, head_dim], in the compute dtype or float32, all on one
        device of torch's. Returns float32 [M, heads, head_dim] there: zeros once the slice has failed, whose
        results the engine discards.
        """

    def scans(self, slices: Many[Slice], windows: Many[int | None]) -> Scans:
        """What slices of one token each see in layers with these sliding windows, for `attend_rows`."""

    def attend_rows(self, heads: Floats, scans: Scans, calls: Many[Call], out: Floats, lse: Floats) -> None:
        """`attend` for slices of one token each, whose calls these are, of one layer.

        scans: what `scans` gave for the slices. heads: float32 [rows, heads + 2 kv_heads, head_dim], each
        row's query, key and value heads. Writes out [rows, heads, head_dim], and may use lse [rows, heads].
        A row whose slice has failed means nothing.
        """

    def reads(self, part: Slice, layer: int, blocks: Blocks) -> bool:
        """Whether attention will want some of these blocks, which do not lie in host memory, from disk."""

    def forget(self, sequence: Sequence) -> None:
        """A sequence ends or is computed anew: what the device has of it, beside its window, goes."""

    def check_integrity(self, sequences: Many[Sequence]) -> None:
        """What the device has belongs to these sequences, which are all. AssertionError says otherwise."""

    def close(self) -> None:
        """Give back what is not the process's own memory; windows are gone, too."""


class TieredAttention:
    """Composes the partials of every tier where the CPU is the device."""

    def __init__(self, windows: CpuWindows, store: Store, heads: int) -> None:
        """heads: of queries."""
        self._windows = windows
        self._store = store
        self._stored = StoredAttention(store)
        self._backend = CpuBackend()
        self._codec = Codec(store.layout)
        self._rows = RowAttention(store.layout, heads // store.layout.kv_heads)
        shape = windows.shape
        self._planes = element_view(windows.tensor)
        self._token_bytes = 2 * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
        self.calls = 0

    @property
    def layout(self) -> Layout:
        return self._store.layout

    @property
    def device_bytes(self) -> int:
        return 0

    @property
    def device_used_bytes(self) -> int:
        return 0

    def reads(self, part: Slice, layer: int, blocks: Blocks) -> bool:
        return True

    def forget(self, sequence: Sequence) -> None:
        pass

    def check_integrity(self, sequences: Many[Sequence]) -> None:
        pass

    def close(self) -> None:
        pass

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        part = call.part
        self.calls += 1
        if part.failure is None:
            with self._stored.failing(part):
                return (self._one if part.count == 1 else self._many)(q, k, v, call)
        return torch.zeros(part.count, q.shape[0], q.shape[2])

    def scans(self, slices: Many[Slice], windows: Many[int | None]) -> Scans:
        return {window: Scan.of([self._row(part, window) for part in slices]) for window in set(windows)}

    def attend_rows(self, heads: Floats, scans: Scans, calls: Many[Call], out: Floats, lse: Floats) -> None:
        any_call = calls[0]
        self.calls += 1
        for call in calls:
            self._seal_before(call.part.position, call)
        memory, scale, softcap = self._store.memory, any_call.scale, any_call.softcap
        scan = scans[any_call.window]
        self._rows.attend(heads, self._planes, any_call.layer, scan, memory, scale, softcap, out, lse)
        record_bytes = self.layout.record_bytes
        for row, call in enumerate(calls):
            part = call.part
            part.read_bytes["device"] += part.exact(call.window)[1] * self._token_bytes
            part.read_bytes["host"] += len(part.in_host(call.window)) * record_bytes
            if part.failure is None and part.tickets.get(call.layer):
                one = slice(row, row + 1)
                with self._stored.failing(part):
                    self._stored.merge(heads[one, : out.shape[1]], call, NOTHING, NOTHING, out[one], lse[one])

    def _row(self, part: Slice, window: int | None) -> Row:
        low, high = part.bounds(window)
        here = part.in_host(window)
        return Row(
            window=part.sequence.window,
            slots=places(part.position),
            ranges=slots(part.position, window),
            places=part.sequence.table.rows[:, here] * self.layout.record_bytes,
            positions=here * BLOCK,
            low=int(low[0]),
            high=int(high[0]),
        )

    def _one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """One query: kernels read every tier where it lies."""
        part = call.part
        seen, tokens = part.exact(call.window)
        self._seal_before(part.position, call)
        planes = self._windows.tensor[part.sequence.window, call.layer]
        self._backend.append_one(planes, k[:, 0], v[:, 0], places(part.position))
        part.read_bytes["device"] += tokens * self._token_bytes
        query = q[:, 0].float().contiguous()
        out, lse = self._backend.attend_one(query, planes, seen, call.scale, call.softcap)
        here = part.in_host(call.window)
        self._stored.merge(query[None].numpy(), call, here, NOTHING, out[None].numpy(), lse[None].numpy())
        return out[None]

    def _many(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Many queries: the window cell by cell, as cells are sealed on the way; then records."""
        heads, m, dim = q.shape
        group = (k.shape[0], heads // k.shape[0])
        tile = q.reshape(*group, m, dim).to(self._backend.tile_dtype)
        out, lse = torch.empty(m, *group, dim), torch.empty(m, *group)
        for start, stop in segments(call.part.position, call.part.position + m):
            these = slice(start - call.part.position, stop - call.part.position)
            self._append(k[:, these], v[:, these], call, start)
            exact, exact_lse = self._exact_tile(tile[:, :, these], call, start)
            out[these], lse[these] = exact.permute(2, 0, 1, 3), exact_lse.permute(2, 0, 1)
        queries, out = q.transpose(0, 1).float().contiguous(), out.view(m, heads, dim)
        here = call.part.in_host(call.window)
        self._stored.merge(queries.numpy(), call, here, NOTHING, out.numpy(), lse.view(m, heads).numpy())
        return out

    def _exact_tile(self, queries: torch.Tensor, call: Call, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries of one cell, the first at position `start`, over what they see exactly."""
        _, group, m, _ = queries.shape
        keys, values = self._windows.tensor[call.part.sequence.window, call.layer]
        seen = [slice(a, b) for a, b in slots(start, call.window)]
        seen[-1] = slice(seen[-1].start, seen[-1].stop + m - 1)
        mask = call.part.mask(start, start + m, call.window, group, self._backend)
        call.part.read_bytes["device"] += mask.shape[1] * self._token_bytes
        return self._backend.attend_tile(
            queries,
            torch.cat([keys[:, s] for s in seen], dim=1).to(queries.dtype),
            torch.cat([values[:, s] for s in seen], dim=1).to(queries.dtype),
            mask,
            call.scale,
            call.softcap,
        )

    def _append(self, k: torch.Tensor, v: torch.Tensor, call: Call, position: int) -> None:
        """Put exact K/V of tokens within one cell into the window, sealing the cell whose half they take."""
        at = slot(position)
        self._seal_before(position, call)
        for plane, new in zip(
            self._windows.tensor[call.part.sequence.window, call.layer], (k, v), strict=True
        ):
            plane[:, at : at + new.shape[1]] = new
            if position < SINKS:
                count = min(SINKS - position, new.shape[1])
                plane[:, position : position + count] = new[:, :count]

    def _seal_before(self, position: int, call: Call) -> None:
        """If a cell begins at `position`, seal the one whose half of the window it takes, if there is one."""
        if position % CELL == 0 and position >= 2 * CELL:
            self._seal(call.layer, call.part.sequence, position // CELL - 2)

    def _seal(self, layer: int, sequence: Sequence, cell: int) -> None:
        first = max(1, cell * BLOCKS_PER_CELL)
        keys, values = self._windows.tensor[
            sequence.window, layer, :, :, slot(first * BLOCK) : slot(cell * CELL) + CELL
        ]
        rows = sequence.table.rows[layer, first : (cell + 1) * BLOCKS_PER_CELL]
        self._codec.seal(element_view(keys), element_view(values), self._store.records, rows)
