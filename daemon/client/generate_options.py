"""Makes the request that is sent of what a caller gives to `generate`."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from spilld.errors import InvalidRequest
from spilld.fields import FieldError, Struct, readers
from spilld.protocol.messages import (
    Generate,
    Message,
    Prompt,
    Sampling,
)

AHEAD = 256
"""Events that the daemon may send without knowing that they came."""

Promptable = str | Sequence[int] | Sequence[Message | Mapping[str, str]]
"""A text, token ids, or a chat."""


class Options(TypedDict, total=False):
    """What `generate` takes besides the prompt; protocol.Generate and protocol.Sampling explain each."""

    max_tokens: int
    stop: Sequence[str]
    ignore_eos: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    context: str | None
    session: str | None
    parse_special: bool
    keep: bool
    priority: str
    timeout: float | None
    """Seconds for the whole call; then it is cancelled and raises DeadlineExceeded."""


def generate_request(request_id: str, tenant: str, prompt: Promptable, options: Options) -> Generate:
    """Make the request of what a caller gave to `generate`.

    Raises:
        InvalidRequest: The prompt is of another type.
    """
    rest: dict[str, Any] = dict(options)
    sampling = {name: rest.pop(name) for name in readers(Sampling) if name in rest}
    stop = rest.pop("stop", ())
    return Generate(
        request_id=request_id,
        tenant=tenant,
        prompt=_prompt(prompt),
        sampling=Sampling(**sampling),
        deadline_s=rest.pop("timeout", None),
        ahead=AHEAD,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        **rest,
    )


def _prompt(given: Promptable) -> Prompt:
    if isinstance(given, str):
        return given
    if isinstance(given, bytes | Mapping):
        raise InvalidRequest(
            f"prompt is {type(given).__name__}; allowed: a text, token ids or a list of messages"
        )
    try:
        if any(isinstance(item, Message | Mapping) for item in given[:1]):
            return tuple(Struct(Message).read(item, f"messages[{i}]") for i, item in enumerate(given))
        # integers of numpy and torch are taken too; a bool stays one, and is refused
        return tuple(item if isinstance(item, int) else operator.index(item) for item in given)  # type: ignore[arg-type]
    except (FieldError, TypeError) as error:
        raise InvalidRequest(f"prompt: {error}") from error
