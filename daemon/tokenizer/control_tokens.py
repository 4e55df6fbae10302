"""Control tokens in texts: those that a chat template writes count, those in messages are plain text.

In a text on its way to the tokenizer each control token has a stand-in, a string that no client can know;
what looks like a control token there is plain text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from typing import Any

PIECE = 1 << 16
"""Characters that are searched at a time: no other thread runs meanwhile."""

_PRIVATE = frozenset(map(chr, range(0xE000, 0xF900)))
"""Characters of private use. They have no case, are no space, and no template knows them."""


class Marks:
    """Two characters around each control token in messages, kept by whatever a template does to the text."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Choose marks for a rendering of these texts, in which they do not occur."""
        used = set[str]().union(*texts)
        self.begin, self.end, self.tag = random.sample(sorted(_PRIVATE - used), 3)

    def on_left(self, text: str, index: int) -> bool:
        """Whether the begin mark ends at this index of a text."""
        return text.endswith((self.begin, _escaped(self.begin)), 0, index)

    def on_right(self, text: str, index: int) -> bool:
        """Whether the end mark begins at this index of a text."""
        return text.startswith((self.end, _escaped(self.end)), index)

    def remove_tag(self, text: str) -> str:
        """Remove each tag with the space behind it, where a template wrote the message twice."""
        return text.replace(self.tag + " ", "").replace(_escaped(self.tag) + " ", "")

    def remove(self, text: str) -> str:
        """Remove the marks, also where a template wrote a text as JSON or as a Python literal."""
        for mark in (self.begin, self.end):
            text = text.replace(mark, "").replace(_escaped(mark), "")
        return text


def _escaped(mark: str) -> str:
    return f"\\u{ord(mark):04x}"


class ControlTokens:
    """The control tokens of a vocabulary, each with its stand-in."""

    def __init__(self, stand_ins: Mapping[str, str]) -> None:
        """Compile the patterns that find control tokens.

        Args:
            stand_ins: The stand-in of each control token.
        """
        self._stand_ins = stand_ins
        self._longest = max(map(len, stand_ins), default=0)
        expression = _any_of(stand_ins)
        self._pattern = re.compile(expression)
        self._in_any_case = re.compile(expression, re.IGNORECASE)

    def parse(self, text: str) -> str:
        """Replace every control token in a text by its stand-in."""
        parts, at = [], 0
        while at < len(text):
            found = self._pattern.search(text, at, at + PIECE + self._longest)
            if found is None or found.start() >= at + PIECE:
                parts.append(text[at : at + PIECE])
                at += PIECE
            else:
                parts += text[at : found.start()], self._stand_ins[found[0]]
                at = found.end()
        return "".join(parts)

    def mark(self, text: str, marks: Marks) -> str:
        """Put marks around the control tokens in a message, in upper and lower case.

        A template may change the case.
        """
        return self._in_any_case.sub(lambda found: marks.begin + found[0] + marks.end, text)

    def settle(self, text: str, marks: Marks) -> str:
        """Turn a rendering of marked texts into a prompt.

        The control tokens that the template wrote become stand-ins; those with marks stay text, without the
        marks.
        """

        def settled(found: re.Match[str]) -> str:
            written = marks.on_left(text, found.start()) or marks.on_right(text, found.end())
            return found[0] if written else self._stand_ins[found[0]]

        return marks.remove(self._pattern.sub(settled, text))


def _any_of(names: Iterable[str]) -> str:
    """Make a regular expression for the longest of these names, as a trie: there may be thousands."""
    trie: dict[str, Any] = {}
    for name in names:
        node = trie
        for character in name:
            node = node.setdefault(character, {})
        node[""] = {}
    return _expression(trie) or "(?!)"  # without names it matches nowhere


def _expression(node: Mapping[str, Any]) -> str:
    branches = [re.escape(character) + _expression(after) for character, after in node.items() if character]
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
    return joined + ("?" if "" in node else "")
