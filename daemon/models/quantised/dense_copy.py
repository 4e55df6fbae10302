"""A quantised folder written as one of plain weights, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from .folder import QuantisedFolder

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_dense(source: QuantisedFolder, dtype: torch.dtype, target: Path) -> None:
    """Write all tensors of a folder to one safetensors file.

    Args:
        source: The folder. Its tensors are dequantised in float32 and rounded once.
        dtype: Of what is written, float32 or bfloat16.
        target: The file.

    Raises:
        CorruptModel: A tensor is damaged; the file is then incomplete.
    """
    names = sorted(source.names)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + math.prod(source.shape(name)) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(source.shape(name)),
            "data_offsets": [start, end],
        }
    said = json.dumps(header).encode()
    said += b" " * (-len(said) % 8)
    with target.open("wb") as file:
        file.write(len(said).to_bytes(8, "little") + said)
        for name in names:
            tensor = source.dense(name).to(dtype).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
