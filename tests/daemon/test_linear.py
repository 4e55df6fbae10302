"""Widened linear layers give what float32 products of the same bfloat16 numbers give."""

from __future__ import annotations

import pytest
import torch

from spilld.models.wide_linear import (
    FEW,
    SCRATCH_BYTES,
    WideLinear,
    wide_bytes,
    widen,
)


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 70])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stretches", [1, 3])
def test_is_the_rounded_float32_product(rows: int, bias: bool, stretches: int) -> None:
    torch.manual_seed(rows)
    narrow = torch.nn.Linear(96, 50, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    layer = WideLinear(narrow, torch.empty(-(-50 // stretches) * 96))
    x = torch.randn(1, rows, 96).bfloat16()
    exact = torch.nn.functional.linear(
        x.double(), narrow.weight.double(), None if narrow.bias is None else narrow.bias.double()
    )
    found = layer(x)
    assert (found.shape, found.dtype) == ((1, rows, 50), torch.bfloat16)
    # One rounding to bfloat16, half a unit in the last of 8 bits; sums in float32 add next to nothing.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    torch.manual_seed(0)
    layer = WideLinear(torch.nn.Linear(64, 64, dtype=torch.bfloat16).requires_grad_(False), torch.empty(4096))
    x = torch.randn(32, 64).bfloat16()
    torch.testing.assert_close(layer(x)[:16], layer(x[:16]), rtol=2**-8, atol=1e-5)


def test_every_layer_of_a_model_is_widened_in_place() -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(16, 8, dtype=torch.bfloat16))
    model = torch.nn.Sequential(torch.nn.Linear(8, 16, dtype=torch.bfloat16), inner).requires_grad_(False)
    weights = [parameter.data_ptr() for parameter in model.parameters()]
    assert wide_bytes(model, 10) == 0
    widen(model)
    assert [type(layer) for layer in (model[0], inner[0])] == [WideLinear, WideLinear]
    assert [parameter.data_ptr() for parameter in model.parameters()] == weights
    assert wide_bytes(model, 10) == SCRATCH_BYTES + 4 * 10 * 24
