"""From tokens to text, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder shows for bytes that are no character, or not one yet."""


class Detokenizer:
    """Decodes one answer token by token. Never splits a character.

    The texts pushed out and finish(), joined, are tokenizer.decode(all tokens); except that a run of
    byte-fallback tokens that turns out broken after a whole character of it was shown cannot take that
    character back. A push decodes only the tokens since the last but one that ended a character, so its
    cost does not grow.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        """With the prompt's tokens, the first word keeps the space that some tokenizers would drop."""
        self._tokenizer = tokenizer
        self._window = [token for token in prompt[-16:] if not tokenizer.is_silent(token)]
        if len(self._window) == 16:
            self._window = self._window[self._whole_from(self._window) :]
        self._read = len(self._window)
        self._shown = len(tokenizer.decode(self._window).rstrip(_UNFINISHED))

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        if self._tokenizer.is_silent(token):
            return ""
        self._window.append(token)
        if len(self._window) - self._read > 16 and self._ends_unfinished(self._window[-8:]):
            return ""  # a long run of broken bytes: look at its end only, until it ends
        text = self._tokenizer.decode(self._window)
        if text.endswith(_UNFINISHED):
            return ""
        new = text[self._shown :]
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._shown = len(self._tokenizer.decode(self._window))
        return new

    def finish(self) -> str:
        """What is still kept back, with U+FFFD for bytes that never became a character."""
        new = self._tokenizer.decode(self._window)[self._shown :]
        self._window, self._read, self._shown = [], 0, 0
        return new

    def _ends_unfinished(self, tokens: list[int]) -> bool:
        return self._tokenizer.decode(tokens).endswith(_UNFINISHED)

    def _whole_from(self, tokens: list[int]) -> int:
        """Which of the first tokens begins a character: from there the fewest bytes are broken."""
        return min(range(4), key=lambda start: self._tokenizer.decode(tokens[start:]).count(_UNFINISHED))
