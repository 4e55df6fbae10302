"""Records of random numbers, for measurements: zeros are faster to compute with than real KV."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spilld.offload.record import BLOCK, Element, Layout

from .codec import Codec

DISTINCT = 4
"""Blocks that differ; for measurements it matters where a record lies, not what it contains."""


def fill(layout: Layout, records: npt.NDArray[np.uint8]) -> None:
    """Overwrite records, uint8 [n, record_bytes], with a few blocks of normal numbers, repeated."""
    count = min(DISTINCT, len(records))
    shape = (layout.kv_heads, count * BLOCK, layout.head_dim)
    k, v = np.random.default_rng(count).standard_normal((2, *shape), np.float32)
    if layout.element is Element.BFLOAT16:
        k, v = ((x.view(np.uint32) >> np.uint32(16)).astype(np.uint16) for x in (k, v))
    Codec(layout).seal(k, v, records, np.arange(count))
    for first in range(count, len(records), count):
        part = records[first : first + count]
        part[...] = records[: len(part)]
