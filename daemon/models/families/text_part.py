"""The text part of a model folder: what of its configuration and of its tensors is served."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from spilld.errors import CorruptModel, UnsupportedModel

from .registry import FAMILIES, WRAPPERS, class_of

TENSOR_NAMES = {
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?!lm_head\.)(?:model\.)?": "model.",
}
"""Patterns of what a wrapper calls the tensors of its text part, and their names in the class for text."""

_OTHER_PARTS = re.compile(
    r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|audio_tower|embed_vision|embed_audio)\."
)
"""Tensors of a wrapper that see images or hear. Text does not go through them."""

_NOT_OF_TEXT = {"text_config", "vision_config", "audio_config", "encoder", "decoder", "is_encoder_decoder"}
"""Keys of config.json that a family which is not listed must not have."""


def text_type(config: Mapping[str, Any], where: str) -> str:
    """Return the model_type of what is served.

    Args:
        config: What config.json says.
        where: The folder, for messages.

    Raises:
        UnsupportedModel: The family is not served.
        CorruptModel: A wrapper says nothing of its text part.
    """
    family = str(config["model_type"])
    if (wrapper := WRAPPERS.get(family)) is not None:
        text = config.get("text_config")
        if not isinstance(text, dict) or not isinstance(text.get("model_type"), str):
            raise CorruptModel(f"{where}: config.json of a {family} has no text_config with a model_type")
        if text["model_type"] not in wrapper.texts:
            raise UnsupportedModel(
                f"{where}: a {family} around {text['model_type']!r} is not supported; around "
                f"{', '.join(sorted(wrapper.texts))} it is"
            )
        return str(text["model_type"])
    if class_of(family) is None or _NOT_OF_TEXT & config.keys():
        raise UnsupportedModel(
            f"{where}: model_type {family!r} is not supported; {', '.join([*FAMILIES, *WRAPPERS])} are, and "
            "those that transformers has a class for that computes text and nothing else"
        )
    return family


def class_name(config: Mapping[str, Any]) -> str:
    """Return the class of transformers for the whole of a served model."""
    family = str(config["model_type"])
    return WRAPPERS[family].class_name if family in WRAPPERS else str(class_of(family))


def text_config(config: Any) -> Any:
    """Return the configuration of the text part of a transformers config, which is its own but in wrappers.

    Whether embeddings are tied, and which tokens end a text, a wrapper says for its text part.
    """
    text = config.get_text_config()
    if text is config:
        return config
    text.tie_word_embeddings = config.tie_word_embeddings
    ends = [getattr(part, "eos_token_id", None) for part in (config, text)]
    ids = {i for end in ends if end is not None for i in (end if isinstance(end, list) else [end])}
    text.eos_token_id = sorted(ids) or None
    return text


def of_text(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return those of the tensors that belong to the text part, sorted."""
    if config["model_type"] not in WRAPPERS:
        return sorted(names)
    return sorted(name for name in names if not _OTHER_PARTS.match(name))
