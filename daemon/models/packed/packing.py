"""Packed weights of a model for its steps, made once and then mapped.

A quantised file's own codes are kept (what WeightSource.packed returns): nothing is rounded twice. What it
stores in other ways becomes int8. Matrices that read the same input are stacked: `layers.N.qkv`,
`layers.N.out`, `layers.N.gate_up`, `layers.N.down`, and `head`, which is int8 also beside int4. Where their
forms differ they stay apart: `layers.N.qkv.0`, `layers.N.qkv.1`, ...
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file

from spilld.errors import ConfigError, CorruptModel, UnsupportedModel
from spilld.models.files.digest import digest
from spilld.models.files.weights import read_weight_files
from spilld.offload.kernels.linear.forms import GROUP, LANES, Form
from spilld.offload.kernels.linear.packed import (
    Packed,
    fits,
    quantise,
    stack,
    unpack,
)

from .packable import check_packable

if TYPE_CHECKING:  # a daemon imports no gguf
    from spilld.models.gguf.weights import GgufWeights

log = logging.getLogger(__name__)

WEIGHTS = Path("packed") / "weights.safetensors"
"""The file of packed weights in a folder that was made from a GGUF file."""

PACKING = 2
"""Part of the name of a file in the cache: raise it when the same weights are packed otherwise."""

ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}
"""Activations that have a kernel, by the name in config.json; whether each is GELU."""

_ROUNDING = 2.0**-8
"""bfloat16 keeps 8 bits: what a matrix may differ by from the same one in the model's folder."""


