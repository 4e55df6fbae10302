"""The codec against its numpy reference, bit for bit, and both against what FORMAT.md promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spilld.offload.kernels.codec.codec import Codec
from spilld.offload.record import (
    BLOCK,
    HEAD_DIMS,
    SEALED,
    Element,
    Format,
    Layout,
)

from . import reference

Array = npt.NDArray[Any]

LAYOUTS = st.builds(
    Layout,
    st.sampled_from(SEALED),
    st.sampled_from(Element),
    st.sampled_from((1, 2, 3)),
    st.sampled_from(HEAD_DIMS),
)
ZEROS = (0.0, -0.0)
SMALL = (1e-45, -1e-45, 1.1754942e-38, 1e-30, -1e-22, 1e-20, 3e-5)
PLAIN = (0.1, 1.0, -1.0, 127.0, 127.5, 255.0)
HUGE = (1e19, 3e20, -5e36, 1e38, 3.4028235e38, -3.4028235e38)
BROKEN = (np.inf, -np.inf, np.nan)
SPECIAL = np.array(ZEROS + SMALL + PLAIN + HUGE + BROKEN, np.float32)


def empty_records(layout: Layout, slots: int) -> npt.NDArray[np.uint8]:
    """Records with an aligned base and a pattern that seal must overwrite."""
    raw = np.full(slots * layout.record_bytes + 64, 0xA5, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + slots * layout.record_bytes].reshape(slots, layout.record_bytes)


def elements(layout: Layout, numbers: Array) -> Array:
    """float32, or its nearest bfloat16 as bits."""
    numbers = np.ascontiguousarray(numbers, np.float32)
    return numbers if layout.element is Element.FLOAT32 else reference.bf16_nearest(numbers)


def ordinary(layout: Layout, blocks: int, seed: int, spread: float = 1.0) -> tuple[Array, Array]:
    """K with an outlier channel, V with an offset: [kv_heads, blocks*64, head_dim] each."""
    rng = np.random.default_rng(seed)
    k, v = spread * rng.standard_normal((2, layout.kv_heads, blocks * BLOCK, layout.head_dim))
    k[..., 1] *= 20
    v[..., : layout.head_dim // 2] += 3 * spread
    return elements(layout, k), elements(layout, v)


def hostile(layout: Layout, seed: int, kind: str) -> Array:
    shape = (layout.kv_heads, 2 * BLOCK, layout.head_dim)
    rng = np.random.default_rng(seed)
    if kind == "bits":
        bits = rng.integers(0, 2**32, shape, np.uint32)
        return bits.view(np.float32) if layout.element is Element.FLOAT32 else (bits >> 16).astype(np.uint16)
    if kind == "special":
        return elements(layout, rng.choice(SPECIAL, shape))
    if kind == "subnormal":
        return elements(layout, rng.standard_normal(shape) * 1e-39)
    if kind == "constant":
        return elements(layout, np.broadcast_to(rng.choice(SPECIAL, (shape[0], 1, shape[2])), shape))
    numbers = rng.standard_normal(shape) * 10.0 ** rng.integers(-30, 30, (shape[0], shape[1], 1))
    numbers[rng.random(shape) < 0.002] = np.nan
    return elements(layout, numbers)


def places(layout: Layout, count: int) -> Array:
    """Byte offsets of records that follow one another."""
    return np.arange(count) * layout.record_bytes


def sealed(layout: Layout, k: Array, v: Array) -> npt.NDArray[np.uint8]:
    records = empty_records(layout, k.shape[1] // BLOCK)
    Codec(layout).seal(k, v, records, np.arange(len(records)))
    return records


def plane(layout: Layout, record: npt.NDArray[np.uint8], name: str, dtype: Any) -> Array:
    offset, size = layout.plane(name)
    return record[offset : offset + size].view(dtype)


@settings(max_examples=150, deadline=None)
@given(
    LAYOUTS,
    st.integers(0, 2**32 - 1),
    st.sampled_from(("bits", "special", "subnormal", "constant", "scales")),
    st.sampled_from(("bits", "special", "subnormal", "constant", "scales")),
)
def test_equals_reference_bit_for_bit(layout: Layout, seed: int, k_kind: str, v_kind: str) -> None:
    k, v = hostile(layout, seed, k_kind), hostile(layout, seed + 1, v_kind)
    records, expected = empty_records(layout, 4), empty_records(layout, 4)
    rows = np.array([3, 1])
    codec = Codec(layout)
    codec.seal(k, v, records, rows)
    reference.seal(layout, k, v, expected, rows)
    for name in ("k_codes", "k_scales", "v_codes", "v_scales"):
        np.testing.assert_array_equal(
            plane(layout, records[3], name, np.uint8), plane(layout, expected[3], name, np.uint8), name
        )
    np.testing.assert_array_equal(records, expected)

    opened, by_reference = np.zeros((2, *k.shape), np.float32), np.ones((2, *k.shape), np.float32)
    codec.open(records.reshape(-1), rows * layout.record_bytes, *opened)
    reference.open(layout, records, rows, *by_reference)
    np.testing.assert_array_equal(opened.view(np.uint32), by_reference.view(np.uint32))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("element", Element)
def test_exact_round_trip_is_bit_identical(element: Element, head_dim: int) -> None:
    layout = Layout(Format.EXACT, element, 2, head_dim)
    k, v = hostile(layout, 1, "bits"), hostile(layout, 2, "bits")
    opened = np.zeros((2, *k.shape), np.float32)
    Codec(layout).open(sealed(layout, k, v).reshape(-1), places(layout, 2), *opened)
    bits = np.stack([k, v])
    if element is Element.BFLOAT16:
        bits = bits.astype(np.uint32) << np.uint32(16)
    np.testing.assert_array_equal(opened.view(np.uint32), bits.view(np.uint32))


@settings(max_examples=40, deadline=None)
@given(LAYOUTS, st.integers(0, 2**32 - 1), st.sampled_from((1e-30, 1e-6, 1.0, 1e6, 1e15)))
def test_error_of_a_value_is_at_most_half_a_step(layout: Layout, seed: int, spread: float) -> None:
    k, v = ordinary(layout, 1, seed, spread)
    record = sealed(layout, k, v)[0]
    k_value, v_value = (x.astype(np.float64) for x in reference.values(layout, record))
    k_true, v_true = (reference.widen(x).astype(np.float64) for x in (k, v))
    if layout.format is Format.EXACT:
        np.testing.assert_array_equal(k_value, k_true)
        np.testing.assert_array_equal(v_value, v_true)
        return
    if layout.format is Format.INT4:
        turn = hadamard(layout.head_dim)
        assert_within_half_a_step_of_four_bits(layout, k_true @ turn, k_value @ turn)
    else:
        assert_within_half_a_step(k_true, k_value, np.abs(k_true).max(axis=-1, keepdims=True) / 127)
    if layout.format is Format.INT8:
        assert_within_half_a_step(v_true, v_value, np.abs(v_true).max(axis=-1, keepdims=True) / 127)
    else:
        assert_within_half_a_step_of_four_bits(layout, v_true, v_value)


def hadamard(dim: int) -> Array:
    """The rotation as a matrix, float64: its own definition, not the fast one."""
    blocks = [1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1]
    matrix, start = np.zeros((dim, dim)), 0
    for size in blocks:
        channels = np.arange(size)
        signs = 1 - 2 * (np.bitwise_count(channels[:, None] & channels) & 1).astype(np.float64)
        matrix[start : start + size, start : start + size] = signs / np.sqrt(size)
        start += size
    return matrix


def assert_within_half_a_step_of_four_bits(layout: Layout, true: Array, value: Array) -> None:
    for channels in reference.groups(layout):
        part = true[..., channels]
        low, high = part.min(axis=-1, keepdims=True), part.max(axis=-1, keepdims=True)
        step = (high - low + 2**-7 * np.abs(low)) / 15
        assert_within_half_a_step(part, value[..., channels], step, np.abs(true).max())


def assert_within_half_a_step(true: Array, value: Array, step: Array, magnitude: float = 0.0) -> None:
    """Half of the step, which bfloat16 may enlarge by 2^-7, and the roundings of the value itself."""
    slack = 2.0**-22 * (np.abs(true) + magnitude)
    assert (np.abs(true - value) <= 0.5 * step * (1 + 2.0**-7) * (1 + 2.0**-20) + slack).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_orthonormal(head_dim: int) -> None:
    turn = hadamard(head_dim)
    np.testing.assert_allclose(turn @ turn, np.eye(head_dim), atol=1e-14)
    x = np.random.default_rng(head_dim).standard_normal((5, head_dim)).astype(np.float32)
    np.testing.assert_allclose(reference.rotate(x), x @ turn, atol=2e-6)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_a_broken_key_of_four_bits_shows_in_its_block(head_dim: int) -> None:
    layout = Layout(Format.INT4, Element.FLOAT32, 1, head_dim)
    k, v = ordinary(layout, 1, 5)
    k[0, 7, 9] = np.nan
    opened = np.empty((2, *k.shape), np.float32)
    Codec(layout).open(sealed(layout, k, v).reshape(-1), places(layout, 1), *opened)
    broken = np.zeros((2, *k.shape), bool)
    broken[0, 0, 7, :64] = True
    np.testing.assert_array_equal(np.isnan(opened), broken)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", SEALED[1:])
def test_a_broken_number_shows_where_it_was(form: Format, bad: float) -> None:
    layout = Layout(form, Element.FLOAT32, 2, 64)
    k, v = ordinary(layout, 1, 5)
    k[1, 7, 9] = v[0, 3, 40] = bad
    record = sealed(layout, k, v)
    k_out, v_out = np.empty_like(k), np.empty_like(v)
    Codec(layout).open(record.reshape(-1), places(layout, 1), k_out, v_out)
    k_broken, v_broken = np.zeros((2, *k.shape), bool)
    k_broken[1, 7] = True
    v_broken[0, 3, 0 if form is Format.INT8 else 32 :] = True
    np.testing.assert_array_equal(np.isnan(k_out), k_broken)
    np.testing.assert_array_equal(np.isnan(v_out), v_broken)


@settings(max_examples=25, deadline=None)
@given(LAYOUTS)
def test_every_byte_is_written_and_other_rows_are_untouched(layout: Layout) -> None:
    k, v = ordinary(layout, 1, 6)
    records = empty_records(layout, 3)
    other = ~records
    for target in (records, other):
        Codec(layout).seal(k, v, target, np.array([1]))
    np.testing.assert_array_equal(records[1], other[1])
    assert (records[::2] == 0xA5).all()
    assert (other[::2] == 0x5A).all()


@pytest.mark.parametrize("element", Element)
@pytest.mark.parametrize("form", SEALED)
def test_strided_views_seal_and_open_alike(form: Format, element: Element) -> None:
    """Slices of a [tokens, heads, head_dim] window and of a longer tile, as the engine passes them."""
    layout = Layout(form, element, 3, 80)
    k, v = ordinary(layout, 2, 7)
    plain = sealed(layout, k, v)
    window = np.zeros((2, 200, 3, 80), k.dtype)
    window[0, 50:178], window[1, 50:178] = k.swapaxes(0, 1), v.swapaxes(0, 1)
    codec = Codec(layout)
    strided = empty_records(layout, 2)
    k_view, v_view = window[:, 50:178].swapaxes(1, 2)
    codec.seal(k_view, v_view, strided, np.arange(2))
    np.testing.assert_array_equal(strided, plain)

    straight = np.zeros((2, *k.shape), np.float32)
    codec.open(plain.reshape(-1), places(layout, 2), *straight)
    tile = np.full((2, 200, 3, 80), 7, np.float32)
    codec.open(plain.reshape(-1), places(layout, 2), *tile[:, 50:178].swapaxes(1, 2))
    np.testing.assert_array_equal(tile[:, 50:178].swapaxes(1, 2), straight)
    assert (tile[:, :50] == 7).all()
    assert (tile[:, 178:] == 7).all()


def test_what_the_kernels_could_not_bear_is_refused() -> None:
    layout = Layout(Format.K8V4, Element.FLOAT32, 2, 64)
    codec = Codec(layout)
    k, v = ordinary(layout, 2, 8)
    records = empty_records(layout, 3)
    before = records.copy()
    rows = np.array([0, 2])
    refused: list[tuple[Array, Array, Array]] = [
        (k[:, :-1], rows, records),
        (k.astype(np.float64), rows, records),
        (np.asfortranarray(k), rows, records),
        (k[:, ::-1], rows, records),
        (k, np.array([0, 3]), records),
        (k, np.array([-1, 0]), records),
        (k, rows.astype(np.int32), records),
        (k, np.array([0, 9, 2])[::2], records),
        (k, rows, records[:, :-64]),
        (k, rows, records.view(np.int8)),
    ]
    for k_bad, rows_bad, records_bad in refused:
        with pytest.raises(ValueError, match=r"k is|strides|rows|records"):
            codec.seal(k_bad, v, records_bad, rows_bad)
    np.testing.assert_array_equal(records, before)


def test_open_refuses_what_does_not_fit() -> None:
    layout = Layout(Format.K8V4, Element.BFLOAT16, 2, 64)
    codec, width = Codec(layout), layout.record_bytes
    k, v = np.ones((2, 2, 2 * BLOCK, 64), np.float32)
    memory = empty_records(layout, 3).reshape(-1)
    good = np.array([0, 2 * width])
    refused: list[tuple[Array, Array, Array]] = [
        (k[:, :-1], good, memory),
        (k.astype(np.float64), good, memory),
        (k.astype(np.uint16), good, memory),
        (k[:, ::-1], good, memory),
        (k, np.array([0, 2 * width + 64]), memory),
        (k, np.array([-64, 0]), memory),
        (k, np.array([0, 32]), memory),
        (k, good.astype(np.int32), memory),
        (k, np.array([0, 9, width])[::2], memory),
        (k, good, memory[:-64]),
        (k, good, memory.view(np.int8)),
        (k, good, memory.reshape(3, -1)),
    ]
    for k_bad, places_bad, memory_bad in refused:
        before = k_bad.copy()
        with pytest.raises(ValueError, match=r"k is|strides|places|memory"):
            codec.open(memory_bad, places_bad, k_bad, v.copy())
        np.testing.assert_array_equal(k_bad, before)


def test_no_blocks_is_no_work() -> None:
    layout = Layout(Format.INT8, Element.BFLOAT16, 2, 64)
    nothing, opened = np.zeros((2, 0, 64), np.uint16), np.zeros((2, 0, 64), np.float32)
    Codec(layout).seal(nothing, nothing, empty_records(layout, 1), np.zeros(0, np.int64))
    Codec(layout).open(empty_records(layout, 1).reshape(-1), places(layout, 0), opened, opened)


@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
def test_reference_roundings_bracket_the_number(rounding: str) -> None:
    numbers = np.random.default_rng(9).integers(0, 2**32, 4096, np.uint32).view(np.float32)
    numbers = np.concatenate([SPECIAL, numbers])
    result = getattr(reference, f"bf16_{rounding}")(numbers)
    assert (result[np.isnan(numbers)] == 0x7FC0).all()
    finite = np.isfinite(numbers)
    below = (numbers.view(np.uint32)[finite] & np.uint32(0xFFFF0000)).view(np.float32)
    ulp = np.abs(
        (numbers.view(np.uint32)[finite] | np.uint32(0xFFFF)).view(np.float32).astype(np.float64) - below
    )
    error = reference.widen(result[finite]).astype(np.float64) - numbers[finite]
    low = {"nearest": -0.5, "up": 0.0, "down": -1.0}[rounding]
    inside = np.isfinite(error)
    assert (error >= low * ulp * (1 + 1e-4))[inside].all()
    assert (error <= (low + 1) * ulp * (1 + 1e-4))[inside].all()
