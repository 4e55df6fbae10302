"""Options of every command that asks for an answer: how it is sampled, how long it may be."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spilld.client.generate_options import Options


def add_sampling(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Add the options to a parser.

    Args:
        parser: The command's.
        temperature: The command's default.
    """
    parser.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="the longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="0: always the likeliest word; more: more varied (default: %(default)g)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="choose among the likeliest that have this probability together (default: %(default)g, all)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="choose among the K likeliest (default: %(default)s, all)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="choose the same again as with this seed (default: by chance)"
    )


def sampling(given: argparse.Namespace) -> Options:
    """Return the given options as those of `generate`."""
    return {
        "max_tokens": given.max_tokens,
        "temperature": given.temperature,
        "top_p": given.top_p,
        "top_k": given.top_k,
        "seed": given.seed,
    }