def matrices(module: Any) -> dict[str, list[torch.Tensor]]:
    """Return the weights of the linear layers to pack, by the names of the packed matrices.

    Raises:
        UnsupportedModel: A layer does not fit, or steps over packed weights would compute another model.
    """
    check_packable(module)
    config = module.config
    layers: dict[str, list[Any]] = {}
    for index, layer in enumerate(module.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        fused = hasattr(mlp, "gate_up_proj")
        layers[f"layers.{index}.qkv"] = attention_inputs(attention)
        layers[f"layers.{index}.out"] = [attention.o_proj]
        layers[f"layers.{index}.gate_up"] = [mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj]
        layers[f"layers.{index}.down"] = [mlp.down_proj]
    layers["head"] = [module.lm_head]
    found = {name: [part.weight for part in parts] for name, parts in layers.items()}
    for name, parts in found.items():
        for weight in parts:
            if not fits(*weight.shape):
                raise UnsupportedModel(
                    f"{name} of {tuple(weight.shape)} cannot be packed: outputs must be a multiple of "
                    f"{LANES}, inputs of {GROUP}"
                )
    if activation(config) not in ACTIVATIONS:
        raise UnsupportedModel(f"the activation {activation(config)} has no kernel for packed weights")
    return found


def attention_inputs(attention: Any) -> list[Any]:
    """Return the linear layers whose outputs are Q, K and V, in this order; one that has all in Phi3."""
    if hasattr(attention, "qkv_proj"):
        return [attention.qkv_proj]
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def activation(config: Any) -> str:
    """Return the name of the MLP's activation in config.json."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def packed_file(module: Any, folder: Path, weights: str, cache: Path) -> Path | None:
    """Return the file of packed weights that steps read; None if they read the module's own.

    int8 and int4 are made from the folder's weights once and kept in the cache.

    Args:
        module: The loaded module.
        folder: Its folder.
        weights: As in Config.
        cache: The cache folder.

    Raises:
        UnsupportedModel: The weights cannot be packed.
        ConfigError: The cache cannot be written.
    """
    if weights == "bf16":
        return None
    if weights == "auto":
        return folder / WEIGHTS if (folder / WEIGHTS).exists() else None
    key = digest(read_weight_files(folder).files, cache).hex()[:12]
    file = cache / "models" / f"{folder.name}-{key}-{weights}-p{PACKING}.safetensors"
    if not file.exists():
        log.info("packing %s as %s, once, in %s", folder.name, weights, file)
        pack_module(module, Form(weights), file)
    return file


def pack_gguf(module: Any, weights: GgufWeights, target: Path) -> None:
    """Write packed weights of a GGUF file, which `module` was loaded from, to a file.

    Args:
        module: The loaded module; codes that are not its weights are quantised again.
        weights: Those of the file.
        target: The file to write; on any error it is as it was.

    Raises:
        UnsupportedModel: They do not fit, or are not quantised.
        ConfigError: The file cannot be written.
    """
    parameters = dict(module.named_parameters())
    names = _names(module)
    linear = [names[id(weight)] for parts in matrices(module).values() for weight in parts]
    if not any(weights.is_quantised(name) for name in linear):
        raise UnsupportedModel("its weights are not quantised")

    def own(name: str) -> Sequence[Packed] | None:
        found = weights.packed(name)
        if found is None or _is(found, parameters[name]):
            return found
        log.warning("%s is not what the model has there; it is quantised again", name)
        return None

    pack_quantised(module, own, target)


def pack_quantised(module: Any, packed: Callable[[str], Sequence[Packed] | None], target: Path) -> None:
    """Write packed weights of what is quantised, which `module` was loaded from, to a file.

    Args:
        module: The loaded module.
        packed: Packs a tensor by its name (WeightSource.packed). What it does not pack becomes int8.
        target: The file to write; on any error it is as it was.

    Raises:
        UnsupportedModel: They do not fit.
        ConfigError: The file cannot be written.
    """
    names = _names(module)
    packs: dict[str, Packed] = {}
    anew = []
    for name, parts in matrices(module).items():
        kept = []
        for weight in parts:
            own = packed(names[id(weight)]) or []
            one = len({matrix.form for matrix in own}) == 1
            kept.append(stack(own) if one else _quantised(name, weight, Form.INT8))
            anew += [] if one else [names[id(weight)]]
        packs |= _stacked(name, kept)
    if anew:
        log.warning("%d matrices are packed as int8, the first is %s", len(anew), anew[0])
    _write(packs, target)


def _names(module: Any) -> dict[int, str]:
    """Return the name of each parameter by its id; of tied ones the first."""
    return {id(weight): name for name, weight in module.named_parameters()}


def _is(packed: Sequence[Packed], weight: torch.Tensor) -> bool:
    """Whether packed matrices are the module's weights, but for the rounding of bfloat16."""
    wanted = weight.detach().float().numpy()
    found = np.concatenate([unpack(part) for part in packed])
    return found.shape == wanted.shape and bool((np.abs(found - wanted) <= _ROUNDING * np.abs(wanted)).all())


def _stacked(name: str, parts: list[Packed]) -> dict[str, Packed]:
    """Stack matrices of one form; name each where the forms differ."""
    if len({part.form for part in parts}) == 1:
        return {name: stack(parts)}
    return {f"{name}.{number}": part for number, part in enumerate(parts)}


def parts_of(weights: Mapping[str, Packed], name: str) -> list[Packed]:
    """Return the matrices of a name, whose outputs follow one another: one, or several of different forms."""
    if name in weights:
        return [weights[name]]
    found = [f"{name}.{number}" for number in range(3)]
    return [weights[part] for part in found if part in weights]


def pack_module(module: Any, form: Form, target: Path) -> None:
    """Write the weights of a module, quantised, to a file.

    Args:
        module: The loaded module.
        form: How they are quantised; the head is int8 in any case.
        target: The file to write; on any error it is as it was.

    Raises:
        UnsupportedModel: They do not fit.
        ConfigError: The file cannot be written.
    """
    packs = {}
    for name, parts in matrices(module).items():
        its = Form.INT8 if name == "head" else form
        packs[name] = stack([_quantised(name, weight, its) for weight in parts])
    _write(packs, target)


def read(path: Path) -> dict[str, Packed]:
    """Map packed weights that `pack_gguf` or `pack_module` wrote.

    Raises:
        CorruptModel: The file is damaged.
    """
    try:
        with safe_open(path, "np") as file:
            forms = file.metadata()
        tensors = {name: tensor.numpy() for name, tensor in load_file(path).items()}
        packs = {name: Packed(Form(forms[name]), tiles) for name, tiles in tensors.items()}
        if any(packed.tiles.shape[2] != packed.form.words for packed in packs.values()):
            raise ValueError("blocks of another size than their form has")
        return packs
    except (OSError, ValueError, TypeError, KeyError, IndexError, SafetensorError) as error:
        raise CorruptModel(f"{path} is damaged ({error!r}): delete it, it is made anew") from error


def _quantised(name: str, weight: torch.Tensor, form: Form) -> Packed:
    try:
        return quantise(weight.detach().float().numpy(), form)
    except ValueError as error:
        raise UnsupportedModel(f"{name}: {error}") from error


def _write(packs: Mapping[str, Packed], target: Path) -> None:
    """Write a file as a whole, by rename, or not at all."""
    writing = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        forms = {name: str(packed.form) for name, packed in packs.items()}
        save_file({name: packed.tiles for name, packed in packs.items()}, writing, metadata=forms)
        writing.replace(target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error}") from error
    finally:
        writing.unlink(missing_ok=True)
