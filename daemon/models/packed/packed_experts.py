"""Experts of a mixture over packed weights: only those that a step's rows go to are read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import Module

from spilld.offload.kernels.linear.grouped import Experts, multiply_grouped, row_ranges
from spilld.offload.kernels.linear.packed import Packed
from spilld.offload.kernels.linear.row_operations import Inputs, padded, take

PAIRS = 2048
"""Pairs of a token and an expert that are computed at once: it bounds their memory."""

Floats = NDArray[np.float32]


class PackedExperts(Module):
    """Takes the place of a module's experts, as transformers' ExpertsInterface calls them.

    Rows of all requests are grouped by expert. What lies between the two products is the module's own.
    """

    def __init__(self, experts: Any, into: Sequence[Packed], out_of: Sequence[Packed]) -> None:
        """Take packed weights.

        Args:
            experts: The module's experts, of a class that `use_experts_implementation` made; their weights
                are dropped.
            into: Of each expert, gate and up, or up alone: [outputs, inputs] in the module's order.
            out_of: Of each expert, down.
        """
        super().__init__()
        self.gate = experts
        for name in weight_names(experts):
            setattr(experts, name, None)
        self.into, self.out_of = tuple(into), tuple(out_of)

    @cached_property
    def _matrices(self) -> tuple[Experts, Experts]:
        """The weights as kernels take them. Made at the first step: kernels exist then."""
        return Experts.of(self.into), Experts.of(self.out_of)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute and add up what the chosen experts make of each token.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, chosen] int64.
            top_k_weights: [tokens, chosen].

        Returns:
            [tokens, hidden] in the dtype of hidden_states.
        """
        tokens = max(1, PAIRS // top_k_index.shape[-1])
        parts = (torch.split(part, tokens) for part in (hidden_states, top_k_index, top_k_weights))
        return torch.cat([self._some(*some) for some in zip(*parts, strict=True)])

    def _some(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        chosen = index.shape[-1]
        expert, order = torch.sort(index.flatten(), stable=True)
        groups, counts = torch.unique_consecutive(expert, return_counts=True)
        first, memory = row_ranges(counts.tolist())
        begins = torch.cumsum(counts, 0) - counts
        rows = torch.arange(len(order)) + torch.repeat_interleave(torch.from_numpy(first) - begins, counts)
        where = (groups.numpy(), first, counts.numpy(), padded(memory))
        into, out_of = self._matrices
        made = _multiply(x[order // chosen].float(), rows, into, where)
        if self.gate.has_bias:
            made += (self.gate.gate_up_proj_bias if self.gate.has_gate else self.gate.up_proj_bias)[expert]
        made = self.gate._apply_gate(made) if self.gate.has_gate else self.gate.act_fn(made)
        made = _multiply(made, rows, out_of, where)
        if self.gate.has_bias:
            made += self.gate.down_proj_bias[expert]
        made *= weights.flatten()[order, None]
        total = torch.empty_like(made).index_copy_(0, order, made).view(*index.shape, -1).sum(1)
        return total.to(x.dtype)


def weight_names(experts: Any) -> tuple[str, str]:
    """Return the names of the weights of a module's experts: what they do first, and last."""
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def _multiply(
    x: torch.Tensor,
    rows: torch.Tensor,
    experts: Experts,
    where: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int],
) -> torch.Tensor:
    """Multiply rows sorted by expert.

    Args:
        x: [pairs, inputs] float32.
        rows: [pairs] int64, the row of memory of each.
        experts: The weights.
        where: As multiply_grouped takes groups: chosen, first, counts; and rows of memory.
    """
    *groups, memory = where
    given = torch.zeros(memory, x.shape[1])
    given[rows] = x
    inputs = Inputs.of(memory, x.shape[1])
    take(given.numpy(), inputs)
    found = np.zeros((memory, experts.tiles * 8), np.float32)
    multiply_grouped(inputs, experts, *groups, found)
    return torch.from_numpy(found)[rows]
