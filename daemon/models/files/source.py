"""What a loader reads of a model's files: tensors by the names of the module that takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from spilld.offload.kernels.linear.packed import Packed


class WeightSource(Protocol):
    """A model's weights, by the names of the transformers module's state dict.

    Nothing is read before it is asked for, and nothing is kept by the source: a loader's peak memory is what
    it keeps and one tensor. A tensor that the module ties to another one may be missing.
    """

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors, for which the other methods are defined."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape in the module, from headers alone."""
        ...

    def dense(self, name: str) -> torch.Tensor:
        """Return the tensor as the module has it.

        In the dtype in which it is stored, mapped where it can be; dequantised to float32 if it is quantised.

        Raises:
            CorruptModel: It is damaged.
        """
        ...

    def packed(self, name: str) -> Sequence[Packed] | None:
        """Return the matrices of a quantised tensor, each [outputs, inputs], with the file's own numbers.

        Their outputs, one after another, are those of the tensor in the module's order; for experts (3-D)
        those of the first expert, of the second, and so on, and no matrix has outputs of two experts. There
        is one matrix for a tensor (for an expert) unless its file has parts of different forms. Where a
        module's experts are transposed, [experts, inputs, outputs], the matrices are not.

        None: the tensor is not quantised, or in a way that has no packed form.

        Raises:
            CorruptModel: It is damaged.
        """
        ...
