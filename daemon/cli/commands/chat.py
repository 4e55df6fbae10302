"""spilld chat: a conversation."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from .connect import add_options, connected, reach
from .sampling import add_sampling, sampling


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "chat",
        help="talk to the model",
        description='Talk to the model: a line, a paste, or what is between two """ is a message. Ctrl-C '
        "stops an answer, Ctrl-D or /bye ends the chat, /help says so again. With --session it can be "
        "continued later, else it is forgotten.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--session",
        metavar="NAME",
        help="go on with this session, or begin it (default: none, it is not kept)",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="what the model is told before the first message (default: what its template says)",
    )
    add_sampling(parser, temperature=0.7)
    add_options(parser)


def run(options: argparse.Namespace) -> None:
    """Talk until the input ends."""
    with connected(options) as (client, welcome):
        from spilld.cli.conversation import chat

        chat(
            client,
            welcome,
            partial(reach, client, options.wait),
            session=options.session,
            system=options.system,
            options=sampling(options),
        )
