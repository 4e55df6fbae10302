"""The tensors of a GGUF file, mapped, by the names of transformers' module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from spilld.errors import CorruptModel, UnsupportedModel
from spilld.offload.kernels.linear.forms import GGUF_FORMS
from spilld.offload.kernels.linear.packed import Packed
from spilld.offload.kernels.linear.repack import from_gguf

from .header import GgufHeader, GgufTensor
from .names import Recipe, recipes

_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""Types that are not quantised; numpy has no bfloat16."""


class GgufWeights:
    """A WeightSource: tensors are dequantised, or repacked, when they are asked for."""

    def __init__(self, header: GgufHeader, name: str) -> None:
        """Map the files of a header; `name` is what errors call them.

        Raises:
            UnsupportedModel: A tensor of the file has no place in the module.
            CorruptModel: Tensors that make one parameter do not fit together.
        """
        self._tensors = header.tensors
        self._name = name
        self._recipes = recipes(header, name)
        self._shapes = {parameter: self._shape(recipe) for parameter, recipe in self._recipes.items()}
        paths = {tensor.path for tensor in header.tensors.values()}
        self._files: Mapping[Path, NDArray[np.uint8]] = {
            path: np.asarray(np.memmap(path, np.uint8, "c")) for path in paths
        }

    @property
    def names(self) -> frozenset[str]:
        """See WeightSource.names."""
        return frozenset(self._recipes)

    def shape(self, name: str) -> tuple[int, ...]:
        """See WeightSource.shape."""
        return self._shapes[name]

    def dense(self, name: str) -> torch.Tensor:
        """See WeightSource.dense."""
        recipe = self._recipes[name]
        parts = [self.tensor(part) for part in recipe.parts]
        whole = parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts], dim=-2)
        if recipe.heads:
            whole = whole[torch.from_numpy(_row_order(len(whole), recipe.heads))]
        if recipe.plus_one:
            whole = whole.float() - 1
        return whole.reshape(self._shapes[name])

    def is_quantised(self, name: str) -> bool:
        """Whether a tensor, or a part of it, is quantised."""
        return any(self._tensors[part].kind not in _PLAIN for part in self._recipes[name].parts)

    def packed(self, name: str) -> Sequence[Packed] | None:
        """See WeightSource.packed."""
        recipe, shape = self._recipes[name], self._shapes[name]
        parts = [self._tensors[part] for part in recipe.parts]
        if len(shape) < 2 or recipe.plus_one or any(part.kind not in GGUF_FORMS for part in parts):
            return None
        rows = [self._raw(part).reshape(*_experts(part), part.shape[-2], -1) for part in parts]
        found = []
        for expert in range(len(rows[0])):
            kinds = {part.kind for part in parts}
            matrices = [matrix[expert] for matrix in rows]
            if len(kinds) == 1:
                matrices = [np.concatenate(matrices) if len(matrices) > 1 else matrices[0]]
            for part, raw in zip(parts, matrices, strict=False):
                if recipe.heads:
                    raw = raw[_row_order(len(raw), recipe.heads)]
                found.append(from_gguf(raw, part.kind))
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor by its name in the file: mapped where it is not quantised, else in float32."""
        tensor = self._tensors[name]
        raw = self._raw(tensor)
        if (plain := _PLAIN.get(tensor.kind)) is not None:
            found = torch.from_numpy(raw.view(plain)).reshape(tensor.shape)
            return found.view(torch.bfloat16) if tensor.kind == "BF16" else found
        kind = gguf.GGMLQuantizationType[tensor.kind]
        try:
            numbers: Any = gguf.dequantize(raw.reshape(*tensor.shape[:-1], -1), kind)
        except NotImplementedError as error:
            raise UnsupportedModel(f"{self._name}: tensors of type {tensor.kind} cannot be read") from error
        return torch.from_numpy(numbers.reshape(tensor.shape))

    def _raw(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        return self._files[tensor.path][tensor.start : tensor.start + tensor.nbytes]

    def _shape(self, recipe: Recipe) -> tuple[int, ...]:
        first, *others = (self._tensors[part].shape for part in recipe.parts)
        if recipe.row:
            return (1, first[-1])
        if recipe.heads and first[0] % (2 * recipe.heads):
            raise CorruptModel(f"{self._name}: {recipe.parts[0]} has {first[0]} rows of {recipe.heads} heads")
        for other in others:
            if len(first) != 3 or other != first:
                raise CorruptModel(f"{self._name}: {recipe.parts[0]} is {first}, beside it is {other}")
        return first if not others else (first[0], first[1] * len(recipe.parts), first[2])


def rope_factors(values: dict[str, Any], weights: GgufWeights) -> dict[str, Any]:
    """Return values of a config with the factors of RoPE that are tensors put in.

    Args:
        values: As config_values returns them.
        weights: The tensors.

    Raises:
        CorruptModel: The factors are not as many as there are frequencies, or no factors.
    """
    rope: dict[str, Any] = values["rope_parameters"]
    if rope.get("rope_type") != "longrope":
        return values
    frequencies = int(values["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
    found = {}
    for key in ("short_factor", "long_factor"):
        factors = weights.tensor(rope[key]).float().flatten().tolist()
        if len(factors) != frequencies or not all(0 < factor < 1e9 for factor in factors):
            raise CorruptModel(f"{rope[key]} has no factors for {frequencies} frequencies")
        found[key] = factors
    return values | {"rope_parameters": rope | found}


def _experts(tensor: GgufTensor) -> tuple[int]:
    return (tensor.shape[0] if len(tensor.shape) == 3 else 1,)


def _row_order(rows: int, heads: int) -> NDArray[np.int64]:
    """Return which row of the file each row of the module is: llama.cpp interleaves the halves of heads."""
    order = np.arange(rows).reshape(heads, rows // heads // 2, 2)
    return np.ascontiguousarray(order.swapaxes(1, 2)).reshape(rows)
