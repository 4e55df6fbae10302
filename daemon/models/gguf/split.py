"""GGUF files that gguf-split has cut into parts, NAME-00001-of-0000N.gguf: each a GGUF file of its own.

Only the first part has the metadata, and none has all tensors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from spilld.errors import CorruptModel, UnsupportedModel

from .header import GgufHeader, read_header

_MOST_PARTS = 4096


def parts_of(path: Path, header: GgufHeader) -> list[Path]:
    """Return the files of a model in order: `path` alone, or all parts if it is the first of several.

    Raises:
        UnsupportedModel: It is another part than the first, or was renamed.
    """
    count, number = header.values.get("split.count"), header.values.get("split.no")
    if not isinstance(count, int) or count < 2:
        return [path]
    first = f"-00001-of-{count:05}.gguf"
    if number != 0 or count > _MOST_PARTS or not path.name.endswith(first):
        raise UnsupportedModel(
            f"{path} is part {number} (from 0) of {count} of a split GGUF file: give its first part, "
            f"whose name ends with {first}, with the others beside it"
        )
    stem = path.name.removesuffix(first)
    return [path.with_name(f"{stem}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]


def read_whole(path: Path) -> GgufHeader:
    """Read the header of a file, or those of all parts if it is the first of several.

    Raises:
        CorruptModel: A file is damaged, no GGUF file, or missing.
        UnsupportedModel: As in `parts_of` and `read_header`.
    """
    header = read_header(path)
    parts = parts_of(path, header)
    tensors = dict(header.tensors)
    for number, part in enumerate(parts[1:], 1):
        if not part.is_file():
            raise CorruptModel(f"{path.name} has {len(parts)} parts, but {part} is missing")
        found = read_header(part)
        if (found.values.get("split.no"), found.values.get("split.count")) != (number, len(parts)):
            raise CorruptModel(f"{part} is another part than its name says")
        if twice := sorted(tensors.keys() & found.tensors.keys()):
            raise CorruptModel(f"{part}: tensor {twice[0]} is in another part too")
        tensors |= found.tensors
    said = header.values.get("split.tensors.count", len(tensors))
    if len(parts) > 1 and said != len(tensors):
        raise CorruptModel(f"{path.name} says {said} tensors, its parts have {len(tensors)}")
    return replace(header, tensors=tensors)
