"""The number of blocks in a full run."""

from __future__ import annotations

from spilld.offload.errors import BudgetTooSmall
from spilld.offload.record import round_up
from spilld.offload.size import size
from spilld.offload.store_layout import StoreLayout

EXTENT_TARGET = 512 << 10
"""Bytes of the largest extent in a full run: reads of this size come near the disk's sequential rate."""

RUN_STEP = 4
"""Blocks of a cell: runs are multiples of it."""


def run_length(layouts: StoreLayout, host_columns: int, step_columns: int) -> int:
    """Return how many blocks a full run has: extents of EXTENT_TARGET bytes, or what host memory can spare.

    Args:
        layouts: Of the records.
        host_columns: Blocks that host memory holds, in every layer.
        step_columns: Blocks that a step seals. While one run is being written, host memory must still take
            another run and these.

    Raises:
        BudgetTooSmall: The host budget is too small; the message says how many bytes are needed.
    """
    spare = (host_columns - step_columns) // 2 // RUN_STEP * RUN_STEP
    if spare < RUN_STEP:
        needed = (step_columns + 2 * RUN_STEP) * layouts.column_bytes
        raise BudgetTooSmall(
            f"the host budget holds {size(host_columns * layouts.column_bytes)} of records; "
            f"this model, format and chunk size need at least {size(needed, least=True)}"
        )
    return min(spare, round_up(-(-EXTENT_TARGET // max(layouts.record_bytes)), RUN_STEP))
