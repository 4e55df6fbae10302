"""Layouts of layers that differ: what is said of them, packed and unpacked, and where their extents lie."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spilld.offload.disk.files.extent import (
    ExtentIdentity,
    extent_bytes,
    largest_extent,
    run_bytes,
)
from spilld.offload.record import (
    SEALED,
    Element,
    Format,
    Layout,
)
from spilld.offload.store_layout import MOST_LAYERS, StoreLayout

LAYERS = st.lists(st.sampled_from([(1, 16), (2, 64), (8, 128), (4, 256)]), min_size=1, max_size=12)


def layouts_of(shapes: list[tuple[int, int]], form: Format = Format.K8V4) -> StoreLayout:
    return StoreLayout(tuple(Layout(form, Element.BFLOAT16, heads, dim) for heads, dim in shapes))


@given(LAYERS, st.sampled_from(SEALED))
def test_what_is_packed_is_unpacked(shapes: list[tuple[int, int]], form: Format) -> None:
    layouts = layouts_of(shapes, form)
    assert StoreLayout.unpack(form, Element.BFLOAT16, layouts.pack()) == layouts
    assert StoreLayout.of(form, Element.BFLOAT16, layouts.shapes) == layouts
    assert all(a[1:] != b[1:] for a, b in itertools.pairwise(layouts.shapes)), "a shape is said twice"
    assert len(layouts) == len(shapes)
    assert [(layout.kv_heads, layout.head_dim) for layout in layouts] == shapes
    assert layouts.column_bytes == sum(layout.record_bytes for layout in layouts)
    assert [layout.format for layout in layouts.raw] == [Format.RAW] * len(shapes)


@given(LAYERS, st.integers(1, 30))
def test_extents_lie_one_after_the_other(shapes: list[tuple[int, int]], count: int) -> None:
    layouts = layouts_of(shapes)
    identity = ExtentIdentity(layouts, bytes(32), bytes(16), bytes(32), 1, count)
    at = 0
    for layer, layout in enumerate(layouts):
        assert identity.offset(layer) == at
        assert identity.extent_bytes(layer) == extent_bytes(layout, count)
        assert identity.payload_bytes(layer) == count * layout.record_bytes
        at += extent_bytes(layout, count)
    assert identity.run_bytes == run_bytes(layouts, count) == at
    assert identity.largest_extent == largest_extent(layouts, count)
    assert identity.largest_extent == max(identity.extent_bytes(layer) for layer in range(len(shapes)))
    for layer in (-1, len(shapes)):
        with pytest.raises(ValueError, match="layer"):
            identity.offset(layer)


def test_layers_that_are_alike_have_one_layout() -> None:
    layout = Layout(Format.INT8, Element.FLOAT32, 2, 64)
    assert StoreLayout.uniform(layout, 3).alike == layout
    assert StoreLayout.uniform(layout, 3).shapes == ((3, 2, 64),)
    with pytest.raises(ValueError, match="differ"):
        _ = layouts_of([(1, 16), (2, 16)]).alike


@pytest.mark.parametrize(
    "layers",
    [
        (),
        (Layout(Format.INT8, Element.FLOAT32, 1, 16), Layout(Format.INT4, Element.FLOAT32, 1, 16)),
        (Layout(Format.INT8, Element.FLOAT32, 1, 16), Layout(Format.INT8, Element.BFLOAT16, 1, 16)),
    ],
)
def test_what_is_no_store(layers: tuple[Layout, ...]) -> None:
    with pytest.raises(ValueError, match="layers"):
        StoreLayout(layers)


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        bytes(11),
        bytes(12),
        b"\0\0\0\0" + b"\1\0\0\0" + b"\x10\0\0\0",
        b"\1\0\0\0" + b"\0\0\0\0" + b"\x10\0\0\0",
        b"\1\0\0\0" + b"\1\0\0\0" + b"\x11\0\0\0",
        b"\xff\xff\xff\xff" + b"\1\0\0\0" + b"\x10\0\0\0",
        2 * (b"\0\0\1\0" + b"\1\0\0\0" + b"\x10\0\0\0"),
    ],
)
def test_what_packs_no_store(packed: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        StoreLayout.unpack(Format.INT8, Element.FLOAT32, packed)


def test_what_claims_to_have_many_layers_takes_no_memory() -> None:
    """An archive may say what it likes, 12 bytes a time."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="are not 1 to"):
            StoreLayout.of(Format.INT8, Element.FLOAT32, [(MOST_LAYERS, 1, 64)] * 1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
