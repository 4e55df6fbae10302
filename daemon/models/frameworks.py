"""Imports torch and transformers for serving, without what only training, compiling and clusters use.

`import transformers` reads all of its models' sources, and its model base class imports torch's compiler,
torch's tensors of clusters, and sympy, which together is much of the time that a start takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from .deferred_import import defer, restore


def import_frameworks() -> None:
    """Import torch and transformers' model base class. Deferred parts run when they are first used.

    Raises:
        ModuleNotFoundError: torch or transformers is not installed.
    """
    import torch

    if "transformers" in sys.modules:
        return
    if compiler := "torch._dynamo" not in sys.modules:
        defer("torch._dynamo", disable=_mark, assume_constant_result=_mark, allow_in_graph=_mark)
    defer("transformers", __version__=version("transformers"))
    defer("transformers.models")
    with _set(torch.distributed, "is_available", lambda: False):
        from transformers import utils

        utils.import_utils.is_torch_distributed_available()  # it keeps its first answer
        with _set(utils, "direct_transformers_import", lambda *_: sys.modules["transformers"]):
            import transformers.modeling_layers
            import transformers.modeling_utils  # noqa: F401
    if compiler:
        restore("torch._dynamo")


def _mark(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Any:
    """Stand in for torch._dynamo's decorators, which only mark functions for the compiler."""
    return function or (lambda decorated: decorated)


@contextmanager
def _set(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
