"""Makes a model's skeleton, its modules with tensors without values, without importing sympy.

transformers makes it on torch's meta device. Where that has no kernel, torch runs decompositions in Python,
which import sympy and symbolic shapes for a few calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_META = torch.device("meta")


class SkeletonMode(TorchFunctionMode):
    """Replaces calls on the meta device that would run a decomposition."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else kwargs["tensor"]
            return tensor if tensor.is_meta else func(*args, **kwargs)
        if func is torch.cat:  # of a constant and of what has no values
            parts = args[0]
            args = (
                [part.to(_META) for part in parts] if any(part.is_meta for part in parts) else parts,
                *args[1:],
            )
        if _is_constant(func, args) and kwargs.get("device") == _META:
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def _is_constant(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call makes what buffers such as RoPE frequencies are computed from.

    transformers makes these again, on the model's device, once the weights are there. `torch.tensor([])` is
    how it asks which device is the default: its result must be there.
    """
    return func is torch.arange or (func is torch.tensor and args[:1] != ([],))
