"""Texts from outside, made safe to print on a terminal."""

from __future__ import annotations

import re

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal may take for a command: all control characters but tab and newline."""


def printable(text: str) -> str:
    r"""Write control characters as escapes, such as \x1b."""
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
