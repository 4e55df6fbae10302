"""The header of a GGUF file: enough to refuse what transformers would load wrongly.

gguf's own reader takes 11 s. Layout: github.com/ggml-org/ggml docs/gguf.md, versions 2 and 3, little endian.
Whatever a header claims, reading it takes seconds and little memory: counts and lengths are bounded before
they are used.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from spilld.errors import CorruptModel, UnsupportedModel

MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {
    kind: struct.Struct(f"<{code}")
    for kind, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

_MOST_VALUES = 1 << 16
_MOST_TENSORS = 1 << 16
_MOST_STRINGS = 1 << 22
"""Of all arrays together: a vocabulary and its merges."""

_LONGEST_STRING = 1 << 24
_LONGEST_ARRAY = 1 << 12
"""Of numbers, to be kept: one for each layer."""

_MOST_DIMENSIONS = 4

Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...] | None


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: `nbytes` bytes at `start` of the file `path`.

    `kind` is the name of its GGML type, and `shape` is as torch has it, the longest stride first.
    """

    kind: str
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    `values` has the scalar and string keys and short arrays of numbers; other arrays are None there (only
    their presence is known). `tensors` is by name.
    """

    values: dict[str, Value]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """The family, as llama.cpp calls it."""
        return str(self.values["general.architecture"])

    def model_keys(self) -> list[str]:
        """Return the keys under the architecture's own prefix, without it."""
        prefix = f"{self.architecture}."
        return [key.removeprefix(prefix) for key in self.values if key.startswith(prefix)]

    def of_model(self, key: str) -> Value:
        """Return the value of a key under the architecture's own prefix, or None."""
        return self.values.get(f"{self.architecture}.{key}")


def read_header(path: Path) -> GgufHeader:
    """Read the header of one file, and check that every tensor lies within it and on no other one.

    A part of a file that was split has a header too: split.py joins them.

    Raises:
        CorruptModel: The file is no GGUF file, damaged or truncated.
        UnsupportedModel: Its version or a tensor's type is unknown.
    """
    size = path.stat().st_size
    if size < 24:
        raise CorruptModel(f"{path} is no GGUF file: it has only {size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != MAGIC:
            raise CorruptModel(f"{path} is no GGUF file: it starts with {data[:4]!r}, not {MAGIC!r}")
        try:
            return _Cursor(data, path).header()
        except (struct.error, IndexError, UnicodeDecodeError, OverflowError, KeyError) as error:
            raise CorruptModel(f"{path}: the GGUF header is damaged or cut off ({error!r})") from error


class _Cursor:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = 4
        self._strings = 0

    def header(self) -> GgufHeader:
        version, tensor_count, value_count = self._number(_U32), self._number(_U64), self._number(_U64)
        if version not in (2, 3):
            raise UnsupportedModel(f"{self._path} is GGUF version {version}; 2 and 3 are supported")
        _bounded("values", value_count, _MOST_VALUES)
        _bounded("tensors", tensor_count, _MOST_TENSORS)
        values: dict[str, Value] = {}
        for _ in range(value_count):
            if (key := self._string()) in values:
                raise IndexError(f"{key} twice")
            values[key] = self._value(self._number(_U32))
        if "general.architecture" not in values and not values.get("split.no"):
            raise CorruptModel(f"{self._path}: the GGUF header names no general.architecture")
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise IndexError(f"an alignment of {alignment}")
        found: dict[str, GgufTensor] = {}
        for _ in range(tensor_count):
            name, tensor = self._tensor()
            if name in found:
                raise IndexError(f"tensor {name} twice")
            found[name] = tensor
        base = -(-self._at // alignment) * alignment
        tensors = {name: replace(tensor, start=base + tensor.start) for name, tensor in found.items()}
        self._check_places(tensors, alignment)
        return GgufHeader(values, tensors)

    def _check_places(self, tensors: dict[str, GgufTensor], alignment: int) -> None:
        last, reached = "", 0
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if tensor.start % alignment:
                raise IndexError(f"tensor {name} at byte {tensor.start}, with an alignment of {alignment}")
            if tensor.start < reached:
                raise IndexError(f"tensor {name} lies on {last}")
            last, reached = name, tensor.start + tensor.nbytes
        if reached > len(self._data):
            raise CorruptModel(
                f"{self._path} is cut off: tensor {last} ends at byte {reached}, "
                f"the file at {len(self._data)}"
            )

    def _number(self, code: struct.Struct) -> int:
        value: int = code.unpack_from(self._data, self._at)[0]
        self._at += code.size
        return value

    def _string(self) -> str:
        length = _bounded("bytes of a string", self._number(_U64), _LONGEST_STRING)
        text = self._data[self._at : self._at + length]
        if len(text) != length:
            raise IndexError(f"a string of {length} bytes at {self._at}")
        self._at += length
        return text.decode("utf-8")

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(_SCALARS[kind])
        of, count = self._number(_U32), self._number(_U64)
        if of == _STRING:
            self._strings = _bounded("strings", self._strings + count, _MOST_STRINGS)
            for _ in range(count):
                self._at += 8 + _U64.unpack_from(self._data, self._at)[0]
            return None
        code = _SCALARS[of]
        if count * code.size > len(self._data) - self._at:
            raise IndexError(f"an array of {count} numbers at {self._at}")
        if count > _LONGEST_ARRAY:
            self._at += count * code.size
            return None
        return tuple(self._number(code) for _ in range(count))

    def _tensor(self) -> tuple[str, GgufTensor]:
        """Return name and tensor, its start relative to the data section."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._string()
        dimensions = _bounded("dimensions", self._number(_U32), _MOST_DIMENSIONS)
        shape = tuple(self._number(_U64) for _ in range(dimensions))[::-1]
        kind, offset = self._number(_U32), self._number(_U64)
        try:
            typed = GGMLQuantizationType(kind)
        except ValueError:
            raise UnsupportedModel(f"{self._path}: tensor {name} has the unknown GGML type {kind}") from None
        per_block, block_bytes = GGML_QUANT_SIZES[typed]
        if not shape or 0 in shape or shape[-1] % per_block:
            raise IndexError(f"tensor {name} of {shape} in blocks of {per_block}")
        return name, GgufTensor(
            typed.name, shape, self._path, offset, math.prod(shape) // per_block * block_bytes
        )


def _bounded(what: str, count: int, most: int) -> int:
    if count > most:
        raise IndexError(f"{count} {what} where {most} are the most")
    return count
