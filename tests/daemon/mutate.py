"""Frames that were valid once: bits flipped, cut, spliced, nested, with lengths that are lies."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Frames = list[bytes]

LIES = [
    bytes.fromhex(head + length)
    for head, length in (
        ("d9", "ff"),
        ("da", "ffff"),
        ("db", "ffffffff"),
        ("c4", "ff"),
        ("c6", "ffffffff"),
        ("c9", "ffffffff01"),
        ("dc", "ffff"),
        ("dd", "ffffffff"),
        ("dd", "00ffffff"),
        ("de", "ffff"),
        ("df", "7fffffff"),
    )
]
"""Heads of msgpack strings, blobs, extensions, lists and maps that are longer than any frame."""


def mutated(frames: Sequence[bytes], others: Sequence[bytes], draw: random.Random) -> Frames:
    """Frames, changed once or several times; `others` are bodies of other messages."""
    result = list(frames)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at = draw.randrange(len(result)) if draw.random() < 0.2 else len(result) - 1
        change = draw.choice(CHANGES)
        result[at] = change(result[at], draw.choice(others), draw)
    if draw.random() < 0.05:
        result.insert(draw.randrange(len(result) + 1), draw.choice(others))
    if draw.random() < 0.05 and len(result) > 1:
        del result[draw.randrange(len(result))]
    return result


def _flip(frame: bytes, _other: bytes, draw: random.Random) -> bytes:
    changed = bytearray(frame)
    for _ in range(draw.randint(1, 4)):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(frame: bytes, _other: bytes, draw: random.Random) -> bytes:
    return frame[: draw.randint(0, len(frame))]


def _splice(frame: bytes, other: bytes, draw: random.Random) -> bytes:
    return frame[: draw.randint(0, len(frame))] + other[draw.randint(0, len(other)) :]


def _repeat(frame: bytes, _other: bytes, draw: random.Random) -> bytes:
    begin = draw.randint(0, len(frame))
    end = draw.randint(begin, len(frame))
    return frame[:end] + frame[begin:end] * draw.randint(1, 40) + frame[end:]


def _nest(frame: bytes, _other: bytes, draw: random.Random) -> bytes:
    at = draw.randint(0, len(frame))
    head = draw.choice([b"\x91", b"\x81\xa1a", b"\x81", b"\xdd\x00\x00\x00\x01"])
    return frame[:at] + head * draw.choice([1, 3, 400, 1100, 5000]) + frame[at:]


def _lie(frame: bytes, _other: bytes, draw: random.Random) -> bytes:
    at = draw.randint(0, len(frame))
    return frame[:at] + draw.choice(LIES) * draw.choice([1, 1, 200]) + frame[at + draw.randint(0, 2) :]


def _noise(frame: bytes, _other: bytes, draw: random.Random) -> bytes:
    at = draw.randint(0, len(frame))
    return frame[:at] + draw.randbytes(draw.randint(1, 8)) + frame[at + draw.randint(0, 8) :]


CHANGES: list[Callable[[bytes, bytes, random.Random], bytes]] = [
    _flip,
    _cut,
    _splice,
    _repeat,
    _nest,
    _lie,
    _noise,
]
