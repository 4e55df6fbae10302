"""Tensors that say they are on a GPU, for a torch that has none.

Each holds a tensor of the CPU, on which its operations run, and refuses what a GPU's refuses: to meet one of
the CPU in an operation other than a copy, unless that is a single number, and to be read by numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten.to.device, torch.ops.aten.to.dtype_layout)

Arguments = Sequence[Any]
Named = Mapping[str, Any]


class Elsewhere(torch.Tensor):
    """torch takes it for one on "meta", whose device needs no driver."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("meta"),
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: copy it to host memory first")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Arguments, args: Arguments = (), kwargs: Named | None = None
    ) -> Any:
        given = tree_leaves((args, kwargs))
        if func not in _COPIES and any(_is_here(x) and x.dim() for x in given):
            raise RuntimeError(f"{func}: all tensors are to be on one device; found some on the CPU")
        found = func(*tree_map(_held, tuple(args)), **tree_map(_held, dict(kwargs or {})))
        if func._schema.name.endswith("_"):  # in place
            return args[0]
        return found if CPU in given else tree_map(_wrapped, found)


class Gpu(TorchFunctionMode):
    """As long as it is entered, what a call that names the GPU makes is there."""

    def __enter__(self) -> Any:
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # else a parameter stays a plain one
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Arguments, args: Arguments = (), kwargs: Named | None = None
    ) -> Any:
        if func is torch._C._nn._parse_to:  # of Module.to: a torch without CUDA would refuse to
            return GPU, None, False, None
        if not any(_names_gpu(x) for x in tree_leaves((args, kwargs))):
            return func(*args, **(kwargs or {}))
        return tree_map(_wrapped, func(*tree_map(_held, tuple(args)), **tree_map(_held, dict(kwargs or {}))))


def _names_gpu(x: object) -> bool:
    return (isinstance(x, torch.device) and x.type == "cuda") or (isinstance(x, str) and x.startswith("cuda"))


def _is_here(x: object) -> bool:
    return isinstance(x, torch.Tensor) and not isinstance(x, Elsewhere)


def _held(x: Any) -> Any:
    if isinstance(x, Elsewhere):
        return x.held
    return CPU if _names_gpu(x) or (isinstance(x, torch.device) and x.type == "meta") else x


def _wrapped(x: Any) -> Any:
    return Elsewhere(x) if _is_here(x) else x
