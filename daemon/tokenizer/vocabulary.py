"""Lower bounds for how many tokens a text has, from the vocabulary, before it is tokenised."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import tokenizers
from tokenizers import models

COMPOSED = 4
"""The most bytes that Unicode's normal forms turn into one: the Kelvin sign, three, becomes a K."""

OF_TEXT = frozenset({*range(256)} - {0xC0, 0xC1, *range(0xF5, 0x100)})
"""Bytes that occur in UTF-8."""

_SPLITTERS = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts")
"""Steps before the model that leave every character where it is, in some form."""


@dataclass(frozen=True)
class Bound:
    """A token stands for at most `longest` bytes of a text. Bytes in `dropped` become no token."""

    longest: int
    dropped: bytes

    def exceeded(self, text: str, most: int) -> bool:
        """Whether a text has certainly more than `most` tokens."""
        room = most * self.longest
        if 4 * len(text) <= room:
            return False
        return len(text.encode(errors="replace").translate(None, self.dropped)) > room

    def with_token(self, *texts: str) -> Bound:
        """Return the bound of a vocabulary in which each of these texts is one token, too."""
        return replace(self, longest=max(self.longest, *(len(text.encode()) for text in texts), 1))


def bounds(backend: tokenizers.Tokenizer) -> dict[bool, Bound | None]:
    """Return the bound where special tokens are looked for in a text, and where they are not.

    It is None where there is no bound: the tokenizer leaves out spaces, or has one token for everything that
    is unknown.
    """
    added = backend.get_added_tokens_decoder().values()
    found = _bound(backend, max((len(entry.content.encode()) for entry in added), default=1))
    strip = {entry.special for entry in added if entry.lstrip or entry.rstrip}
    return {True: None if strip else found, False: None if False in strip else found}


def _bound(backend: tokenizers.Tokenizer, longest_added: int) -> Bound | None:
    shrinks = _shrinks(_state(backend.normalizer))
    before = _flat(_state(backend.pre_tokenizer), "pretokenizers")
    if shrinks is None or not all(_splits(step) for step in before):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    byte_level = any(step["type"] == "ByteLevel" for step in before)
    dropped = _dropped(backend.model, vocabulary, byte_level=byte_level)
    if dropped is None or (dropped and shrinks > 1):
        return None
    lengths = map(len, vocabulary) if byte_level else (len(token.encode()) for token in vocabulary)
    return Bound(shrinks * max(longest_added, max(lengths)), dropped)


def _state(part: Any) -> dict[str, Any] | None:
    """Return a step of a tokenizer as its file has it."""
    state: dict[str, Any] | None = None if part is None else json.loads(part.__getstate__())
    return state


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [each for part in step[inner] for each in _flat(part, inner)]
    return [step]


def _shrinks(normalizer: dict[str, Any] | None) -> int | None:
    """Return how many times shorter a text can become; None without a bound."""
    shrinks = 1
    for step in _flat(normalizer, "normalizers"):
        match step:
            case {"type": "NFC" | "NFD"}:
                shrinks *= COMPOSED
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if len(
                new.encode()
            ) >= len(old.encode()):
                continue
            case {"type": "Prepend"}:
                continue
            case _:
                return None
    return shrinks


def _splits(step: dict[str, Any]) -> bool:
    cuts = step["type"] in ("Split", "Punctuation") and step["behavior"] != "Removed"
    return cuts or step["type"] in _SPLITTERS


def _dropped(model: Any, vocabulary: dict[str, int], *, byte_level: bool) -> bytes | None:
    """Return the bytes that become no token; None if unknown text becomes one token, whatever its length."""
    if not isinstance(model, models.BPE):
        return None
    if byte_level and model.unk_token is None:
        return bytes(byte for byte in OF_TEXT if _shown(byte) not in vocabulary)
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in OF_TEXT):
        return b""
    return None


def _shown(byte: int) -> str:
    """Return the character that a byte-level vocabulary has for a byte.

    It is the byte itself where that is visible, else one from U+0100 on.
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in seen else chr(0x100 + sum(other not in seen for other in range(byte)))
