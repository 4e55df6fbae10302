"""The layouts of all layers' records. Layers may differ in size, not in format."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby

from .record import Element, Format, Layout

MOST_LAYERS = 1024
"""No model has as many; it bounds what a file that claims to have more can take of memory and time."""

_SHAPE = struct.Struct("<III")

Shape = tuple[int, int, int]
"""(number of layers, kv_heads, head_dim) of consecutive layers."""


@dataclass(frozen=True)
class StoreLayout:
    """The layout of each layer's records, layer 0 first; all have one format and one element."""

    layers: tuple[Layout, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= MOST_LAYERS:
            raise ValueError(f"a store has 1 to {MOST_LAYERS} layers, not {len(self.layers)}")
        if len({(layout.format, layout.element) for _, layout in self.groups}) > 1:
            raise ValueError("all layers of a store have one format and one element")

    @classmethod
    def uniform(cls, layout: Layout, layers: int) -> StoreLayout:
        """Make a layout of so many equal layers."""
        return cls((layout,) * layers)

    @classmethod
    def of(cls, form: Format, element: Element, shapes: Iterable[Shape]) -> StoreLayout:
        """Make a layout from what `shapes` returns.

        Raises:
            ValueError: There is no such layout.
        """
        layers: list[Layout] = []
        for count, kv_heads, head_dim in shapes:
            if not 1 <= count <= MOST_LAYERS - len(layers):  # before they take memory
                raise ValueError(f"{len(layers)} and {count} layers are not 1 to {MOST_LAYERS}")
            layers += [Layout(form, element, kv_heads, head_dim)] * count
        return cls(tuple(layers))

    @classmethod
    def unpack(cls, form: Format, element: Element, packed: bytes) -> StoreLayout:
        """Make a layout from what `pack` returned.

        Raises:
            ValueError: There is no such layout.
        """
        return _unpacked(form, element, packed)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> Layout:
        """Return the layout of a layer.

        Raises:
            ValueError: There is no layer of this number.
        """
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer {layer} of {len(self.layers)}")
        return self.layers[layer]

    def __iter__(self) -> Iterator[Layout]:
        return iter(self.layers)

    @cached_property
    def groups(self) -> tuple[tuple[int, Layout], ...]:
        """(number of layers, their layout) of consecutive layers that are equal."""
        return tuple((len(list(alike)), layout) for layout, alike in groupby(self.layers))

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The groups, each as what may differ between layers."""
        return tuple((count, layout.kv_heads, layout.head_dim) for count, layout in self.groups)

    def pack(self) -> bytes:
        """Return shapes as bytes, each as three unsigned 32-bit integers, little endian."""
        return b"".join(_SHAPE.pack(*shape) for shape in self.shapes)

    @property
    def format(self) -> Format:
        """The format of all records."""
        return self.layers[0].format

    @property
    def element(self) -> Element:
        """The compute dtype of all layers."""
        return self.layers[0].element

    @cached_property
    def raw(self) -> StoreLayout:
        """The layout of checkpoints beside records of this layout."""
        return StoreLayout(tuple(layout.raw for layout in self.layers))

    @property
    def alike(self) -> Layout:
        """The layout of every layer.

        Raises:
            ValueError: The layers differ.
        """
        if len(self.groups) > 1:
            raise ValueError("the layers of this store differ: ask for the layout of one")
        return self.layers[0]

    @cached_property
    def record_bytes(self) -> tuple[int, ...]:
        """Bytes of one record in each layer."""
        return tuple(layout.record_bytes for layout in self.layers)

    @cached_property
    def column_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return sum(self.record_bytes)


@lru_cache(maxsize=64)
def _unpacked(form: Format, element: Element, packed: bytes) -> StoreLayout:
    """Make one object for all runs of a model, because a store has many runs."""
    if len(packed) % _SHAPE.size:
        raise ValueError(f"{len(packed)} bytes are not shapes of {_SHAPE.size} bytes each")
    return StoreLayout.of(form, element, _SHAPE.iter_unpack(packed))
