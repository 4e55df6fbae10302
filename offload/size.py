"""Formatting of a number of bytes for people."""

from __future__ import annotations

import math

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(nbytes: int, *, least: bool = False) -> str:
    """Format a number of bytes with three digits, in the unit that needs the fewest: 1536 is 1.5 KiB.

    Args:
        nbytes: The number.
        least: Whether to round up, for minimum requirements.
    """
    power = min(max(0, nbytes.bit_length() - 1) // 10, len(UNITS) - 1)
    value = nbytes / 2 ** (10 * power)
    places = 0 if power == 0 else max(0, 3 - len(str(int(value))))
    scaled = value * 10**places
    return f"{(math.ceil(scaled) if least else round(scaled)) / 10**places:.15g} {UNITS[power]}"
