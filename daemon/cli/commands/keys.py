"""spilld keys: makes the keys of the daemon and its clients."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("keys", help="make the keys by which clients connect from other machines")
    parser.set_defaults(run=run)
    parser.add_argument("--client", metavar="NAME", help="a key for this client (default: the daemon's own)")
    parser.add_argument("--tenant", help="whose sessions the client has (default: nobody else's)")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where they lie (default: /etc/spilld/keys for root, else ~/.config/spilld/keys)",
    )


def run(options: argparse.Namespace) -> None:
    """Make the daemon's key, or a client's."""
    from spilld.auth.keyring import default_folder, make_client, make_server

    folder = options.folder or default_folder()
    if options.client is None:
        made = make_server(folder)
        print(f'{made}: the daemon\'s key. Set `keys = "{folder}"` in its configuration,')
        print("and authorise clients by `spilld keys --client NAME`")
    else:
        made = make_client(folder, options.client, options.tenant)
        print(f"{made}: the key of {options.client}, who may connect from now on. Take the file, unseen, to")
        print(f"where the client is, and there: `spilld ask --address tcp://HOST:PORT --keys {made.name}`")
