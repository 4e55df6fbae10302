"""spilld sessions: lists and changes sessions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spilld.errors import ContextNotFound

from .connect import add_options, connected

if TYPE_CHECKING:
    from spilld.client.client import Client


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "sessions",
        help="list, fork, pin, delete, export or import sessions",
        description="List the sessions, or change one; options of the daemon come before the action.",
    )
    parser.set_defaults(run=run)
    add_options(parser)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions")

    def action(name: str, what: str, *arguments: tuple[str, str]) -> argparse.ArgumentParser:
        chosen: argparse.ArgumentParser = actions.add_parser(name, help=what, description=what)
        for argument, meaning in arguments:
            chosen.add_argument(argument, metavar=argument.upper(), help=meaning)
        return chosen

    name, into = ("name", "the session"), ("into", "the new name")
    action("list", "names, tokens, and where the KV lies (without an action, too)")
    action("fork", "copy NAME, or its first tokens, to INTO", name, into).add_argument(
        "--tokens", type=int, metavar="N", help="only the first N (default: all)"
    )
    action("rename", "call NAME INTO", name, into)
    action("pin", "keep NAME and its KV on disk", name)
    action("unpin", "end that", name)
    action("delete", "delete NAME", name)
    action("expire", "delete NAME once it was not used for SECONDS", name).add_argument(
        "ttl_s", type=float, metavar="SECONDS", help="how long"
    )
    action("export", "write NAME and its KV to a new FILE", name).add_argument(
        "file", type=Path, metavar="FILE", help="the file; none may be there"
    )
    comes = actions.add_parser("import", help="make a session NAME of such a FILE")
    comes.add_argument("file", type=Path, metavar="FILE", help="what `export` wrote")
    comes.add_argument("name", metavar="NAME", help="the new session")


def run(options: argparse.Namespace) -> None:
    """List sessions, or change one."""
    with connected(options) as (client, _):
        from spilld.cli.tables import sessions

        try:
            _change(client, options)
        except ContextNotFound:
            raise ContextNotFound(
                f"there is no session {options.name!r}: `spilld sessions` lists them"
            ) from None
        if options.action not in ("export", "import"):
            sessions(client)


def _change(client: Client, options: argparse.Namespace) -> None:
    """Do what is asked, if anything.

    Raises:
        ContextNotFound: There is no such session.
    """
    from spilld.cli.tables import export_session, import_session

    if options.action in ("export", "import"):
        move = export_session if options.action == "export" else import_session
        move(client, options.name, options.file)
    elif options.action not in (None, "list"):
        known = ("into", "tokens", "ttl_s")
        fields = {name: getattr(options, name) for name in known if hasattr(options, name)}
        getattr(client, options.action)(options.name, **fields)
