"""Packed weights: what goes in comes out, and products are those of float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spilld.offload.kernels import threads
from spilld.offload.kernels.linear.forms import GGUF_FORMS, GROUP, LANES, Form
from spilld.offload.kernels.linear.grouped import Experts, copy_rows, multiply_grouped, row_ranges
from spilld.offload.kernels.linear.packed import (
    Packed,
    fits,
    pack4,
    pack8,
    quantise,
    stack,
    unpack,
)
from spilld.offload.kernels.linear.products import Matrix, multiply_rows
from spilld.offload.kernels.linear.repack import from_gguf
from spilld.offload.kernels.linear.row_operations import Inputs, padded, take

Floats = NDArray[np.float32]

MADE = [Form.INT8, Form.INT4]
"""Forms that weights are quantised to."""

SIZES = [(8, 32), (24, 96), (64, 576)]


@pytest.fixture(params=[1, 2])
def shared_by(request: pytest.FixtureRequest) -> Iterator[int]:
    threads.use(request.param)
    yield request.param
    threads.use(1)


def some(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def product(rows: Floats, weights: Packed, start: Floats | None = None) -> Floats:
    inputs = Inputs.of(padded(len(rows)), weights.inputs)
    take(rows, inputs)
    out = np.zeros((padded(len(rows)), weights.outputs), np.float32)
    if start is not None:
        out[: len(rows)] = start
    multiply_rows(inputs, Matrix.of(weights), out, len(rows))
    return out[: len(rows)]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_codes_and_scales_come_back(data: Any) -> None:
    outputs = LANES * data.draw(st.integers(1, 3))
    inputs = GROUP * data.draw(st.integers(1, 3))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scales = draw.standard_normal((outputs, inputs // GROUP)).astype(np.float16).astype(np.float32)
    minimums = draw.standard_normal(scales.shape).astype(np.float16).astype(np.float32)
    codes = draw.integers(16, size=(outputs, inputs))
    wide, low = np.repeat(scales, GROUP, 1), np.repeat(minimums, GROUP, 1)
    np.testing.assert_array_equal(
        unpack(pack4(codes, scales, minimums)), codes.astype(np.float32) * wide + low
    )
    codes = draw.integers(-128, 128, size=(outputs, inputs))
    np.testing.assert_array_equal(unpack(pack8(codes, scales)), codes.astype(np.float32) * wide)


@pytest.mark.parametrize(("form", "steps"), [(Form.INT8, 254), (Form.INT4, 15)])
@pytest.mark.parametrize("size", SIZES)
def test_quantised_to_the_nearest_code(form: Form, steps: int, size: tuple[int, int]) -> None:
    weight = some(1, *size)
    groups = weight.reshape(size[0], -1, GROUP)
    span = 2 * np.abs(groups).max(-1) if form is Form.INT8 else groups.max(-1) - groups.min(-1)
    error = np.abs(unpack(quantise(weight, form)) - weight).reshape(groups.shape).max(-1)
    # Half a step, and what float16 does to the scale (half a unit of 11 bits, over all steps) and minimum.
    assert (error <= span / steps * (0.5 + steps * 2**-12) + np.abs(groups).max(-1) * 2**-11).all()


@pytest.mark.parametrize("form", MADE)
def test_what_is_representable_is_kept(form: Form) -> None:
    once = unpack(quantise(some(2, 16, 64), form))
    np.testing.assert_array_equal(unpack(quantise(once, form)), once)
    zeros = np.zeros((8, 32), np.float32)
    np.testing.assert_array_equal(unpack(quantise(zeros, form)), zeros)


@pytest.mark.parametrize("form", MADE)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e5])
def test_numbers_beyond_float16_are_refused(form: Form, bad: float) -> None:
    weight = some(3, 8, 32)
    weight[5, 7] = bad
    with pytest.raises(ValueError, match="float16"):
        quantise(weight, form)


def test_what_fits() -> None:
    assert fits(8, 32)
    assert not fits(12, 32)
    assert not fits(8, 48)


def test_stacked_outputs_follow_one_another() -> None:
    parts = [quantise(some(seed, 8 * seed, 64), Form.INT4) for seed in (1, 2)]
    np.testing.assert_array_equal(unpack(stack(parts)), np.concatenate([unpack(part) for part in parts]))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 65, 131])
@pytest.mark.parametrize("form", MADE)
@pytest.mark.parametrize("size", SIZES)
def test_products(form: Form, size: tuple[int, int], rows: int, shared_by: int) -> None:
    weights, x, start = quantise(some(4, *size), form), some(5, rows, size[1]), some(6, rows, size[0])
    exact = start + x.astype(np.float64) @ unpack(weights).T.astype(np.float64)
    found = product(x, weights, start)
    # An input is off by 2^-16 of its group's largest at most, at random.
    bound = 2**-16 * 4 * np.sqrt(size[1]) * np.abs(x).max() * np.abs(unpack(weights)).max()
    assert np.abs(found - exact).max() <= bound + 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("form", MADE)
def test_a_row_does_not_depend_on_others_nor_on_threads(form: Form) -> None:
    weights, x = quantise(some(7, 72, 96), form), some(8, 70, 96)
    threads.use(2)
    together = product(x, weights)
    threads.use(1)
    alone = np.concatenate([product(x[r : r + 1], weights) for r in range(len(x))])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("form", MADE)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_and_in_its_row(form: Form, bad: float) -> None:
    weights, x = quantise(some(9, 16, 64), form), some(10, 2, 64)
    clean = product(x, weights)
    x[1, 40] = bad
    found = product(x, weights)
    np.testing.assert_array_equal(found[0], clean[0])
    assert np.isnan(found[1]).all()


HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_1": (0, 2),
    "Q5_K": (0, 2),
} | {"Q6_K": (208,)}
"""Bytes of a GGUF block at which float16 numbers begin; in the other types at 0."""


def file_bytes(kind: str, outputs: int, inputs: int, *, plain: bool) -> NDArray[np.uint8]:
    """Random bytes of a GGUF matrix; if plain, its scales are neither huge nor NaN."""
    layout, draw = GGUF_FORMS[kind].layout, np.random.default_rng(11)
    shape = (outputs, inputs // layout.block)
    blocks = draw.integers(256, size=(*shape, layout.block_bytes), dtype=np.uint8)
    if plain and kind == "MXFP4":
        blocks[..., 0] = draw.integers(118, 124, shape)
    elif plain:
        for byte in HALVES.get(kind, (0,)):
            scales = draw.standard_normal(shape).astype(np.float16)
            blocks[..., byte : byte + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(outputs, -1)


def dequantised(raw: NDArray[np.uint8], kind: str) -> Floats:
    with np.errstate(all="ignore"):
        weights: Floats = dequantize(raw, GGMLQuantizationType[kind])
    return weights


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("kind", GGUF_FORMS)
def test_files_bits_are_kept(kind: str, plain: bool, shared_by: int) -> None:
    raw = file_bytes(kind, 24, 768, plain=plain)
    packed, wanted = from_gguf(raw, kind), dequantised(raw, kind)
    found = unpack(packed)
    assert packed.tiles.nbytes == raw.nbytes
    assert not (plain and np.isnan(wanted).any())
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    numbers = ~np.isnan(wanted)
    np.testing.assert_array_equal(found[numbers].view(np.uint32), wanted[numbers].view(np.uint32))


@pytest.mark.parametrize("outputs", [3, 13])
def test_outputs_that_fill_no_tile_are_followed_by_zeros(outputs: int) -> None:
    raw = file_bytes("Q4_K", outputs, 512, plain=True)
    found = unpack(from_gguf(raw, "Q4_K"))
    np.testing.assert_array_equal(found[:outputs], dequantised(raw, "Q4_K"))
    assert len(found) % LANES == 0
    assert not found[outputs:].any()


def test_other_types_and_torn_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="IQ2_XXS has no packed form"):
        from_gguf(np.zeros((8, 66), np.uint8), "IQ2_XXS")
    with pytest.raises(ValueError, match="whole blocks of Q4_K"):
        from_gguf(np.zeros((8, 145), np.uint8), "Q4_K")
    with pytest.raises(ValueError, match="nothing is quantised to q6_k"):
        quantise(np.zeros((8, 256), np.float32), Form.Q6_K)


@pytest.mark.parametrize("kind", GGUF_FORMS)
def test_products_of_every_form(kind: str) -> None:
    # 9 tiles: an odd number, and unequal parts.
    packed, x = from_gguf(file_bytes(kind, 72, 768, plain=True), kind), some(12, 70, 768)
    weights, start = unpack(packed).astype(np.float64), some(13, 70, 72)
    inputs = Inputs.of(72, 768)
    take(x, inputs)
    quantised = inputs.codes[:70] * np.repeat(inputs.scales[:70], GROUP, 1).astype(np.float64)
    sizes = np.abs(quantised) @ np.abs(weights).T + np.abs(start)
    threads.use(2)
    together = product(x, packed, start)
    threads.use(1)
    # What is inexact is float32 sums: of 24 groups, their scales and minimums, in some order.
    assert (np.abs(together - start - quantised @ weights.T) <= 1e-6 * sizes).all()
    np.testing.assert_array_equal(together[:3], product(x[:3], packed, start[:3]))
    for r in (0, 69):
        np.testing.assert_array_equal(together[r : r + 1], product(x[r : r + 1], packed, start[r : r + 1]))


@pytest.mark.parametrize("rows", [1, 5])
def test_products_go_to_columns_of_a_wider_array(rows: int) -> None:
    parts = [from_gguf(file_bytes(kind, 24, 256, plain=True), kind) for kind in ("Q4_K", "Q6_K")]
    inputs = Inputs.of(padded(rows), 256)
    x = some(14, rows, 256)
    take(x, inputs)
    out = np.zeros((padded(rows), 64), np.float32)
    for first, packed in zip((8, 32), parts, strict=True):
        multiply_rows(inputs, Matrix.of(packed), out[:, first : first + 24], rows)
    for first, packed in zip((8, 32), parts, strict=True):
        np.testing.assert_array_equal(out[:rows, first : first + 24], product(x, packed))
    assert not out[:rows, :8].any()
    assert not out[:rows, 56:].any()


@pytest.mark.parametrize("kind", ["Q4_K", "MXFP4"])
def test_rows_of_experts(kind: str, shared_by: int) -> None:
    raw = file_bytes(kind, 6 * 40, 512, plain=True).reshape(6, 40, -1)
    experts, x = [from_gguf(part, kind) for part in raw], some(15, 9, 512)
    chosen, counts = np.array([5, 0, 3, 2]), np.array([1, 5, 0, 3])
    order = [[4], [0, 1, 2, 8, 4], [], [7, 0, 4]]
    first, rows = row_ranges(counts.tolist())
    assert (first.tolist(), rows) == ([0, 1, 9, 9], 13)
    tokens, gathered = Inputs.of(12, 512), Inputs.of(padded(rows), 512)
    take(x, tokens)
    places = np.full(rows, -1)
    for at, of in zip(first, order, strict=True):
        places[at : at + len(of)] = of
    copy_rows(tokens, places, 512, gathered)
    out = np.zeros((padded(rows), 40), np.float32)
    multiply_grouped(gathered, Experts.of(experts), chosen, first, counts, out)
    for at, expert, of in zip(first, chosen, order, strict=True):
        if of:
            np.testing.assert_array_equal(out[at : at + len(of)], product(x[of], experts[expert]))


def test_experts_that_differ_are_refused() -> None:
    parts = [from_gguf(file_bytes(kind, 8, 256, plain=True), kind) for kind in ("Q4_K", "Q6_K")]
    with pytest.raises(ValueError, match="one form and one shape"):
        Experts.of(parts)
