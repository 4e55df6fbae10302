"""gguf's reader of GGUF files, made fast for a process that reads one file several times.

transformers parses a file for its configuration, again for its weights, and again for its tokenizer, and maps
names again for each module: with 262,144 words in the vocabulary that is most of a conversion's time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from transformers import modeling_gguf_pytorch_utils

REPORT_S = 3.0
"""Seconds between two reports of how far reading is."""


class SlicedGGUFReader(gguf.GGUFReader):  # type: ignore[misc]
    """Slices the file into plain arrays: making hundreds of thousands of memmaps takes long."""

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """The file's bytes."""
        return self._data

    @data.setter
    def data(self, mapped: npt.NDArray[np.uint8]) -> None:
        """The file's bytes."""
        self._data = np.asarray(mapped)


@contextmanager
def parsed_once() -> Iterator[None]:
    """Make this process parse each GGUF file once in this context. The files must not change meanwhile."""
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = functools.cache(SlicedGGUFReader), functools.cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


@contextmanager
def counted(report: Callable[[str], None]) -> Iterator[None]:
    """Report how far transformers' reading of a GGUF file is in this context, in place of its bar."""
    bar = modeling_gguf_pytorch_utils.tqdm

    def count(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        nbytes, read, began = sum(int(tensor.n_bytes) for tensor in tensors), 0, time.monotonic()
        reported = began
        for number, tensor in enumerate(tensors):
            if read and (now := time.monotonic()) - reported >= REPORT_S:
                reported, left = now, (now - began) / read * (nbytes - read)
                report(
                    f"read {number} of {len(tensors)} tensors, {read >> 20} of {nbytes >> 20} MiB; about "
                    f"{left:.0f} s left"
                )
            yield tensor
            read += int(tensor.n_bytes)

    modeling_gguf_pytorch_utils.tqdm = count
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar
