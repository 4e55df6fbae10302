"""A model in memory: checked, mapped, with fixed RoPE and an identity that stored KV is tied to."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.utils import logging as transformers_logging

from spilld.attention.query_scale import tell_positions
from spilld.attention.state_layers import keep_states
from spilld.attention.transformers_hook import IMPLEMENTATION
from spilld.cuda_ext.device.tensors import gpu_errors
from spilld.cuda_ext.errors import DeviceError
from spilld.errors import ConfigError, CorruptModel, DeviceUnusable
from spilld.kv.geometry import Geometry
from spilld.models.families.registry import WRAPPERS, class_of
from spilld.models.families.rope import fix_rope, rope_bytes
from spilld.models.families.text_part import TENSOR_NAMES, of_text, text_config, text_type
from spilld.models.files.digest import digest
from spilld.models.files.folder import check_folder, read_config
from spilld.models.files.weights import read_weight_files
from spilld.models.packed.packable import not_packable
from spilld.models.packed.packing import packed_file, read
from spilld.models.packed.replacing import REPLACING, pack_layers, packed_forms
from spilld.models.parity.parity import check_parity_once
from spilld.offload.kernels.linear.forms import Form
from spilld.offload.kernels.linear.packed import Packed
from spilld.tokenizer.tokenizer import Tokenizer

from .catalog import default_cache, identify, resolve
from .probe import probe_once
from .skeleton import SkeletonMode
from .wide_linear import has_bfloat16_products, widen

__all__ = ["Model", "identify", "load", "load_module", "resolve"]

LOADING_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError),
    *(StrictDataclassError, SafetensorError),
)
"""What transformers raises for a damaged model."""

_VOLATILE = (
    "transformers_version",
    "_name_or_path",
    "_model_name_or_path",
    "dtype",
    "torch_dtype",
    "use_cache",
)
"""Keys of config.json that may change without changing a single key or value."""


@dataclass(frozen=True)
class Model:
    """A model that can be served.

    `module` is in evaluation mode and needs no gradient; its weights are mapped from `folder`, or are on a
    GPU, or are packed in its layers. `packed` is what steps read instead of the module, if they do; names as
    in packing.py. `fingerprint`
    is 32 bytes: KV computed under another one must not be served. `identity` is 16 bytes: tokens of a model
    with another one mean something else, or nothing (catalog.identify).
    """

    name: str
    folder: Path
    module: Any
    geometry: Geometry
    tokenizer: Tokenizer
    fingerprint: bytes
    identity: bytes
    packed: Mapping[str, Packed] | None = None

    @property
    def forms(self) -> set[Form]:
        """The forms of its packed weights, whether steps read them or the module's layers."""
        return {weights.form for weights in (self.packed or {}).values()} | packed_forms(self.module)


def load(
    folder: Path,
    dtype: str,
    attention: str = IMPLEMENTATION,
    *,
    name: str | None = None,
    max_context: int | None = None,
    cache: Path | None = None,
    weights: str = "bf16",
    device: str = "cpu",
    identity: bytes | None = None,
    check: Callable[[Geometry], None] = lambda _: None,
) -> Model:
    """Load a folder that `resolve` returned.

    Args:
        folder: The folder.
        dtype: "float32" or "bfloat16".
        attention: The name of a registered transformers attention.
        name: What the model is called; by default as the folder.
        max_context: The longest context, by default all that the model was made for; it decides longrope's
            factors once.
        cache: The folder for digests and packed weights; by default default_cache().
        weights: As in Config.
        device: As in Placement; the module is moved there. Only the CPU's weights may be packed.
        identity: That of what the folder was converted from; by default the folder's own.
        check: Raises if such a model cannot be served; called before weights are packed or moved.

    Raises:
        CorruptModel: The folder is damaged, or changed while it was loaded.
        UnsupportedModel: The model is of a kind that is not served.
        DeviceUnusable: The GPU does not take the weights.
        ConfigError: max_context is more than the model's positions, or the cache cannot be written.
    """
    check_folder(folder)
    cache = cache or default_cache()
    contents = digest(read_weight_files(folder).files, cache)
    if attention == IMPLEMENTATION:
        with _quiet():
            check_parity_once(*_class_and_config(folder), cache)
    module = load_module(folder, dtype, attention)
    tokenizer = Tokenizer.load(folder)
    geometry = Geometry.of(module.config, module.generation_config, tokenizer.eos)
    check(geometry)
    longest = max_context or geometry.max_positions
    if longest > geometry.max_positions:
        raise ConfigError(
            f"a context of {longest} tokens exceeds the model's {geometry.max_positions} positions"
        )
    fix_rope(module, longest)
    keep_states(module, geometry)
    tell_positions(module)
    if attention == IMPLEMENTATION:
        probe_once(module, geometry, cache)
    packs = device == "cpu" and weights in ("int8", "int4")
    in_place = packs and bool(not_packable(module))
    steps = packed_file(module, folder, weights, cache) if device == "cpu" and not in_place else None
    if device != "cpu":
        _move(module, device)
    elif in_place:
        pack_layers(module, Form(weights))
    elif steps is None and dtype == "bfloat16" and not has_bfloat16_products():
        widen(module)
    if digest(read_weight_files(folder).files, cache) != contents:
        raise CorruptModel(f"{folder} changed while it was loaded: start again when it is whole")
    read_instead = digest([steps], cache) if steps else b""
    if in_place:
        read_instead = f"layers {weights} {REPLACING}".encode()
    return Model(
        name=name or folder.name,
        folder=folder,
        module=module,
        geometry=geometry,
        tokenizer=tokenizer,
        fingerprint=_fingerprint(folder, dtype, module, contents, read_instead),
        identity=identity or identify(str(folder), cache),
        packed=read(steps) if steps else None,
    )


