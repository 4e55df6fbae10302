"""Puts packed layers in the place of a module's own, whatever its family: the module computes the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import Linear, Module

from spilld.errors import UnsupportedModel
from spilld.offload.kernels.linear.forms import Form
from spilld.offload.kernels.linear.packed import Packed, fits, quantise
from spilld.offload.kernels.linear.row_operations import Inputs

from .packed_experts import PAIRS, PackedExperts, weight_names
from .packed_linear import ROWS, PackedLinear

log = logging.getLogger(__name__)

REPLACING = 1
"""Part of the fingerprint: raise it when the same weights are packed otherwise."""


def pack_layers(module: Module, form: Form) -> None:
    """Pack the linear layers and experts of a module, one after another.

    Those whose sizes do not fit keep their weights, as does whatever else has weights: embeddings, routers,
    convolutions.

    Args:
        module: The module, on the CPU.
        form: int8 or int4; the head is int8 in any case.

    Raises:
        UnsupportedModel: Weights are beyond float16.
    """
    before = sum(parameter.numel() for parameter in module.parameters())
    found = list(replaceable(module))
    widths = [layer.in_features for _, _, layer in found if isinstance(layer, Linear)]
    workspace = Inputs.of(ROWS, max(widths, default=0))
    for parent, name, layer in found:
        its = Form.INT8 if name == "lm_head" else form
        if isinstance(layer, Linear):
            weights, dtype = [_quantised(name, layer.weight, its)], layer.weight.dtype
            new: Module = PackedLinear(weights, layer.out_features, layer.bias, dtype, workspace)
        else:
            into, out_of = ([_quantised(name, part, its) for part in of_experts(layer, n)] for n in (0, 1))
            new = PackedExperts(layer, into, out_of)
        setattr(parent, name, new)
    left = sum(parameter.numel() for parameter in module.parameters())
    log.info("%s of %s parameters are packed as %s", before - left, before, form)


def replaceable(module: Module) -> Iterator[tuple[Module, str, Any]]:
    """Yield each linear layer, and each layer's experts, that can be packed: its parent, its name, itself."""
    for parent in list(module.modules()):
        if isinstance(parent, PackedExperts):
            continue
        for name, child in parent.named_children():
            if all(fits(*matrix.shape) for matrix in _matrices(child)) and _matrices(child):
                yield parent, name, child


def _matrices(layer: Any) -> list[torch.Tensor]:
    """Return a matrix of each shape that a layer multiplies by; none if it is of another kind."""
    if type(layer) is Linear:
        return [layer.weight]
    if not hasattr(layer, "_is_expert_parallel") or layer.has_post_expert_norm:
        return []
    return [of_experts(layer, which)[0] for which in (0, 1)]


def of_experts(experts: Any, which: int) -> list[torch.Tensor]:
    """Return the matrices [outputs, inputs] of each expert: what they do first (0), or last (1)."""
    weights = getattr(experts, weight_names(experts)[which])
    return list(weights.mT if experts.is_transposed else weights)


def _quantised(name: str, weight: torch.Tensor, form: Form) -> Packed:
    try:
        return quantise(np.ascontiguousarray(weight.detach().float().numpy()), form)
    except ValueError as error:
        raise UnsupportedModel(f"{name}: {error}") from error


def packed_forms(module: Module) -> set[Form]:
    """Return the forms of a module's packed layers."""
    return {weights.form for layer in module.modules() for weights in _weights(layer)}


def packed_bytes(module: Module, rows: int) -> int:
    """Return the bytes that packed layers of a module take for so many rows, beyond those of bfloat16."""
    wide, experts = 0, 0
    for layer in module.modules():
        if isinstance(layer, PackedLinear):
            wide = max(
                wide, ROWS * 11 * layer.in_features + 4 * rows * (layer.in_features + layer.out_features)
            )
        elif isinstance(layer, PackedExperts):
            sizes = [
                size for part in (layer.into[0], layer.out_of[0]) for size in (part.inputs, part.outputs)
            ]
            experts = max(experts, 2 * PAIRS * (11 * max(sizes[::2]) + 8 * max(sizes)))
    return wide + experts


def _weights(layer: Module) -> tuple[Packed, ...]:
    if isinstance(layer, PackedLinear):
        return layer.packed
    return (*layer.into, *layer.out_of) if isinstance(layer, PackedExperts) else ()
