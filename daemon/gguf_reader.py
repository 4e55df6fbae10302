"""gguf's reader of GGUF files, for a process that reads one file several times.

transformers parses a file for its configuration, again for its weights, and again for its tokenizer, and maps
names anew for each module: with 262,144 words in the vocabulary most of a conversion's time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import gguf
import numpy as np
import numpy.typing as npt


class Reader(gguf.GGUFReader):  # type: ignore[misc]
    """Gives slices of the file that are plain arrays: hundreds of thousands of memmaps take long to make."""

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        return self._data

    @data.setter
    def data(self, mapped: npt.NDArray[np.uint8]) -> None:
        self._data = np.asarray(mapped)


@contextmanager
def parsed_once() -> Iterator[None]:
    """A scope in which this process parses each file once, whoever reads it. It must not change meanwhile."""
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = functools.cache(Reader), functools.cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map
