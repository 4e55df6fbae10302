"""What a step does between its products, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from spilld.offload.kernels.linear.forms import GROUP
from spilld.offload.kernels.linear.row_operations import (
    NOTHING,
    Inputs,
    add_normed,
    padded,
    rotate,
    take,
    take_gated,
    take_normed,
)

Floats = NDArray[np.float32]


def some(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


def rows_in(inputs: Inputs, rows: int, width: int) -> Floats:
    """The numbers that the codes stand for."""
    scales = np.repeat(inputs.scales[:rows, : width // GROUP], GROUP, 1)
    numbers: Floats = inputs.codes[:rows, :width] * scales
    np.testing.assert_allclose(
        numbers.reshape(rows, -1, GROUP).sum(-1), inputs.sums[:rows, : width // GROUP], rtol=1e-4, atol=1e-4
    )
    halves = numbers.reshape(rows, -1, GROUP // 2).sum(-1)
    np.testing.assert_allclose(halves, inputs.halves[:rows, : 2 * width // GROUP], rtol=1e-4, atol=1e-4)
    return numbers


def assert_holds(inputs: Inputs, expected: torch.Tensor) -> None:
    found = rows_in(inputs, *expected.shape)
    largest = expected.reshape(len(expected), -1, GROUP).abs().amax(-1).repeat_interleave(GROUP, 1)
    assert (np.abs(found - expected.numpy()) <= largest.numpy() * 2**-15 + 1e-7).all()


@pytest.mark.parametrize("rows", [1, 3, 8, 21])
@pytest.mark.parametrize("width", [32, 96, 576])
def test_rows_are_taken(rows: int, width: int) -> None:
    inputs, x, weight = Inputs.of(padded(rows), 1152), some(1, rows, width), some(2, width)
    take(x.numpy(), inputs)
    assert_holds(inputs, x)
    take_normed(x.numpy(), weight.numpy(), np.float32(1e-5), inputs)
    assert_holds(inputs, functional.rms_norm(x, (width,), weight, 1e-5))
    gate, up = some(3, rows, width) * 8, some(4, rows, width)
    both = torch.cat([gate, up], 1).numpy()
    take_gated(both, False, inputs)
    assert_holds(inputs, functional.silu(gate) * up)
    take_gated(both, True, inputs)
    assert_holds(inputs, functional.gelu(gate, approximate="tanh") * up)


def test_zeros_and_the_largest_numbers() -> None:
    inputs, x = Inputs.of(4, 64), torch.zeros(1, 64)
    x[0, 40] = torch.finfo(torch.float32).max / 2
    take(x.numpy(), inputs)
    assert_holds(inputs, x)


def test_a_normed_sum() -> None:
    x, y, weight = some(5, 3, 64), some(6, 3, 64), some(7, 64)
    expected = x + functional.rms_norm(y, (64,), weight, 1e-6)
    add_normed(x.numpy(), y.numpy(), weight.numpy(), np.float32(1e-6))
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("rotary", [16, 32])
@pytest.mark.parametrize("normed", [False, True])
def test_rotation(rotary: int, normed: bool) -> None:
    heads, angles, weight = some(8, 2, 5, 32), some(9, 2, rotary // 2), some(10, 32)
    cos, sin = (torch.cat([part, part], 1) for part in (angles.cos(), angles.sin()))
    expected = heads.clone()
    turned = functional.rms_norm(heads, (32,), weight, 1e-6) if normed else heads
    first, second = turned[..., :rotary].chunk(2, -1)
    half = torch.cat([-second, first], -1)
    expected[:, 1:4] = turned[:, 1:4]
    expected[:, 1:4, :rotary] = (turned[..., :rotary] * cos[:, None] + half * sin[:, None])[:, 1:4]
    rotate(
        heads.numpy(), 1, 4, cos.numpy(), sin.numpy(), weight.numpy() if normed else NOTHING, np.float32(1e-6)
    )
    torch.testing.assert_close(heads, expected)
