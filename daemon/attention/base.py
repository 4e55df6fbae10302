"""The interface of attention: a plan for each step, and one call for each layer of it.

Attention is exact, over what every row sees of a KV window on the device, of records in host memory, and of
extents on disk. Each tier gives a partial (output, log-sum-exp) and the partials merge exactly. Records are
read where they lie.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from spilld.kv.attention_metadata import Blocks, VisibleKV
from spilld.kv.batch import Batch, BatchItem
from spilld.kv.geometry import Geometry
from spilld.kv.sequence import KVSequence
from spilld.offload.block_table import RunRef
from spilld.offload.disk.read_ticket import ExtentRead, Ticket
from spilld.offload.host.promotion import Promotion
from spilld.offload.store.store import Store


@dataclass(eq=False)
class PlannedRead:
    """One layer of a run, which a batch item needs from disk: some of its blocks, ascending."""

    item: BatchItem
    layer: int
    ref: RunRef
    blocks: Blocks
    ticket: Ticket | None = None

    @property
    def read(self) -> ExtentRead:
        """The extent to read."""
        return ExtentRead(self.ref.run, self.layer)


Wanted = Callable[[BatchItem, int, Blocks], bool]
"""Whether attention of an item in a layer needs some of these blocks from disk, where they lie."""


class AttentionPlan:
    """Metadata of all rows of a step, made before its first layer.

    Attributes:
        batch: The rows.
        visible: By sliding window, what each item sees.
        reads: Extents to be read from disk, in the order in which `forward` takes them: by layer, item, age.
            The runner gives each its ticket.
        promotions: Runs that are copied to host memory as `forward` passes them.
    """

    def __init__(self, batch: Batch, geometry: Geometry, store: Store, wanted: Wanted) -> None:
        self.batch = batch
        self.visible = {
            window: [VisibleKV(item, window, store) for item in batch.items]
            for window in set(geometry.sliding_windows)
        }
        self.reads = list(self._needed(geometry, wanted))
        self.promotions: dict[BatchItem, Promotion] = {}
        self._by_layer: defaultdict[tuple[int, BatchItem], list[PlannedRead]] = defaultdict(list)
        for read in self.reads:
            self._by_layer[read.layer, read.item].append(read)

    def reads_of(self, layer: int, item: BatchItem) -> Sequence[PlannedRead]:
        """Return the reads of one layer and item."""
        return self._by_layer.get((layer, item), ())

    def tickets(self, item: BatchItem | None = None) -> Iterator[Ticket]:
        """Yield the tickets of all reads, or of those of one item."""
        for read in self.reads:
            if read.ticket is not None and item in (None, read.item):
                yield read.ticket

    def _needed(self, geometry: Geometry, wanted: Wanted) -> Iterator[PlannedRead]:
        for layer, window in enumerate(geometry.sliding_windows):
            for seen in self.visible[window]:
                for ref, blocks in seen.on_disk:
                    if wanted(seen.item, layer, blocks):
                        yield PlannedRead(seen.item, layer, ref, blocks)


class Attention(ABC):
    """Attention of one model over all tiers. One thread calls everything.

    A step is `plan`, then `forward` for every layer in turn. What a layer computes is that of
    `geometry.layers[layer]`.
    """

    def __init__(self, geometry: Geometry, store: Store) -> None:
        self.geometry = geometry
        self.store = store
        self.calls = 0
        """Number of times that a layer has attended so far."""

    @abstractmethod
    def plan(self, batch: Batch) -> AttentionPlan:
        """Find what the rows of a batch see, and where it lies.

        The store is not changed between this and the last `forward` of the step.
        """

    @abstractmethod
    def forward(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: AttentionPlan,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append K and V of the rows to their sequences, and attend over everything that they see.

        An item whose KV cannot be read has its `failure` from then on. Any other error is raised.

        Args:
            layer: Number of the layer.
            q: [total, heads, head_dim], queries of the batch's rows, of any floating dtype, on any device.
            k: [total, kv_heads, head_dim], keys, likewise, on the same device.
            v: [total, kv_heads, head_dim], values, likewise, on the same device.
            plan: The plan of this step.
            sink_logits: [heads], where the layer has them.

        Returns:
            [total, heads, head_dim] float32 on the device of q; zeros for items that have failed.

        Raises:
            LaunchFailed: The device is lost.
        """

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory that there are beside the KV windows."""
        return 0

    @property
    def device_used_bytes(self) -> int:
        """Used bytes of `device_bytes`."""
        return 0

    def forget(self, sequence: KVSequence) -> None:  # noqa: B027 (not every device has something)
        """Drop what the device has of a sequence beside its KV window, as it ends or is computed again."""

    def check_integrity(self, sequences: Sequence[KVSequence]) -> None:  # noqa: B027
        """Check that what the device has belongs to these sequences, which are all.

        Raises:
            AssertionError: It does not.
        """

    def close(self) -> None:  # noqa: B027
        """Give back what is not the process's own memory; KV windows are gone, too."""
