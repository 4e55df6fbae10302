"""bfloat16 linear layers where the CPU has no bfloat16 arithmetic.

There torch multiplies more than a few rows at an eighth of the rate of float32 (measured on AVX2: 20 against
170 GFLOP/s). A product of two bfloat16 numbers is exact in float32, so widening the operands first gives
what a native bfloat16 product gives: float32 sums, rounded once.
"""

from __future__ import annotations

import torch
from torch.nn import Linear, Module
from torch.nn.functional import linear

FEW = 6
"""Up to this many rows the weights are better read as they are: widening them would cost more."""

SCRATCH_BYTES = 8 << 20
"""Weights are widened in stretches of their output channels that fit this: they stay in the cache."""


def has_bfloat16_products() -> bool:
    """Whether torch's matrix products in bfloat16 use instructions of this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class WideLinear(Module):
    """A linear layer, computed in float32 from bfloat16 weights and inputs for more than FEW rows."""

    def __init__(self, narrow: Linear, scratch: torch.Tensor) -> None:
        """Share the weights of a linear layer.

        Args:
            narrow: The layer in bfloat16.
            scratch: [SCRATCH_BYTES / 4] float32, shared by all layers of a model.
        """
        super().__init__()
        self.weight, self.bias = narrow.weight, narrow.bias
        self._scratch = scratch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: x [..., inputs] bfloat16 to [..., outputs] bfloat16."""
        outputs, inputs = self.weight.shape
        rows = x.reshape(-1, inputs)
        if len(rows) <= FEW:
            return linear(x, self.weight, self.bias)
        wide = rows.float()
        out = torch.empty(len(rows), outputs, dtype=x.dtype)
        step = max(1, len(self._scratch) // inputs)
        for start in range(0, outputs, step):
            these = slice(start, start + step)
            out[:, these] = linear(wide, self._widened(these), self._bias(these))
        return out.view(*x.shape[:-1], outputs)

    def _widened(self, these: slice) -> torch.Tensor:
        weight = self.weight[these]
        return self._scratch[: weight.numel()].view(weight.shape).copy_(weight)

    def _bias(self, these: slice) -> torch.Tensor | None:
        return None if self.bias is None else self.bias[these].float()


def widen(module: Module) -> None:
    """Replace every linear layer under the module; weights stay where they are, in bfloat16."""
    scratch = torch.empty(SCRATCH_BYTES // 4)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is Linear:
                setattr(parent, name, WideLinear(child, scratch))


def wide_bytes(module: Module, rows: int) -> int:
    """Return the bytes that the layers under a module take for so many rows, beyond those of bfloat16."""
    widths = [sum(layer.weight.shape) for layer in module.modules() if isinstance(layer, WideLinear)]
    return SCRATCH_BYTES + 4 * rows * max(widths) if widths else 0
