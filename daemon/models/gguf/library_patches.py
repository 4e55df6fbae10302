"""transformers' reader of a GGUF file's tokenizer, without its slow reading of the config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import modeling_gguf_pytorch_utils


@contextmanager
def config_known(values: Mapping[str, Any]) -> Iterator[None]:
    """Make transformers take a GGUF file's config from `values` in this context.

    It parses the whole file for it, which takes up to a minute, and knows fewer architectures.
    """
    read = modeling_gguf_pytorch_utils.load_gguf_checkpoint
    modeling_gguf_pytorch_utils.load_gguf_checkpoint = lambda *_, **__: {"config": dict(values)}
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.load_gguf_checkpoint = read
