"""The emulator itself: it runs what is right in every order, and refuses what is wrong in some."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from .conftest import Emulate
from .emulator import Emulated, EmulatorError, Order, Staging
from .numbers import Number, narrow, widen

SAMPLES = Path(__file__).parent / "samples.cu"
WAYS = list(product(Order, Staging, range(3)))


@pytest.fixture(scope="module")
def samples(emulate: Emulate) -> Emulated:
    return emulate(SAMPLES, {"FLOAT16": 0})


@pytest.fixture
def numbers() -> NDArray[np.float32]:
    return np.random.default_rng(5).standard_normal(64).astype(np.float32)


@pytest.mark.parametrize(("order", "landing", "seed"), WAYS)
def test_what_is_right_runs_in_every_order(
    samples: Emulated, numbers: NDArray[np.float32], order: Order, landing: Staging, seed: int
) -> None:
    out = np.full(1, np.nan, np.float32)
    samples.launch("total", (1, 1, 1), 64, 256, out, numbers, 0, order=order, landing=landing, seed=seed)
    np.testing.assert_allclose(out, numbers.sum(), rtol=1e-5)
    turned = np.full(64, np.nan, np.float32)
    samples.launch("reverse", (1, 1, 1), 32, 128, turned, numbers, 0, order=order, landing=landing, seed=seed)
    np.testing.assert_array_equal(turned, numbers[::-1])
    tops = np.full(2, np.nan, np.float32)
    samples.launch("largest", (2, 1, 1), 32, 0, tops, numbers, 0, order=order, landing=landing, seed=seed)
    np.testing.assert_array_equal(tops, numbers.reshape(2, 32).max(axis=1))
    sums = np.zeros(64, np.uint32)
    samples.launch("words", (1, 1, 1), 64, 256, sums, numbers, 0, order=order, landing=landing, seed=seed)
    halves, singles = np.arange(64, dtype=np.uint16), np.arange(64, dtype=np.uint8)
    wanted = np.repeat(halves.view(np.uint32), 2) + np.repeat(singles.view(np.uint32), 4)
    np.testing.assert_array_equal(sums, wanted)


@pytest.mark.parametrize(
    ("kernel", "bug", "words"),
    [
        ("total", 1, "races with"),
        ("total", 2, "races with"),
        ("total", 3, "out of bounds"),
        ("total", 4, "shared write at byte 256 of 256"),
        ("total", 5, "__syncthreads"),
        ("total", 6, "after some threads have exited"),
        ("reverse", 1, "async copy still fills"),
        ("reverse", 2, "async copy still fills"),
        ("reverse", 3, "races with"),
        ("reverse", 4, "misaligned async copy"),
        ("reverse", 5, "async copy still fills"),
        ("reverse", 6, "races with|async copy still fills"),
        ("largest", 1, "diverged"),
        ("largest", 2, "has exited|never come"),
        ("largest", 3, "another block writes"),
        ("largest", 4, "null pointer"),
        ("largest", 5, "misaligned global read of 8 bytes"),
        ("largest", 6, "diverged"),
        ("largest", 7, "index 2 outside of an array"),
        ("largest", 8, "index 2 outside of an array"),
        ("largest", 9, "a shift by 32 bits"),
        ("words", 1, "races with a write"),
        ("words", 2, "races with"),
        ("words", 3, "races with"),
        ("words", 4, "races with|async copy still fills"),
        ("words", 5, "races with"),
        ("words", 6, "races with"),
        ("words", 7, "races with"),
        ("words", 8, "races with"),
    ],
)
def test_a_bug_is_caught_in_every_order(
    samples: Emulated, numbers: NDArray[np.float32], kernel: str, bug: int, words: str
) -> None:
    sizes = {"total": (1, 64, 256), "reverse": (1, 32, 128), "largest": (2, 32, 0), "words": (1, 64, 256)}
    grid, threads, shared = sizes[kernel]
    for order, landing, seed in WAYS:
        out = np.full(64, np.nan, np.float32)
        launch = partial(samples.launch, order=order, landing=landing, seed=seed)
        with pytest.raises(EmulatorError, match=words):
            launch(kernel, (grid, 1, 1), threads, shared, out, numbers, bug)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("number", [Number.BFLOAT16, Number.FLOAT16])
def test_tensor_core_product(emulate: Emulate, number: Number, transposed: int) -> None:
    samples = emulate(SAMPLES, {"FLOAT16": int(number is Number.FLOAT16)})
    rng = np.random.default_rng(1)
    a, b = (narrow(rng.standard_normal(shape).astype(np.float32), number) for shape in ((16, 16), (16, 8)))
    c = np.full((16, 8), np.nan, np.float32)
    given = np.ascontiguousarray(b.T) if transposed else b
    samples.launch("product", (1, 1, 1), 32, 1024, c, a, given, transposed)
    np.testing.assert_allclose(c, widen(a) @ widen(b), rtol=1e-5, atol=1e-5)


def test_float16_is_numpys(emulate: Emulate) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    wide = every.astype(np.float32)
    with np.errstate(all="ignore"):
        middle = wide / 2 + np.nextafter(every, np.float16(np.inf)).astype(np.float32) / 2
        beside = [np.nextafter(y, np.float32(end)) for y in (wide, middle) for end in (-np.inf, np.inf)]
    x = np.concatenate([wide, middle, *beside])
    packed, widened = np.zeros(len(x) // 2, np.uint32), np.zeros(len(x) // 2, np.float32)
    given = np.resize(every, len(x) // 2)
    samples = emulate(SAMPLES, {"FLOAT16": 1})
    samples.launch("halves", (len(x) // 64, 1, 1), 32, 0, packed, widened, x, given.view(np.uint16))
    np.testing.assert_array_equal(packed.view(np.float16), narrow(x, Number.FLOAT16))
    np.testing.assert_array_equal(widened, given.astype(np.float32))


def test_blocks_that_depend_on_each_other(samples: Emulated) -> None:
    data = np.zeros(96, np.float32)
    samples.launch("chain", (3, 1, 1), 32, 0, data, 0)
    assert data.tolist() == [1] * 96
    with pytest.raises(EmulatorError, match="another block writes"):
        samples.launch("chain", (3, 1, 1), 32, 0, data, 1)


@pytest.mark.parametrize("bug", [0, 1, 2])
def test_blocks_that_read_what_one_writes(samples: Emulated, bug: int) -> None:
    data = np.array([7, 0, 0, 0], np.uint32)
    if bug:
        with pytest.raises(EmulatorError, match="another block reads"):
            samples.launch("read_by_all", (3, 1, 1), 32, 0, data, bug)
    else:
        samples.launch("read_by_all", (3, 1, 1), 32, 0, data, bug)
        assert data.tolist() == [7] * 4


def test_arguments_must_fit(samples: Emulated) -> None:
    with pytest.raises(TypeError, match="takes 2 arguments"):
        samples.launch("chain", (1, 1, 1), 32, 0, np.zeros(32, np.float32))
    with pytest.raises(TypeError, match="argument 1"):
        samples.launch("chain", (1, 1, 1), 32, 0, np.zeros(32, np.float32), 0.5)
    with pytest.raises(EmulatorError, match="whole warps"):
        samples.launch("chain", (1, 1, 1), 33, 0, np.zeros(64, np.float32), 0)
