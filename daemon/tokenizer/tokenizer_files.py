"""The files of a model folder that define its tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """Read tokenizer.json as it is, else what transformers makes of older files."""
    if (folder / "tokenizer.json").is_file():
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    from transformers import AutoTokenizer

    wrapped = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    backend: tokenizers.Tokenizer = wrapped.backend_tokenizer
    return backend


def read_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """Read the chat template; None if there is none.

    It is chat_template.jinja, or tokenizer_config.json's entry: a text, or `default` of several named ones.

    Raises:
        ValueError: The entry is of another form.
    """
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        try:
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        except (TypeError, KeyError) as error:
            raise ValueError("a list of chat templates whose entries have no name and template") from error
    if not isinstance(template, str | None):
        raise ValueError(f"the chat template is a {type(template).__name__}; allowed: a text, or named ones")
    return template


def read_settings(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json; empty if there is none.

    Raises:
        ValueError: It is not JSON, or not a map.
    """
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is a {type(content).__name__}; allowed: a map")
    return content


def special_names(settings: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens that the settings name, such as bos_token."""
    return {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in settings.items()
        if key.endswith("_token") and isinstance(value, (str, dict))
    }
