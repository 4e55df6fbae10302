"""Estimates how often contents were seen lately, in a fixed amount of memory."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

WIDTH = 1 << 16
"""Places in a row."""

ROWS = 4

SAMPLE = 1 << 14
"""Sightings between two ageings. So many different contents that were seen once fill 22% of each row of the
doorkeeper: another is taken for one of them once in 400 times."""

MOST = 15
"""The highest count: contents that are no longer seen must not keep a high one for long."""

_HALVED = bytes(count // 2 for count in range(256))


class Sketch:
    """The sketch of Einziger, Friedman, Manes, "TinyLFU", ACM TOS 13(4), 2017.

    The first sighting is noted by the doorkeeper, a Bloom filter; those that follow are counted by a
    count-min sketch. After `sample` sightings the doorkeeper is cleared and every count is halved. A count
    is never too low, and seldom too high.
    """

    def __init__(self, sample: int = SAMPLE) -> None:
        self._sample = sample
        self._sightings = 0
        self._door = bytearray(ROWS * WIDTH)
        self._counts = bytearray(ROWS * WIDTH)

    def add(self, content: bytes) -> None:
        """Count a sighting."""
        door, places = _places(content)
        if all(self._door[at] for at in door):
            for at in places:
                self._counts[at] = min(self._counts[at] + 1, MOST)
        for at in door:
            self._door[at] = 1
        self._sightings += 1
        if self._sightings == self._sample:
            self._age()

    def count(self, content: bytes) -> int:
        """Return how often a content was seen, up to 16; sightings before the last ageing count half."""
        door, places = _places(content)
        return all(self._door[at] for at in door) + min(self._counts[at] for at in places)

    def _age(self) -> None:
        self._sightings = 0
        self._door = bytearray(ROWS * WIDTH)
        self._counts = self._counts.translate(_HALVED)


def _places(content: bytes) -> tuple[list[int], list[int]]:
    """Return the places of a content in the doorkeeper and in the counts, one in each row."""
    digest = xxhash.xxh3_128_digest(content)
    return list(_row_places(digest[:8])), list(_row_places(digest[8:]))


def _row_places(digest: bytes) -> Iterator[int]:
    for row in range(ROWS):
        yield row * WIDTH + int.from_bytes(digest[2 * row : 2 * row + 2], "little")
