"""How a folder says that its weights are quantised, read strictly."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spilld.errors import CorruptModel, UnsupportedModel

INSTEAD = (
    "take a GGUF file of this model (its own bits are kept: Q4_K_M, Q8_0, ...), or the folder in bfloat16 "
    'that it was made from, which weights = "int8" or "int4" makes as small'
)
"""What to do about weights that are quantised in ways that are not read."""


@dataclass(frozen=True)
class Method:
    """A way to quantise.

    Attributes:
        becomes: What its weights are packed as, for people.
        values: Keys of quantization_config that decide what a weight is, and their values that are read.
        ignored: Keys that decide no weight: which modules are quantised is seen in the tensors, and what
            activations would be rounded to is not done.
    """

    becomes: str
    values: Mapping[str, Collection[Any]]
    ignored: Collection[str]


METHODS: Mapping[str, Method] = {
    "fp8": Method(
        "int8 for each 32 inputs, nearest",
        {"fmt": ("e4m3", "float8_e4m3fn"), "scale_fmt": ("float", "ue8m0", None), "expert_dtype": ("fp8",)},
        (
            *("activation_scheme", "weight_block_size", "dequantize", "modules_to_not_convert"),
            *("modules_to_convert", "ignored_layers", "weight_per_tensor", "act_per_tensor"),
            "kv_cache_scheme",
        ),
    ),
    "awq": Method(
        "int4, its own codes",
        {"bits": (4,), "version": ("gemm", "GEMM"), "zero_point": (True,), "format": ("gemm",)},
        (
            *("group_size", "modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len"),
            *("modules_to_fuse", "exllama_config", "desc_act", "sym"),
        ),
    ),
    "gptq": Method(
        "int4 or int8, its own codes; int8 for each 32 inputs, nearest, if groups are mixed by act-order",
        {
            "bits": (2, 4, 8),
            "checkpoint_format": ("gptq", "gptq_v2"),
            "format": ("gptq", "gptq_v2"),
            "dynamic": (None, {}),
            "pack_dtype": ("int32",),
            "is_marlin_format": (False,),
            "lora": (None,),
            "adapter": (None,),
        },
        (
            *("group_size", "desc_act", "sym", "static_groups", "true_sequential", "damp_percent", "meta"),
            *("damp_auto_increment", "lm_head", "model_name_or_path", "model_file_base_name", "dataset"),
            *("tokenizer", "block_name_to_quantize", "module_name_preceding_first_block", "batch_size"),
            *("pad_token_id", "use_cuda_fp16", "model_seqlen", "max_input_length", "use_exllama", "backend"),
            *("disable_exllama", "exllama_config", "cache_block_outputs", "modules_in_block_to_quantize"),
            *("act_group_aware", "mse", "parallel_packing", "rotation", "hyb_act", "modules_to_not_convert"),
        ),
    ),
    "compressed-tensors": Method(
        "int4 or int8, its own codes; float8 and nvfp4: int8 for each 32 inputs, nearest; mxfp4: as it is",
        {
            "format": (
                *("dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
                *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision"),
            ),
            "transform_config": (None, {}),
            "sparsity_config": (None, {}),
            "moe_sparsity_config": (None, {}),
            "quantization_status": ("compressed", "frozen", "initialized"),
        },
        (
            *("config_groups", "ignore", "kv_cache_scheme", "version", "global_compression_ratio"),
            *("run_compressed", "dequantize", "use_optimized_inference"),
        ),
    ),
    "mxfp4": Method("as it is", {}, ("modules_to_not_convert", "dequantize")),
    "modelopt": Method(
        "int8 for each 32 inputs, nearest",
        {"quant_algo": ("NVFP4", "FP8")},
        (
            *("group_size", "ignore", "exclude_modules", "config_groups", "kv_cache_scheme", "producer"),
            *("kv_cache_quant_algo", "targets"),
        ),
    ),
    "bitsandbytes": Method(
        "int8 for each 32 inputs, nearest",
        {
            "bnb_4bit_quant_type": ("nf4", "fp4"),
            "bnb_4bit_quant_storage": ("uint8",),
        },
        (
            *("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype"),
            *("bnb_4bit_use_double_quant", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
            *("llm_int8_skip_modules", "llm_int8_threshold"),
        ),
    ),
}
"""Methods that are read, by quant_method."""

_KEYS = ("quantization_config", "compression_config")
"""Where config.json says it."""

_OF_FILES = {
    "quantize_config.json": "gptq",
    "hf_quant_config.json": "modelopt",
    "quant_config.json": "awq",
}
"""Files beside config.json in which older tools say it, and the method."""

QUANTISATION_FILES = frozenset(_OF_FILES)


@dataclass(frozen=True)
class Scheme:
    """How the weights of one folder are quantised.

    Attributes:
        method: A key of METHODS.
        bits: Bits of a code in GPTQ and AWQ.
        zero_minus_one: GPTQ's first format stores zero points less one.
        block: Outputs and inputs that share a scale, where float8 has scales for blocks.
    """

    method: str
    bits: int = 4
    zero_minus_one: bool = False
    block: tuple[int, int] = (128, 128)


def read_scheme(folder: Path, config: Mapping[str, Any]) -> Scheme | None:
    """Return how a folder's weights are quantised; None if they are not.

    Args:
        folder: The folder.
        config: What its config.json says.

    Raises:
        UnsupportedModel: In a way that is not read.
        CorruptModel: What it says cannot be understood.
    """
    if config.get("quantization") and not config.get("quantization_config"):
        raise UnsupportedModel(f"{folder}: weights quantised by MLX are not read; {INSTEAD}")
    said = _said(folder, config)
    if said is None:
        return None
    method = str(said.get("quant_method") or "an unnamed method")
    if method not in METHODS:
        raise UnsupportedModel(
            f"{folder}: weights quantised by {method} are not read; {', '.join(METHODS)} are. Else {INSTEAD}"
        )
    known = METHODS[method]
    for key, value in said.items():
        if key == "quant_method" or key in known.ignored:
            continue
        if key not in known.values:
            raise UnsupportedModel(
                f"{folder}: quantization_config of {method} says {key!r}, which spilld does not know: it may "
                f"change weights; {INSTEAD}"
            )
        if value not in known.values[key]:
            raise UnsupportedModel(
                f"{folder}: weights quantised by {method} with {key} = {value!r} are not read; {INSTEAD}"
            )
    if method in ("gptq", "awq") and "bits" not in said:
        raise CorruptModel(f"{folder}: quantization_config of {method} does not say how many bits")
    version = said.get("checkpoint_format") or said.get("format") or "gptq"
    return Scheme(
        method, int(said.get("bits", 4)), method == "gptq" and version == "gptq", _block(folder, said)
    )


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json says once the weights are plain numbers."""
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    if isinstance(text := plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in text.items() if key not in _KEYS}
    return plain


