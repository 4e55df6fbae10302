"""Products of a mixture of experts: rows in groups, each times the weights of another matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from spilld.offload.kernels.threads import spreading

from .forms import GROUP
from .packed import Packed
from .products import call_kernel
from .row_operations import padded
from .tile_kernels import kernel_address
from .unpacking import SIZES

Integers = NDArray[np.int64]


class Experts(NamedTuple):
    """The packed weights of experts as kernels take them: matrices of one form and shape.

    It holds addresses only: whoever made it keeps the packed weights.
    """

    addresses: Integers
    """[experts]"""
    tiles: int
    """Of each: as in Matrix."""
    blocks: int
    kernel: int
    vectors: int
    groups: int

    @classmethod
    def of(cls, weights: Sequence[Packed]) -> Experts:
        """Packed weights of experts, in their order; compiles the kernel for their form if there is none yet.

        Raises:
            ValueError: They differ in form or shape, or there are none.
        """
        kinds = {(part.form, part.tiles.shape) for part in weights}
        if len(kinds) != 1:
            raise ValueError(f"experts of one layer have one form and one shape, these have {len(kinds)}")
        (form, shape) = kinds.pop()
        if not all(part.tiles.flags.c_contiguous for part in weights):
            raise ValueError("tiles of experts must be C-contiguous")
        return cls(
            addresses=np.array([part.tiles.ctypes.data for part in weights]),
            tiles=shape[0],
            blocks=shape[1],
            kernel=kernel_address(form),
            vectors=SIZES[form.layout.bits][0],
            groups=form.layout.groups,
        )


def row_ranges(counts: Sequence[int]) -> tuple[Integers, int]:
    """Return where the rows of each group begin, int64 [groups], and for how many rows there must be memory.

    Groups of more than one row are padded to a multiple of TOGETHER.
    """
    sizes = [count if count < 2 else padded(count) for count in counts]
    ends = np.cumsum(sizes, dtype=np.int64)
    return ends - np.array(sizes, np.int64), int(ends[-1]) if counts else 0


@njit(nogil=True, error_model="numpy", cache=True)
def multiply_grouped(inputs: Any, experts: Any, chosen: Any, first: Any, counts: Any, out: Any) -> None:
    """Add rows of `inputs` times the weights of experts to the same rows of out.

    Only weights of chosen experts are read. A row's result is that of multiply_rows.

    Args:
        inputs: Inputs.
        experts: Experts.
        chosen: `[groups] int64`, the expert of each group.
        first: `[groups] int64`, its first row, of row_ranges.
        counts: `[groups] int64`, how many rows it has. Rows that pad it are undefined afterwards.
        out: `[., outputs] float32`; it may be a range of the columns of a wider array.
    """
    parts = min(inputs.parts, (experts.tiles + 1) // 2)
    _spread(parts * len(chosen), parts, inputs, experts, chosen, first, counts, out)  # units need no memory


@njit(nogil=True, error_model="numpy")
def _unit(
    unit: Any, parts: Any, inputs: Any, experts: Any, chosen: Any, first: Any, counts: Any, out: Any
) -> None:
    """Multiply one part of the tiles of one group's expert."""
    group, part, pairs = unit // parts, unit % parts, (experts.tiles + 1) // 2
    if counts[group] < 1:
        return
    row, wide = first[group], inputs.scales.shape[1]
    call_kernel(
        experts.kernel,
        experts.addresses[chosen[group]],
        2 * (pairs * part // parts),
        min(2 * (pairs * (part + 1) // parts), experts.tiles),
        experts.blocks,
        inputs.codes.ctypes.data + row * inputs.codes.strides[0],
        inputs.scales.ctypes.data + row * inputs.scales.strides[0],
        inputs.sums.ctypes.data + row * inputs.sums.strides[0],
        inputs.halves.ctypes.data + row * inputs.halves.strides[0],
        wide,
        out.ctypes.data + row * out.strides[0],
        out.strides[0] // out.itemsize,
        counts[group],
        experts.vectors,
        experts.groups,
    )


@njit(nogil=True, error_model="numpy", cache=True)
def copy_rows(source: Any, rows: Any, width: Any, target: Any) -> None:
    """Copy quantised rows, source[rows[i]] to target[i]: a token goes to several experts.

    Args:
        source: Inputs.
        rows: `[.] int64`; where negative nothing is copied.
        width: How many numbers rows have.
        target: Inputs of the same width as the source.
    """
    for i in range(len(rows)):
        r = rows[i]
        if r < 0:
            continue
        for k in range(width):
            target.codes[i, k] = source.codes[r, k]
        for k in range(width // GROUP):
            target.scales[i, k] = source.scales[r, k]
            target.sums[i, k] = source.sums[r, k]
            for half in range(2 * k, 2 * k + 2):
                target.halves[i, half] = source.halves[r, half]


_spread = spreading(lambda: _unit)
