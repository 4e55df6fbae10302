"""Completions: the tokens that a request has produced, and the text that they complete."""

from __future__ import annotations

from collections.abc import Sequence

from spilld.protocol.messages import Generate
from spilld.tokenizer.cut import cut
from spilld.tokenizer.detokenizer import Detokenizer
from spilld.tokenizer.stop_strings import StopStrings
from spilld.tokenizer.tokenizer import Tokenizer


class Completion:
    """Grows token by token until an end-of-text, a stop string or `max_tokens`.

    Attributes:
        tokens: Everything sampled, an end-of-text included.
        max_tokens: The most tokens that there may be.
    """

    def __init__(self, request: Generate) -> None:
        self.tokens: list[int] = []
        self.max_tokens = request.max_tokens
        self._ignore_eos = request.ignore_eos
        self._text: list[str] = []
        self._ends: list[int] = []
        """Of each token, the length of the text that it and those before it complete."""
        self._whole = False
        """Whether all of its text was shown."""
        self._stops = StopStrings(request.stop)
        self._stopped = False
        self._eos: frozenset[int] = frozenset()

    def prepare(self, before: Sequence[int], tokenizer: Tokenizer, eos: frozenset[int]) -> None:
        """Set the tokens that the completion follows, and the ids that end a text."""
        self._eos = frozenset() if self._ignore_eos else eos
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, before)

    def push(self, token: int) -> str:
        """Take a token, and return the text that may be shown now."""
        self.tokens.append(token)
        if self.at_eos:
            return ""
        shown = self._detokenizer.push(token)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(shown))
        text, hit = self._stops.push(shown)
        self._stopped = hit is not None
        self._text.append(text)
        return text

    def conclude(self) -> None:
        """Show what was held back for a stop string or an unfinished character, as no token will follow."""
        if self._stopped:
            return
        text, hit = self._stops.push(self._detokenizer.finish())
        self._stopped = hit is not None
        self._whole = not self._stopped
        self._text.append(text if hit else text + self._stops.finish())

    @property
    def text(self) -> str:
        """All text that was shown."""
        return "".join(self._text)

    @property
    def at_eos(self) -> bool:
        """Whether the last token is an end-of-text."""
        return bool(self.tokens) and self.tokens[-1] in self._eos

    @property
    def reason(self) -> str | None:
        """Why nothing more is to be produced: "eos", "stop" or "length"."""
        if self.at_eos:
            return "eos"
        if self._stopped:
            return "stop"
        return "length" if len(self.tokens) >= self.max_tokens else None

    @property
    def in_sequence(self) -> list[int]:
        """Tokens that belong to the sequence.

        An end-of-text does not belong to it: what is appended later precedes it.
        """
        return self.tokens[:-1] if self.at_eos else self.tokens

    @property
    def ended(self) -> bool:
        """Whether it is complete, or was stopped."""
        return self._whole or self._stopped

    def kept(self, before: Sequence[int]) -> list[int]:
        """Return the tokens with which a session continues: they show exactly the text that was shown.

        Args:
            before: The tokens that the completion follows.
        """
        if self._whole:
            return self.in_sequence
        return cut(self._tokenizer, before, self.in_sequence, self._ends, self.text)
