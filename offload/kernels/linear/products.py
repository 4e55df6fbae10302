"""Products of rows with packed weights, on the CPU.

The inputs of a group become int16 with a scale of their own, exact to 2^-15 of their largest: then 16
products are one instruction (pmaddwd, which LLVM finds), and int32 sums of a group are exact. A row's result
does not depend on the other rows, nor on the number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from spilld.offload.kernels.threads import spreading

from .packed import Packed
from .tile_kernels import ARGUMENTS, kernel_address
from .unpacking import SIZES


class Matrix(NamedTuple):
    """Packed weights as kernels take them."""

    words: NDArray[np.uint16]
    """The tiles, one after another."""
    tiles: int
    """Tiles of 8 outputs."""
    blocks: int
    """Blocks of a tile."""
    kernel: int
    """The address of the kernel for their form, in this process."""
    vectors: int
    groups: int
    """Numbers of the form, as its kernel takes them."""

    @classmethod
    def of(cls, weights: Packed) -> Matrix:
        """Packed weights as kernels take them; compiles the kernel for their form if there is none yet."""
        layout = weights.form.layout
        return cls(
            words=weights.tiles.reshape(-1),
            tiles=weights.tiles.shape[0],
            blocks=weights.tiles.shape[1],
            kernel=kernel_address(weights.form),
            vectors=SIZES[layout.bits][0],
            groups=layout.groups,
        )


@njit(nogil=True, error_model="numpy", cache=True)
def multiply_rows(inputs: Any, weights: Any, out: Any, rows: Any) -> None:
    """Add the rows of `inputs` times the weights to out[:rows].

    The result is what float32 products of the quantised inputs give, up to the rounding of their sums. Rows
    of out up to the next multiple of TOGETHER are undefined afterwards.

    Args:
        inputs: Inputs.
        weights: Matrix.
        out: `[., outputs] float32`; it may be a range of the columns of a wider array.
        rows: How many rows.
    """
    _spread(min(inputs.parts, (weights.tiles + 1) // 2), inputs, weights, out, rows)  # units need no memory


@njit(nogil=True, error_model="numpy")
def _unit(part: Any, inputs: Any, weights: Any, out: Any, rows: Any) -> None:
    """Multiply one part of the tiles, which is an even number of them unless it is the last."""
    count = (weights.tiles + 1) // 2
    parts = min(inputs.parts, count)
    first, last = count * part // parts, count * (part + 1) // parts
    call_kernel(
        weights.kernel,
        weights.words.ctypes.data,
        2 * first,
        min(2 * last, weights.tiles),
        weights.blocks,
        inputs.codes.ctypes.data,
        inputs.scales.ctypes.data,
        inputs.sums.ctypes.data,
        inputs.halves.ctypes.data,
        inputs.scales.shape[1],
        out.ctypes.data,
        out.strides[0] // out.itemsize,
        rows,
        weights.vectors,
        weights.groups,
    )


@intrinsic
def call_kernel(_context: Any, kernel: Any, *args: Any) -> Any:
    """Call a kernel by its address."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given = [
            context.cast(builder, builder.extract_value(values[1], i), kind, types.int64)
            for i, kind in enumerate(signature.args[1].types)
        ]
        function = context.call_conv.get_function_type(types.none, ARGUMENTS)
        place = builder.inttoptr(values[0], function.as_pointer())
        context.call_conv.call_function(builder, place, types.none, ARGUMENTS, given)
        return context.get_dummy_value()

    return types.void(types.int64, types.BaseTuple.from_types(args)), build


_spread = spreading(lambda: _unit)
