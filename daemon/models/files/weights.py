"""The weight files of a model folder: what its safetensors hold."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spilld.errors import CorruptModel, UnsupportedModel
from spilld.models.quantised.config import INSTEAD, read_scheme

from .folder import read_config

_MAX_HEADER = 100 << 20
"""The limit of the safetensors format itself."""

_SLOW_TOKENIZERS = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json")
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors of one folder: files in name order, bytes by dtype, number of parameters."""

    files: tuple[Path, ...]
    nbytes: Mapping[str, int]
    parameters: int

    def share(self, dtype: str) -> float:
        """Return the share of tensors in this dtype among all bytes, from 0 to 1."""
        return self.nbytes.get(dtype, 0) / max(1, sum(self.nbytes.values()))


def read_weight_files(folder: Path) -> WeightFiles:
    """Read every safetensors header and check that each file is exactly as long as its header says.

    Raises:
        CorruptModel: A file is damaged, cut off or missing, or the index names one outside the folder.
        UnsupportedModel: There are no safetensors, or their dtypes are not read and nothing explains them.
    """
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise UnsupportedModel(f"{folder} has no .safetensors file{_what_it_has(folder)}")
    used_files(folder)
    nbytes: Counter[str] = Counter()
    parameters = 0
    for file in files:
        for dtype, size, count in _tensors(file):
            nbytes[dtype] += size
            parameters += count
    unknown = set(nbytes) - set(_NAMES)
    if unknown and read_scheme(folder, read_config(folder)) is None:
        raise UnsupportedModel(
            f"{folder}: weights stored as {', '.join(sorted(unknown))} are not read; {INSTEAD}"
        )
    return WeightFiles(files, {_NAMES.get(dtype, dtype): n for dtype, n in nbytes.items()}, parameters)


def used_files(folder: Path) -> list[Path]:
    """Return the safetensors that the model is read from: those of the index, if there is one.

    Raises:
        CorruptModel: The index is damaged, or names what is no file of this folder.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [file for file in files if file.name == "model.safetensors"] or files
    if index.stat().st_size > _MAX_HEADER:
        raise CorruptModel(f"{index} has {index.stat().st_size} bytes, which no index needs")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        unknown = sorted(map(str, names - {file.name for file in files}))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptModel(f"{index} is damaged: {error!r}") from error
    if unknown:
        raise CorruptModel(f"{index} names {unknown[0]!r}, which is no safetensors file of this folder")
    return [file for file in files if file.name in names]


def _what_it_has(folder: Path) -> str:
    pickles = sorted(
        file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickles:
        return (
            f": {pickles[0]} is a pickle, which may run any code, and is not read; look for the model in "
            "safetensors, or save it so (save_pretrained of transformers)"
        )
    if ggufs := sorted(folder.glob("*.gguf")):
        return f": give the file, --model {ggufs[0]}"
    return ""


def _tensors(file: Path) -> list[tuple[str, int, int]]:
    """Return dtype, bytes and number of elements of each tensor in a file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CorruptModel(f"{file} is cut off or no safetensors file")
        try:
            header = json.loads(stream.read(length))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            end = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
            tensors = [_tensor(entry) for entry in entries]
        except (
            *(ValueError, TypeError, KeyError, IndexError, AttributeError),
            *(RecursionError, OverflowError),
        ) as error:
            raise CorruptModel(f"{file}: the safetensors header is damaged ({error!r})") from error
    if 8 + length + end != size:
        raise CorruptModel(f"{file} has {size} bytes where its header says {8 + length + end}")
    return tensors


def _tensor(entry: Mapping[str, Any]) -> tuple[str, int, int]:
    start, end = map(int, entry["data_offsets"])
    return str(entry["dtype"]), end - start, math.prod(map(int, entry["shape"]))


def model_files(folder: Path) -> list[Path]:
    """Return a model folder's own files in name order, without weights in formats that are not read."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return [file for file in files if file.suffix not in (".bin", ".pt", ".pth", ".gguf", ".onnx")]


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files that define the tokenizer: tokenizer.json, or what replaces it."""
    if (whole := folder / "tokenizer.json").is_file():
        return [whole]
    return [file for file in model_files(folder) if file.name in _SLOW_TOKENIZERS]
