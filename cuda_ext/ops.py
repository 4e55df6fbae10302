"""The kernels of one model's KV: what a step gives the device to do, on the compute stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from spilld.cuda_ext.compile.variant import BLOCK, ROWS, Variant
from spilld.cuda_ext.device.base import Kernel, Stream
from spilld.cuda_ext.memory.staging import Landing
from spilld.cuda_ext.memory.windows import KVWindowShape

from .compile import variant

WARPS = 1024
"""About as many as a GPU runs at a time: calls are divided into parts until there are so many."""

Load = Callable[[Variant], Kernel]


class Queries(NamedTuple):
    """float32 [rows, heads, head_dim] on the device."""

    address: int
    rows: int


class Parts(NamedTuple):
    """Places for partial attentions: out float32 [parts, kv_heads, rows * group, head_dim], lse float32
    [parts, kv_heads, rows * group]."""

    out: int
    lse: int
    parts: int


class WindowRanges(NamedTuple):
    """Ranges of offsets in a KV window that each query sees: int64 [queries, each, 2] on the device."""

    address: int
    each: int


class Records(NamedTuple):
    """Records in a pool: byte offsets and first token positions, int64 [blocks] on the device."""

    pool: int
    places: int
    positions: int
    blocks: int


class Ops:
    """Nothing is checked; what is launched is done later."""

    def __init__(
        self, load: Load, layout: Mapping[str, int], shape: KVWindowShape, heads: int, *, warps: int = WARPS
    ) -> None:
        """load: gives the device's kernel. layout: a record's, as variant.py takes it. heads: of queries."""
        self.shape, self.heads, self._warps = shape, heads, warps
        self.rotates = layout["K_BITS"] == 4
        """Whether queries over records are to be rotated."""
        self._attend_records = load(variant.attend_records(layout))
        self._attend_window = load(variant.attend_window(8 * shape.dtype.itemsize, shape.head_dim))
        self._merge = load(variant.merge(shape.head_dim, shape.kv_heads))
        self._seal = load(variant.seal(layout))
        self._rotate = load(variant.rotate(shape.head_dim)) if self.rotates else None

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.shape.kv_heads

    @property
    def tiles(self) -> int:
        """Of a window."""
        return -(-self.shape.tokens // BLOCK)

    def parts(self, units: int, rows: int) -> int:
        """How many parts attention of so many queries over so many blocks, or tiles, is divided into."""
        warps = self.shape.kv_heads * -(-rows * self.group // ROWS)
        return -(-units // self._each(units, max(1, self._warps // warps)))

    def partial_rows(self, rows: int) -> int:
        """The most rows of out, over all parts and heads, that attention of up to so many queries leaves."""
        return max(self._warps * ROWS, rows * self.heads)

    def room(self, landing: Landing, parts: int, rows: int) -> Parts:
        """Places for so many partials of so many queries. Raises LandingFull."""
        sums = (parts, self.shape.kv_heads, rows * self.group)
        return Parts(landing.room((*sums, self.shape.head_dim)), landing.room(sums), parts)

    def split(self, parts: Parts, first: int, rows: int) -> tuple[Parts, Parts]:
        """The first so many of them, and the others."""
        sums = 4 * first * rows * self.heads
        others = Parts(parts.out + sums * self.shape.head_dim, parts.lse + sums, parts.parts - first)
        return parts._replace(parts=first), others

    def attend_window(
        self, to: Parts, q: Queries, planes: int, seen: WindowRanges, scale: float, softcap: float
    ) -> None:
        """planes: of one layer of a window."""
        self._attend_window.launch(
            *(Stream.COMPUTE, self._grid(to, q), to.out, to.lse, q.address, planes, seen.address, seen.each),
            *(self.shape.tokens, self._each(self.tiles, to.parts), q.rows, self.group, scale, softcap),
        )

    def attend_records(
        self, to: Parts, q: Queries, records: Records, low: int, high: int, scale: float, softcap: float
    ) -> None:
        """q: rotated, where keys are. low, high: int64 [rows] on the device: of records a query sees
        the positions low <= t < high."""
        self._attend_records.launch(
            *(Stream.COMPUTE, self._grid(to, q), to.out, to.lse, q.address, records.pool, records.places),
            *(records.positions, low, high, records.blocks, self._each(records.blocks, to.parts), q.rows),
            *(self.group, scale, softcap),
        )

    def merge(self, out: int, lse: int, parts: Parts, q: Queries) -> None:
        """out: float32, as q; lse: float32 [queries, heads]."""
        grid = (q.rows * self.group, self.shape.kv_heads, 1)
        self._merge.launch(Stream.COMPUTE, grid, out, lse, parts.out, parts.lse, parts.parts, self.group)

    def seal(self, pool: int, places: int, planes: int, firsts: int, count: int) -> None:
        """Pack blocks that begin at these offsets in a layer of a KV window into records.

        firsts, and places, which are byte offsets in the pool: int64 [count] on the device.
        """
        head, token = self.shape.tokens * self.shape.head_dim, self.shape.head_dim
        values = planes + self.shape.layer_bytes // 2
        grid = (count, self.shape.kv_heads, 2)
        self._seal.launch(Stream.COMPUTE, grid, pool, places, planes, values, firsts, head, token)

    def rotate(self, to: int, q: Queries) -> Queries:
        """The queries as records want them, at `to`; only where `rotates`."""
        assert self._rotate is not None
        self._rotate.launch(Stream.COMPUTE, (q.rows * self.heads, 1, 1), to, q.address)
        return q._replace(address=to)

    def _grid(self, to: Parts, q: Queries) -> tuple[int, int, int]:
        return to.parts, self.shape.kv_heads, -(-q.rows * self.group // ROWS)

    @staticmethod
    def _each(units: int, parts: int) -> int:
        """Units of a part."""
        return max(1, -(-units // parts))
