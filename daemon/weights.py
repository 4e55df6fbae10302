"""Weight files: what a folder's safetensors hold."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from .errors import CorruptModel, UnsupportedModel

_MAX_HEADER = 100 << 20
"""The limit of the safetensors format itself."""

_SLOW_TOKENIZERS = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json")
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Layout:
    """The safetensors of one folder: files in name order, dtypes of their tensors, how many numbers."""

    files: tuple[Path, ...]
    dtypes: frozenset[str]
    parameters: int


def read_layout(folder: Path) -> Layout:
    """Read every safetensors header and check that each file is exactly as long as its header says.

    Raises CorruptModel (damaged or cut off) or UnsupportedModel (no safetensors, or quantised weights).
    """
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise UnsupportedModel(f"{folder} has no .safetensors file; other weight files are not read")
    dtypes: set[str] = set()
    parameters = 0
    for file in files:
        found, count = _tensors(file)
        dtypes, parameters = dtypes | found, parameters + count
    if unknown := dtypes - set(_NAMES):
        raise UnsupportedModel(f"{folder}: weights stored as {', '.join(sorted(unknown))} are not supported")
    return Layout(files, frozenset(_NAMES[dtype] for dtype in dtypes), parameters)


def _tensors(file: Path) -> tuple[set[str], int]:
    """Their dtypes, and how many numbers they have."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CorruptModel(f"{file} is cut off or no safetensors file")
        try:
            header = json.loads(stream.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            end = max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
            dtypes = {str(entry["dtype"]) for entry in tensors}
            parameters = sum(math.prod(map(int, entry["shape"])) for entry in tensors)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise CorruptModel(f"{file}: the safetensors header is damaged ({error!r})") from error
    if 8 + length + end != size:
        raise CorruptModel(f"{file} has {size} bytes where its header says {8 + length + end}")
    return dtypes, parameters


def model_files(folder: Path) -> list[Path]:
    """A model folder's own files in name order, without weights in formats that are not read."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return [file for file in files if file.suffix not in (".bin", ".pt", ".pth", ".gguf", ".onnx")]


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that say which text is which token: tokenizer.json, or what stands for it."""
    if (whole := folder / "tokenizer.json").is_file():
        return [whole]
    return [file for file in model_files(folder) if file.name in _SLOW_TOKENIZERS]