def _move(module: Any, device: str) -> None:
    try:
        with gpu_errors():
            module.to(device)
    except DeviceError as error:
        raise DeviceUnusable(
            f"the GPU does not take the weights: {error}; choose a smaller model, or keep them in host "
            'memory with weights = "int4"'
        ) from error


def load_module(folder: Path, dtype: str, attention: str) -> Any:
    """Load the transformers model of a folder, with no tensor missing.

    Weights already stored in `dtype` are mapped; others are cast, which needs memory for both.

    Raises:
        CorruptModel: The folder is damaged, or a tensor is missing, unknown or of another shape.
        UnsupportedModel: The model is of a kind that is not served.
    """
    check_folder(folder)
    read_weight_files(folder)
    said = read_config(folder)
    module_class, config = _class_and_config(folder)
    with _quiet(), SkeletonMode():
        try:
            module, report = module_class.from_pretrained(
                folder,
                config=config,
                key_mapping=TENSOR_NAMES if said["model_type"] in WRAPPERS else None,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except LOADING_ERRORS as error:
            raise CorruptModel(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys := of_text(said, map(str, report[kind])):
            raise CorruptModel(f"{folder}: {len(keys)} {kind.replace('_', ' ')}, the first is {keys[0]}")
    return module.eval().requires_grad_(False)


def model_class(family: str) -> Any:
    """Return the class of transformers for a family of text; no other family is imported."""
    package = model_type_to_module_name(family)
    return getattr(import_module(f"transformers.models.{package}.modeling_{package}"), str(class_of(family)))


def _class_and_config(folder: Path) -> tuple[Any, Any]:
    """Return the class of transformers for a folder's text part, and its config.

    Raises:
        CorruptModel: The folder is damaged.
        UnsupportedModel: The model is of a kind that is not served.
    """
    said = read_config(folder)
    family = text_type(said, str(folder))
    with _quiet():
        try:
            config = CONFIG_MAPPING[said["model_type"]].from_pretrained(folder)
            return model_class(family), text_config(config)
        except LOADING_ERRORS as error:
            raise CorruptModel(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error


def _fingerprint(folder: Path, dtype: str, module: Any, contents: bytes, steps: bytes) -> bytes:
    """Return the model's fingerprint, 32 bytes.

    Args:
        folder: The model folder.
        dtype: What the model computes in.
        module: The loaded module, with fixed RoPE.
        contents: The digest of the folder's weights.
        steps: The digest of those that steps read instead, or how they were packed; empty if steps read the
            folder's.
    """
    config = {key: value for key, value in read_config(folder).items() if key not in _VOLATILE}
    hasher = hashlib.blake2b(digest_size=32, person=b"spilld model v1")
    for part in (
        contents,
        json.dumps(config, sort_keys=True).encode(),
        rope_bytes(module),
        dtype.encode(),
        *([b"steps " + steps] if steps else []),
    ):
        hasher.update(struct.pack("<Q", len(part)) + part)
    return hasher.digest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and load report, whose contents are raised as errors."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