def _block(folder: Path, said: Mapping[str, Any]) -> tuple[int, int]:
    """Return the one size of float8's blocks."""
    groups = said.get("config_groups") or {}
    found = [said.get("weight_block_size")]
    if isinstance(groups, dict):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        found += [some.get("block_structure") for some in weights if isinstance(some, dict)]
    sizes = {json.dumps(size) for size in found if size is not None} or {"[128, 128]"}
    try:
        (size,) = sizes
        rows, columns = json.loads(size)
        block = int(rows), int(columns)
    except (ValueError, TypeError) as error:
        raise UnsupportedModel(f"{folder}: blocks of {', '.join(sorted(sizes))} are not read") from error
    if min(block) < 1:
        raise CorruptModel(f"{folder}: blocks of {size}")
    return block


def _said(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a folder says of its quantisation, with quant_method."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in _KEYS:
            if not (found := place.get(key)):
                continue
            if not isinstance(found, dict):
                raise CorruptModel(f"{folder}: {key} of config.json is {found!r}")
            if found.get("load_in_4bit") or found.get("load_in_8bit"):
                return {"quant_method": "bitsandbytes", **found}
            return dict(found)
    for name, method in _OF_FILES.items():
        if (path := folder / name).exists():
            return _of_file(path, method)
    return None


def _of_file(path: Path, method: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptModel(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CorruptModel(f"{path} is no object")
    if method == "modelopt":
        inner = found.get("quantization")
        return {"quant_method": method, **(inner if isinstance(inner, dict) else {})}
    if method == "awq" and "w_bit" in found:
        found["bits"] = found.pop("w_bit")
        found["group_size"] = found.pop("q_group_size", None)
    return {"quant_method": method, **found}
