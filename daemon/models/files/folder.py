"""What a model folder says of its model, before anything is loaded: whether it can be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spilld.errors import CorruptModel, UnsupportedModel
from spilld.models.families.text_part import class_name, text_type
from spilld.models.quantised.config import Scheme, read_scheme


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        CorruptModel: It is missing, is not JSON, or names no model_type.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptModel(f"{folder} has no config.json") from None
    except (ValueError, RecursionError) as error:
        raise CorruptModel(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CorruptModel(f"{path} names no model_type")
    return config


def check_folder(folder: Path) -> Scheme | None:
    """Check that a folder's model can be served, from its small files.

    Returns:
        How its weights are quantised; None if they are not.

    Raises:
        UnsupportedModel: It could not be served, or would be another model once it is loaded.
        CorruptModel: Its config.json is damaged.
    """
    config = read_config(folder)
    text_type(config, str(folder))
    scheme = read_scheme(folder, config)
    _check_code(folder, config)
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModel(
            f"{folder} has an adapter (LoRA), which is not applied: merge it into the weights "
            "(merge_and_unload of peft) and serve the folder of the merged model"
        )
    if config.get("is_causal") is False:
        raise UnsupportedModel(f"{folder}: a model that is not causal cannot be served token by token")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "dynamic" in json.dumps(rope):
        raise UnsupportedModel(f"{folder}: dynamic RoPE depends on the longest sequence in the batch")
    return scheme


def _check_code(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a model that needs code of its own folder, which is never run.

    Such code may be there if the family has been added to transformers meanwhile.
    """
    ours = class_name(config)
    named = config.get("architectures") or [ours]
    code = config.get("auto_map") or {}
    its = code.get("AutoModelForCausalLM") if isinstance(code, dict) else code
    if ours not in named or (its is not None and str(its).rpartition(".")[2] != ours):
        raise UnsupportedModel(
            f"{folder} is computed by {its or ', '.join(map(str, named))}, not by transformers' {ours}: a "
            "model of another shape, or with code of its own, is not served"
        )
