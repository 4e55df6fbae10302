"""A quantised folder as a source of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from spilld.errors import CorruptModel
from spilld.offload.kernels.linear.packed import Packed

from .bitsandbytes import bitsandbytes
from .compressed import compressed
from .config import Scheme
from .fp4 import mxfp4, packed_fp4
from .fp8 import fp8
from .integers import awq, gptq
from .tensors import StoredTensors, StoredWeight

Reader = Callable[[StoredTensors, str, Scheme], StoredWeight | None]


def _modelopt(tensors: StoredTensors, stored: str, scheme: Scheme) -> StoredWeight | None:
    return packed_fp4(tensors, stored, scheme) or fp8(tensors, stored, scheme)


_READERS: dict[str, Reader] = {
    "fp8": fp8,
    "awq": awq,
    "gptq": gptq,
    "compressed-tensors": compressed,
    "mxfp4": mxfp4,
    "modelopt": _modelopt,
    "bitsandbytes": bitsandbytes,
}

_OF_ACTIVATIONS = (
    *(".input_scale", ".input_global_scale", ".input_zero_point", ".activation_scale", ".output_scale"),
    *(".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".output_zero_point"),
)
"""Ends of names of tensors that say how to round activations or KV, which are not rounded so."""

_PLAIN = ("F32", "BF16", "F16")


class QuantisedFolder:
    """The weights of a quantised folder, by the names that a folder in bfloat16 has: a WeightSource.

    Modules that were not converted stay as they are stored, whatever the folder's lists say of them.
    """

    def __init__(self, files: Iterable[Path], scheme: Scheme) -> None:
        """Read the headers of safetensors files.

        Raises:
            CorruptModel: A tensor cannot be what the scheme says, or belongs to none.
        """
        self._tensors = StoredTensors(files)
        read = _READERS[scheme.method]
        found = [weight for name in self._tensors if (weight := read(self._tensors, name, scheme))]
        self._weights = {weight.name: weight for weight in found}
        used = frozenset[str]().union(*(weight.parts for weight in found))
        self._plain = {n for n in self._tensors if n not in used and not n.endswith(_OF_ACTIVATIONS)}
        if both := self._plain & set(self._weights):
            raise CorruptModel(f"{min(both)} is there both quantised and not")
        for name in sorted(self._plain):
            if (dtype := self._tensors.dtype(name)) not in _PLAIN:
                raise CorruptModel(f"{name} is stored as {dtype}, which {scheme.method} does not explain")

    @property
    def names(self) -> frozenset[str]:
        """See WeightSource.names."""
        return frozenset(self._weights) | self._plain

    def shape(self, name: str) -> tuple[int, ...]:
        """See WeightSource.shape."""
        return self._weights[name].shape if name in self._weights else self._tensors.shape(name)

    def dense(self, name: str) -> torch.Tensor:
        """See WeightSource.dense."""
        if name not in self._weights:
            return self._tensors.read(name)
        return torch.from_numpy(self._weights[name].decode().dense())

    def packed(self, name: str) -> Sequence[Packed] | None:
        """See WeightSource.packed."""
        if name not in self._weights:
            return None
        return self._weights[name].decode().packed()
