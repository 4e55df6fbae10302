"""The header of a GGUF file: enough to refuse what transformers would load wrongly, without its 11 s reader.

Layout: github.com/ggml-org/ggml docs/gguf.md, versions 2 and 3, little endian.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from .errors import CorruptModel, UnsupportedModel

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

Value = int | float | bool | str | None


@dataclass(frozen=True)
class GgufHeader:
    """`values` has the scalar and string keys; arrays are None there (only their presence is known)."""

    values: dict[str, Value]
    tensors: tuple[str, ...]

    @property
    def architecture(self) -> str:
        return str(self.values["general.architecture"])

    def of_model(self, key: str) -> Value:
        """The value under the architecture's own prefix, or None."""
        return self.values.get(f"{self.architecture}.{key}")


def read_header(path: Path) -> GgufHeader:
    """Read and check the header and that every tensor lies inside the file.

    Raises CorruptModel (no GGUF, damaged or truncated) or UnsupportedModel (version or tensor type).
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

    def header(self) -> GgufHeader:
        version, tensor_count, value_count = self._number(_U32), self._number(_U64), self._number(_U64)
        if version not in (2, 3):
            raise UnsupportedModel(f"{self._path} is GGUF version {version}; 2 and 3 are supported")
        values: dict[str, Value] = {}
        for _ in range(value_count):
            key = self._string()
            values[key] = self._value(self._number(_U32))
        if "general.architecture" not in values:
            raise CorruptModel(f"{self._path}: the GGUF header names no general.architecture")
        tensors = [self._tensor() for _ in range(tensor_count)]
        alignment = int(values.get("general.alignment") or 32)
        start = -(-self._at // alignment) * alignment
        for name, end in tensors:
            if start + end > len(self._data):
                raise CorruptModel(
                    f"{self._path} is cut off: tensor {name} ends at byte {start + end}, "
                    f"the file at {len(self._data)}"
                )
        return GgufHeader(values, tuple(name for name, _ in tensors))

    def _number(self, code: struct.Struct) -> int:
        value: int = code.unpack_from(self._data, self._at)[0]
        self._at += code.size
        return value

    def _string(self) -> str:
        length = self._number(_U64)
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
            for _ in range(count):
                self._at += 8 + _U64.unpack_from(self._data, self._at)[0]
        else:
            self._at += count * _SCALARS[of].size
        return None

    def _tensor(self) -> tuple[str, int]:
        """(name, end relative to the start of the data section)"""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._string()
        elements = 1
        for _ in range(self._number(_U32)):
            elements *= self._number(_U64)
        kind, offset = self._number(_U32), self._number(_U64)
        if kind not in set(GGMLQuantizationType):
            raise UnsupportedModel(f"{self._path}: tensor {name} has the unknown GGML type {kind}")
        per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return name, offset + elements // per_block * block_bytes
