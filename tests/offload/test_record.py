"""The record layout: planes, sizes, and the numbers that FORMAT.md promises."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

import spilld.offload.record as record_module
from spilld.offload.record import (
    HEAD_DIMS,
    SEALED,
    Element,
    Format,
    Layout,
    round_up,
)

PAGE = (Path(str(record_module.__file__)).parent / "FORMAT.md").read_text()
PLANES = ("k_codes", "k_scales", "v_codes", "v_scales", "end")
LAYOUTS = [
    Layout(form, element, kv_heads, head_dim)
    for form in SEALED
    for element in Element
    for kv_heads in (1, 2, 3, 8, 17)
    for head_dim in HEAD_DIMS
]


MODELS = {"SmolLM2-135M": (30, 3, 64), "Gemma3-270M": (18, 1, 256), "Llama-3-8B": (32, 8, 128)}
"""Layers, KV heads, head_dim."""


def formula(layout: Layout) -> int:
    """What section "Bytes per token" of FORMAT.md says, worked out."""
    stated = re.search(rf"^ +record\({layout.format}\) += ([HDGe0-9()+· ]+)$", PAGE, re.MULTILINE)
    assert stated is not None, layout.format
    names = {"H": layout.kv_heads, "D": layout.head_dim, "e": layout.element.nbytes}
    nbytes = eval(stated[1].replace("·", "*"), {}, names | {"G": -(-layout.head_dim // 32)})
    assert isinstance(nbytes, int)
    return nbytes


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_planes_are_aligned_and_cover_the_record(layout: Layout) -> None:
    planes = [layout.plane(name) for name in PLANES]
    assert planes[0][0] == 0
    for (offset, size), (following, _) in pairwise(planes):
        assert offset % 64 == 0
        assert offset + size == following
    assert layout.record_bytes % 64 == 0
    assert layout.record_bytes == planes[-1][0] == formula(layout)


def test_format_page_states_the_numbers_of_the_layout() -> None:
    for name, (layers, kv_heads, head_dim) in MODELS.items():
        for form in SEALED:
            for element in Element:
                size = Layout(form, element, kv_heads, head_dim).record_bytes
                label = f"{name} {form}" + (f" {element}" if form is Format.EXACT else "")
                row = re.search(rf"^\| {re.escape(label)} \|(.*)\|$", PAGE, re.MULTILINE)
                assert row is not None, label
                stated = [cell.strip() for cell in row[1].split("|")]
                assert stated == [str(layers), str(size), f"{size / 64:g}", f"{layers * size // 64}"]


def test_format_page_states_the_offsets_of_the_layout() -> None:
    sizes = [(kv_heads, head_dim) for _, kv_heads, head_dim in MODELS.values()]
    columns = [Layout(form, Element.BFLOAT16, *size) for size in sizes for form in SEALED]
    table = PAGE[PAGE.index("| plane | exact bf16") :]
    for name in PLANES:
        row = re.search(rf"^\| {'record' if name == 'end' else name} \|(.*)\|$", table, re.MULTILINE)
        assert row is not None, name
        offsets = [
            "-" if name.endswith("scales") and layout.format is Format.EXACT else str(layout.offset(name))
            for layout in columns
        ]
        assert [cell.strip() for cell in row[1].split("|")] == offsets


def test_unsupported_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="head_dim 48"):
        Layout(Format.INT8, Element.FLOAT32, 1, 48)
    with pytest.raises(ValueError, match="kv_heads"):
        Layout(Format.INT8, Element.FLOAT32, 0, 64)


@pytest.mark.parametrize(("n", "unit", "rounded"), [(0, 64, 0), (1, 64, 64), (64, 64, 64), (65, 64, 128)])
def test_round_up(n: int, unit: int, rounded: int) -> None:
    assert round_up(n, unit) == rounded


@pytest.mark.parametrize("element", Element)
def test_raw_is_one_plane_of_bare_numbers(element: Element) -> None:
    layout = Layout(Format.RAW, element, 3, 64)
    assert layout.plane("numbers") == (0, 64 * 2 * 3 * 64 * element.nbytes)
    assert layout.record_bytes == 64 * 2 * 3 * 64 * element.nbytes == formula(layout)
