"""The kernels for the KV of one model: the work of a step on the device's compute stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from spilld.cuda_ext.compile.variant import BLOCK, ROWS, Variant
from spilld.cuda_ext.device.base import Kernel, Stream
from spilld.cuda_ext.memory.staging import Staging
from spilld.cuda_ext.memory.windows import KVWindowShape

from .compile import variant

WARPS = 1024
"""About as many warps as a GPU runs at a time: calls are divided into parts to have so many."""

Load = Callable[[Variant], Kernel]


class Queries(NamedTuple):
    """Queries on the device, `[rows, heads, head_dim] float32`."""

    address: int
    rows: int


class Parts(NamedTuple):
    """Places for partial attentions on the device.

    `out` is `[parts, kv_heads, rows * group, head_dim] float32`, `lse` is
    `[parts, kv_heads, rows * group] float32`.
    """

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
    """Launches the kernels of a model.

    Arguments are not checked; what is launched is done later.
    """

    def __init__(
        self, load: Load, layout: Mapping[str, int], shape: KVWindowShape, heads: int, *, warps: int = WARPS
    ) -> None:
        """Load the kernels.

        Args:
            load: Returns the device's kernel for a variant.
            layout: A record's, as variant.py takes it.
            shape: Of the KV windows.
            heads: Query heads.
            warps: Into about as many warps the work of a call is divided.
        """
        self.shape, self.heads, self._warps = shape, heads, warps
        self.rotates = layout["K_BITS"] == 4
        """Whether queries over records have to be rotated."""
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
        """Tiles of 64 tokens in a window."""
        return -(-self.shape.tokens // BLOCK)

    def parts(self, units: int, rows: int) -> int:
        """Return into how many parts attention is divided.

        Args:
            units: Blocks or tiles that are attended to.
            rows: Queries.
        """
        warps = self.shape.kv_heads * -(-rows * self.group // ROWS)
        return -(-units // self._each(units, max(1, self._warps // warps)))

    def partial_rows(self, rows: int) -> int:
        """Return the most rows of `out`, over parts and heads, that attention of `rows` queries writes."""
        return max(self._warps * ROWS, rows * self.heads)

    def room(self, staging: Staging, parts: int, rows: int) -> Parts:
        """Return places for the partial attentions of so many queries.

        Raises:
            StagingFull: There is not enough staging memory.
        """
        sums = (parts, self.shape.kv_heads, rows * self.group)
        return Parts(staging.room((*sums, self.shape.head_dim)), staging.room(sums), parts)

    def split(self, parts: Parts, first: int, rows: int) -> tuple[Parts, Parts]:
        """Divide places into the first so many parts and the others."""
        sums = 4 * first * rows * self.heads
        others = Parts(parts.out + sums * self.shape.head_dim, parts.lse + sums, parts.parts - first)
        return parts._replace(parts=first), others

    def attend_window(
        self, to: Parts, q: Queries, planes: int, seen: WindowRanges, scale: float, softcap: float
    ) -> None:
        """Attend over one layer of a KV window.

        Args:
            to: Where the partial attentions go.
            q: The queries.
            planes: Address of the layer's planes in the window.
            seen: Which offsets each query sees.
            scale: Factor of the logits.
            softcap: Bound of the logits; 0 means none.
        """
        self._attend_window.launch(
            *(Stream.COMPUTE, self._grid(to, q), to.out, to.lse, q.address, planes, seen.address, seen.each),
            *(self.shape.tokens, self._each(self.tiles, to.parts), q.rows, self.group, scale, softcap),
        )

    def attend_records(
        self, to: Parts, q: Queries, records: Records, low: int, high: int, scale: float, softcap: float
    ) -> None:
        """Attend over records.

        Args:
            to: Where the partial attentions go.
            q: The queries, rotated where keys are.
            records: The records.
            low: `[rows] int64` on the device: a query sees the positions low <= t < high of records.
            high: `[rows] int64` on the device.
            scale: Factor of the logits.
            softcap: Bound of the logits; 0 means none.
        """
        self._attend_records.launch(
            *(Stream.COMPUTE, self._grid(to, q), to.out, to.lse, q.address, records.pool, records.places),
            *(records.positions, low, high, records.blocks, self._each(records.blocks, to.parts), q.rows),
            *(self.group, scale, softcap),
        )

    def merge(self, out: int, lse: int, parts: Parts, q: Queries) -> None:
        """Merge partial attentions.

        Args:
            out: Address of the result, float32 in the shape of q.
            lse: Address of its log-sum-exp, `[rows, heads] float32`.
            parts: The partial attentions.
            q: The queries.
        """
        grid = (q.rows * self.group, self.shape.kv_heads, 1)
        self._merge.launch(Stream.COMPUTE, grid, out, lse, parts.out, parts.lse, parts.parts, self.group)

    def seal(self, pool: int, places: int, planes: int, firsts: int, count: int) -> None:
        """Pack blocks of a layer of a KV window into records.

        Args:
            pool: Address that places count from.
            places: `[count] int64` on the device: byte offsets of the records in the pool.
            planes: Address of the layer's planes in the window.
            firsts: `[count] int64` on the device: the blocks' first tokens, as offsets in the window.
            count: How many blocks there are.
        """
        head, token = self.shape.tokens * self.shape.head_dim, self.shape.head_dim
        values = planes + self.shape.layer_bytes // 2
        grid = (count, self.shape.kv_heads, 2)
        self._seal.launch(Stream.COMPUTE, grid, pool, places, planes, values, firsts, head, token)

    def rotate(self, to: int, q: Queries) -> Queries:
        """Rotate queries for records with rotated keys, into memory at `to`; only where `rotates`."""
        assert self._rotate is not None
        self._rotate.launch(Stream.COMPUTE, (q.rows * self.heads, 1, 1), to, q.address)
        return q._replace(address=to)

    def _grid(self, to: Parts, q: Queries) -> tuple[int, int, int]:
        return to.parts, self.shape.kv_heads, -(-q.rows * self.group // ROWS)

    @staticmethod
    def _each(units: int, parts: int) -> int:
        """Units of a part."""
        return max(1, -(-units // parts))
