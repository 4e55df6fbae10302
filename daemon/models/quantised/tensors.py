"""Tensors of a quantised folder as they are stored, and what a method makes of some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from spilld.errors import CorruptModel
from spilld.offload.kernels.linear.packed import Packed

Floats = NDArray[np.float32]


class StoredTensors:
    """Tensors of safetensors files, by name. Nothing is read before it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Open the files, whose headers have been checked.

        Raises:
            CorruptModel: A tensor is in two files.
        """
        self._where: dict[str, Any] = {}
        for file in files:
            try:
                opened: Any = safe_open(file, "pt")
            except SafetensorError as error:
                raise CorruptModel(f"{file} is damaged: {error}") from error
            for name in opened.keys():  # noqa: SIM118 (no iterator)
                if name in self._where:
                    raise CorruptModel(f"{file} has {name}, which another file has, too")
                self._where[name] = opened

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape as it is stored, from the header."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as safetensors names it, such as "F8_E4M3"."""
        return str(self._where[name].get_slice(name).get_dtype())

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor.

        Raises:
            CorruptModel: It is missing or damaged.
        """
        if name not in self._where:
            raise CorruptModel(f"the tensor {name} is missing")
        try:
            tensor: torch.Tensor = self._where[name].get_tensor(name)
        except SafetensorError as error:
            raise CorruptModel(f"{name} is damaged: {error}") from error
        return tensor

    def floats(self, name: str) -> Floats:
        """Read a tensor as float32.

        Raises:
            CorruptModel: It is missing or damaged.
        """
        found: Floats = self.read(name).to(torch.float32).numpy()
        return found

    def integers(self, name: str, dtypes: tuple[str, ...]) -> NDArray[Any]:
        """Read a tensor of integers.

        Raises:
            CorruptModel: It is missing, damaged, or of none of these dtypes.
        """
        found = self.read(name)
        if self.dtype(name) not in dtypes:
            raise CorruptModel(f"{name} is stored as {self.dtype(name)} and not as {' or '.join(dtypes)}")
        return found.numpy()


class Decoded(Protocol):
    """A quantised weight with what is needed to compute it."""

    def dense(self) -> Floats:
        """Return the weight as the module has it."""
        ...

    def packed(self) -> list[Packed] | None:
        """Return it packed, [outputs, inputs]; of experts one after another. None: it has no packed form."""
        ...


@dataclass(frozen=True)
class StoredWeight:
    """A quantised weight of the module.

    Attributes:
        name: What the module calls it.
        shape: Its shape there.
        parts: The tensors that it is stored in.
        decode: Reads these. Raises CorruptModel.
    """

    name: str
    shape: tuple[int, ...]
    parts: frozenset[str]
    decode: Callable[[], Decoded]


def check(holds: bool, name: str, said: str) -> None:
    """Check something that a weight's tensors must agree in.

    Raises:
        CorruptModel: It does not hold.
    """
    if not holds:
        raise CorruptModel(f"{name}: {said}")
