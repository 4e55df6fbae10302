"""Prompts of requests as token ids, as far as they are known without the session."""

from __future__ import annotations

from spilld.errors import InvalidRequest
from spilld.models.model import Model
from spilld.protocol.messages import Generate, Message


def prompt_tokens(request: Generate, model: Model, longest: int) -> list[int]:
    """Tokenise a text, check token ids, or apply the chat template to a new chat.

    Args:
        request: The client's message.
        model: The model that is served.
        longest: The most tokens that a sequence may have.

    Returns:
        Token ids; none where messages continue a session, which the engine completes.

    Raises:
        InvalidRequest: Token ids are outside of the vocabulary, or `parse_special` comes with something that
            is no text.
        PromptTooLong: The prompt has more than `longest` tokens.
    """
    prompt, new = request.prompt, request.context is None and request.session is None
    if isinstance(prompt, str):
        return model.tokenizer.encode(prompt, start=new, special=request.parse_special, most=longest)
    if request.parse_special:
        raise InvalidRequest("parse_special is of a text: in messages and token ids nothing is looked for")
    messages = [part for part in prompt if isinstance(part, Message)]
    if not messages:
        tokens = [part for part in prompt if isinstance(part, int)]
        if tokens and max(tokens) >= model.geometry.vocab:
            raise InvalidRequest(
                f"tokens: {max(tokens)} is not below the vocabulary of {model.geometry.vocab}"
            )
        return tokens
    if new and not request.keep:
        return model.tokenizer.chat(messages, answer=request.max_tokens > 0, most=longest)
    return []
