"""Linear layers over packed weights, which any module of transformers computes with unchanged.

They take the place of torch's: steps of few rows read each weight once, in as many bits as it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import Module, Parameter

from spilld.offload.kernels.linear.packed import Packed
from spilld.offload.kernels.linear.products import Matrix, multiply_rows
from spilld.offload.kernels.linear.row_operations import Inputs, padded, take

ROWS = 256
"""Rows that are quantised and multiplied at once, a multiple of TOGETHER: more take no longer each."""


class NoTensor(NamedTuple):
    """What a module may ask of a layer's weights. Torch computes nothing with it, so that nobody does."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")


class PackedLinear(Module):
    """A linear layer: its inputs become int16 with a scale for each 32, its results are float32 sums."""

    def __init__(
        self,
        weights: Sequence[Packed],
        outputs: int,
        bias: Parameter | None,
        dtype: torch.dtype,
        workspace: Inputs,
    ) -> None:
        """Take packed weights.

        Args:
            weights: Matrices of the same inputs, whose outputs follow one another; the last one may have
                more outputs than are wanted.
            outputs: Outputs of the layer.
            bias: `[outputs]`, or None.
            dtype: The dtype of results.
            workspace: Memory for ROWS rows that no other layer uses at the same time.

        Raises:
            ValueError: The matrices do not have so many outputs, or differ in inputs.
        """
        super().__init__()
        inputs = {part.inputs for part in weights}
        if len(inputs) != 1 or not 0 <= sum(part.outputs for part in weights) - outputs < 8:
            raise ValueError(f"{len(weights)} matrices of {inputs} inputs do not make {outputs} outputs")
        (self.in_features,) = inputs
        self.out_features = outputs
        self.bias = bias
        self.weight = NoTensor(torch.Size([outputs, self.in_features]), dtype)
        self.packed = tuple(weights)
        self._workspace = workspace

    @cached_property
    def _matrices(self) -> list[tuple[slice, Matrix]]:
        """The columns of the results that each matrix gives. Made at the first step: kernels exist then."""
        ends = np.cumsum([part.outputs for part in self.packed]).tolist()
        return [
            (slice(end - part.outputs, end), Matrix.of(part))
            for part, end in zip(self.packed, ends, strict=True)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: x [..., inputs] to [..., outputs], in the layer's dtype."""
        rows = np.ascontiguousarray(x.reshape(-1, self.in_features).float().numpy())
        found = np.zeros((padded(len(rows)), self._matrices[-1][0].stop), np.float32)
        if self.bias is not None:
            found[:, : self.out_features] = self.bias.float().numpy()
        for first in range(0, len(rows), ROWS):
            some = rows[first : first + ROWS]
            take(some, self._workspace)
            for columns, matrix in self._matrices:
                multiply_rows(self._workspace, matrix, found[first:, columns], len(some))
        out = torch.from_numpy(found[: len(rows), : self.out_features])
        return out.to(self.weight.dtype).view(*x.shape[:-1], self.out_features)
