"""Cuts an answer's tokens where its text was cut: before a stop string, or by a cancel."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from .detokenizer import Detokenizer
from .tokenizer import Tokenizer

LOOK_BACK = 8
"""Tokens before the cut that may be tokenised anew."""

CONTEXT = 16
"""Tokens before those from which the text is decoded to verify it."""

ANCHOR = "a"
"""Beginning of the text that is tokenised, where a tokenizer treats the beginning in a way of its own."""


def cut(
    tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int], ends: Sequence[int], text: str
) -> list[int]:
    """Tokens that show exactly `text` after `prompt`.

    Args:
        tokenizer: The model's.
        prompt: Tokens before the answer.
        answer: Tokens of the answer.
        ends: Of each token of the answer, the length of the text that it and those before it complete.
        text: A beginning of the answer's text, in characters.

    Returns:
        The answer's tokens as far as they show nothing else; where the text ends inside a token, followed by
        the rest tokenised anew. Where no tokens show the text exactly, the answer's that end before it.
    """
    whole = _completed(tokenizer, answer, ends, len(text))
    if (ends[whole - 1] if whole else 0) == len(text):
        return list(answer[:whole])
    base = max(0, whole - LOOK_BACK - CONTEXT)
    while base and ends[base - 1] == (ends[base - 2] if base > 1 else 0):
        base -= 1  # where a token completes a character
    known = text[ends[base - 1] :] if base else text
    before = [*prompt[-CONTEXT:], *answer[:base]][-2 * CONTEXT :]
    for kept in range(whole, max(base, whole - LOOK_BACK) - 1, -1):
        for rest in _tokenised(tokenizer, text[ends[kept - 1] if kept else 0 :]):
            if _shown(tokenizer, before, [*answer[base:kept], *rest]) == known:
                return [*answer[:kept], *rest]
    return list(answer[:whole])


def _completed(tokenizer: Tokenizer, answer: Sequence[int], ends: Sequence[int], length: int) -> int:
    """How many tokens show what they complete of so many characters, and hold nothing back."""
    behind = bisect_right(ends, length)
    shown = ends[behind - 1] if behind else 0
    whole = bisect_left(ends, shown) + 1 if shown else 0
    while whole < behind and tokenizer.is_silent(answer[whole]):
        whole += 1
    return whole


def _tokenised(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """Ways to tokenise a text that follows another; which one shows it depends on the tokenizer."""
    if not text:
        yield []
        return
    anchor, both = (tokenizer.encode(start, start=False) for start in (ANCHOR, ANCHOR + text))
    if both[: len(anchor)] == anchor:
        yield both[len(anchor) :]
    yield tokenizer.encode(text, start=False)
    if text.startswith(" "):
        yield tokenizer.encode(text[1:], start=False)


def _shown(tokenizer: Tokenizer, before: Sequence[int], tokens: Sequence[int]) -> str:
    detokenizer = Detokenizer(tokenizer, before)
    return "".join([*(detokenizer.push(token) for token in tokens), detokenizer.finish()])
