"""Unpacks a msgpack map from an untrusted peer, at a bounded cost.

A frame of 16 MiB can hold 16 million lists, which take long and much memory to make. So the map is walked
first, which makes no objects, and then its parts are unpacked one by one: unknown ones never, those with many
items up to a number of items, and all others only where they are small, or one string.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgpack

MOST_FIELDS = 1000
"""Fields of a map, known or not."""

SMALL_BYTES = 16 << 10
"""The largest field that is neither one string nor a list of many items."""

KEY_BYTES = 256

MOST_KEYS = 64
"""Keys of a map in a list."""

_STRINGS = {*range(0xA0, 0xC0), 0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB}
"""First bytes of strings and blobs."""

_LONG_LISTS = {0xDC: 2, 0xDD: 4}
"""First bytes of lists, and in how many bytes their length follows."""


class TooMuch(Exception):
    """A field is larger than any valid value.

    Args:
        name: The field.
        given: How large it is.
        allowed: How large it may be.
        fields: The fields that were read before it.
    """

    def __init__(self, name: str, given: str, allowed: str, fields: dict[str, object]) -> None:
        super().__init__(f"{name} has {given}; allowed: {allowed}")
        self.name = name
        self.fields = fields


class _Nested(Exception):
    pass


def unpack(body: bytes, known: Sequence[str], lists: Mapping[str, int], most: int) -> dict[str, object]:
    """Unpack the known fields of a map.

    Args:
        body: The map as msgpack.
        known: The fields to unpack, in this order.
        lists: Fields that may have many items, and how many lists and maps each item may be.
        most: How many items such a field may have.

    Returns:
        The known fields that are in the map.

    Raises:
        TooMuch: A field in `lists` has more, or another field is large.
        ValueError: It is not a map, or malformed; or msgpack.UnpackException.
    """
    parts = {name: part for name, part in _walked(body) if name in known}
    fields: dict[str, object] = {}
    for name in sorted(parts, key=known.index):
        part = parts[name]
        count = _count(part) if name in lists else None
        if count is not None and count > most:
            raise TooMuch(name, f"{count} items", f"{most}", fields)
        if count is not None:
            try:
                fields[name] = _items(part, count, 1 + lists[name] * count)
            except _Nested:
                allowed = f"{lists[name]} of them"
                raise TooMuch(f"an item of {name}", "lists or maps in it", allowed, fields) from None
        elif part[0] in _STRINGS or len(part) <= SMALL_BYTES:
            fields[name] = msgpack.unpackb(part)
        else:
            raise TooMuch(name, f"{len(part)} bytes", f"{SMALL_BYTES}", fields)
    return fields


def _walked(body: bytes) -> Iterator[tuple[str, memoryview]]:
    """Yield the name and the packed value of each field."""
    walker = msgpack.Unpacker(read_size=len(body), max_buffer_size=len(body))
    walker.feed(body)
    count = walker.read_map_header()
    if count > MOST_FIELDS:
        raise ValueError(f"a map of {count} fields; allowed: {MOST_FIELDS}")
    for _ in range(count):
        key = walker.tell()
        walker.skip()
        begin = walker.tell()
        walker.skip()
        if body[key] in _STRINGS and begin - key <= KEY_BYTES:
            name = msgpack.unpackb(memoryview(body)[key:begin])
            yield str(name), memoryview(body)[begin : walker.tell()]
    if walker.tell() != len(body):
        raise ValueError("it goes on behind its end")


def _count(part: memoryview) -> int | None:
    """Return the number of items of a list; None for anything else."""
    if 0x90 <= part[0] < 0xA0:
        return part[0] & 0xF
    width = _LONG_LISTS.get(part[0])
    return None if width is None else int.from_bytes(part[1 : 1 + width], "big")


def _items(part: memoryview, count: int, containers: int) -> object:
    left = containers

    def made(container: object) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise _Nested
        return container

    most = max(count, MOST_KEYS)
    return msgpack.unpackb(part, list_hook=made, object_hook=made, max_array_len=most, max_map_len=MOST_KEYS)
