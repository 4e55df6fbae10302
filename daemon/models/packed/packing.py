"""Packed weights of a model for its steps, made once and then mapped.

A quantised GGUF file's own bits are kept (the types of GGUF_FORMS): nothing is rounded twice. What it stores
in other ways becomes int8. Matrices that read the same input are stacked: `layers.N.qkv`, `layers.N.out`,
`layers.N.gate_up`, `layers.N.down`, and `head`, which is int8 also beside int4. Where their forms differ they
stay apart: `layers.N.qkv.0`, `layers.N.qkv.1`, ...
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file

from spilld.errors import ConfigError, CorruptModel, UnsupportedModel
from spilld.models.files.digest import digest
from spilld.models.files.weights import read_weight_files
from spilld.models.gguf.header import GgufHeader, GgufTensor
from spilld.offload.kernels.linear.forms import GGUF_FORMS, GROUP, LANES, Form
from spilld.offload.kernels.linear.packed import (
    Packed,
    fits,
    quantise,
    stack,
    unpack,
)
from spilld.offload.kernels.linear.repack import from_gguf

from .packable import check_packable

log = logging.getLogger(__name__)

WEIGHTS = Path("packed") / "weights.safetensors"
"""The file of packed weights in a folder that was made from a GGUF file."""

PACKING = 2
"""Part of the name of a file in the cache: raise it when the same weights are packed otherwise."""

PLAIN = ("F32", "F16", "BF16")
"""GGUF types that are not quantised."""

ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}
"""Activations that have a kernel, by the name in config.json; whether each is GELU."""

_ROUNDING = 2.0**-8
"""bfloat16 keeps 8 bits: what a matrix may differ by from the same one in the model's folder."""


@dataclass(frozen=True)
class PackedSource:
    """A linear layer of the module, and its name in a GGUF file."""

    weight: torch.Tensor
    gguf: str
    heads: int = 0
    """Heads whose halves llama.cpp interleaves; 0 for none."""


def matrices(module: Any) -> dict[str, list[PackedSource]]:
    """Return the linear layers to pack, by the names of the packed matrices.

    Raises:
        UnsupportedModel: A layer does not fit, or steps over packed weights would compute another model.
    """
    check_packable(module)
    config = module.config
    interleaved = config.model_type in ("llama", "mistral")
    heads = (
        {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if interleaved else {}
    )

    def of(index: int, layers: list[Any], names: list[str]) -> list[PackedSource]:
        return [
            PackedSource(layer.weight, f"blk.{index}.{name}.weight", heads.get(name, 0))
            for layer, name in zip(layers, names, strict=True)
        ]

    found = {}
    for index, layer in enumerate(module.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        inputs = attention_inputs(attention)
        fused = hasattr(mlp, "gate_up_proj")
        gate_up = [mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj]
        found[f"layers.{index}.qkv"] = of(index, inputs, ["attn_q", "attn_k", "attn_v"][: len(inputs)])
        found[f"layers.{index}.out"] = of(index, [attention.o_proj], ["attn_output"])
        found[f"layers.{index}.gate_up"] = of(index, gate_up, ["ffn_up"] if fused else ["ffn_gate", "ffn_up"])
        found[f"layers.{index}.down"] = of(index, [mlp.down_proj], ["ffn_down"])
    tied = config.tie_word_embeddings
    found["head"] = [PackedSource(module.lm_head.weight, "token_embd.weight" if tied else "output.weight")]
    for name, parts in found.items():
        for part in parts:
            if not fits(*part.weight.shape):
                raise UnsupportedModel(
                    f"{name} of {tuple(part.weight.shape)} cannot be packed: outputs must be a multiple of "
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


def pack_gguf(module: Any, header: GgufHeader, target: Path) -> None:
    """Write packed weights of a GGUF file, which `module` was loaded from, to a file.

    Args:
        module: The loaded module; codes that are not its weights are quantised again.
        header: The header of the GGUF file.
        target: The file to write; on any error it is as it was.

    Raises:
        UnsupportedModel: They do not fit, or are not quantised.
        ConfigError: The file cannot be written.
    """
    tensors = header.tensors
    found = matrices(module)
    names = [part.gguf for parts in found.values() for part in parts if part.gguf in tensors]
    if all(tensors[name].kind in PLAIN for name in names):
        raise UnsupportedModel("its weights are not quantised")
    packs: dict[str, Packed] = {}
    anew = set()
    for name, parts in found.items():
        kept = []
        for part in parts:
            own = _kept(part, tensors)
            if own is None and part.gguf in tensors:
                anew.add(tensors[part.gguf].kind)
            kept.append(_quantised(part, Form.INT8) if own is None else own)
        packs |= _stacked(name, kept)
    if anew:
        log.warning("matrices of %s are packed as int8", ", ".join(sorted(anew)))
    _write(packs, target)


def pack_quantised(module: Any, packed: Callable[[str], Sequence[Packed] | None], target: Path) -> None:
    """Write packed weights of a quantised folder, which `module` was loaded from, to a file.

    Args:
        module: The loaded module.
        packed: Packs a tensor by its name (WeightSource.packed). What it does not pack becomes int8.
        target: The file to write; on any error it is as it was.

    Raises:
        UnsupportedModel: They do not fit.
        ConfigError: The file cannot be written.
    """
    names = {id(weight): name for name, weight in module.named_parameters()}
    packs: dict[str, Packed] = {}
    for name, parts in matrices(module).items():
        kept = []
        for part in parts:
            own = packed(names[id(part.weight)]) or []
            one = len({matrix.form for matrix in own}) == 1
            kept.append(stack(own) if one else _quantised(part, Form.INT8))
        packs |= _stacked(name, kept)
    _write(packs, target)


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
        packs[name] = stack([_quantised(part, Form.INT8 if name == "head" else form) for part in parts])
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


def _quantised(part: PackedSource, form: Form) -> Packed:
    try:
        return quantise(part.weight.detach().float().numpy(), form)
    except ValueError as error:
        raise UnsupportedModel(f"{part.gguf}: {error}") from error


def _kept(part: PackedSource, tensors: Mapping[str, GgufTensor]) -> Packed | None:
    """Return the matrix of the GGUF file, if its type has a form and it is the module's weights."""
    tensor = tensors.get(part.gguf)
    if tensor is None or tensor.kind not in GGUF_FORMS or len(tensor.shape) != 2:
        return None
    size = (tensor.shape[0], tensor.nbytes // tensor.shape[0])
    rows = np.asarray(np.memmap(tensor.path, np.uint8, "r", tensor.start, size))
    if part.heads:
        halves = rows.reshape(part.heads, -1, 2, rows.shape[1])
        rows = halves.swapaxes(1, 2).reshape(rows.shape)
    packed = from_gguf(rows, tensor.kind)
    wanted = part.weight.detach().float().numpy()
    if (packed.outputs, packed.inputs) != wanted.shape:
        return None
    if (np.abs(unpack(packed) - wanted) > _ROUNDING * np.abs(wanted)).any():
        log.warning("%s is not what the model has there; it is quantised again", part.gguf)
        return None
    return packed


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
