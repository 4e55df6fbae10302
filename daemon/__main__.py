"""The command line: spilld serve | ask | chat | sessions | stats | top | keys | check | doctor | demo."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from .config import Config
from .errors import InvalidRequest, SpilldError, Unreachable
from .extra import engine
from .keyring import default_folder, make_client, make_server
from .protocol import PRIORITIES
from .repeats import Repeats

if TYPE_CHECKING:
    from .client import Client


PATIENCE_S = 2.0
"""A running daemon answers sooner; after that a command says what it waits for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status. What the user can mend is said in one line, without a traceback."""
    options = _parser().parse_args(argv)
    try:
        return int(options.run(options) or 0)
    except SpilldError as error:
        print(f"spilld: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spilld", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="run the daemon"))
    _add_ask(commands.add_parser("ask", help="ask a question about a text file"))
    _add_chat(commands.add_parser("chat", help="talk to the model; its context stays in the daemon"))
    _add_sessions(commands.add_parser("sessions", help="list, fork, pin, delete, export or import sessions"))
    _add_stats(commands.add_parser("stats", help="what the daemon is doing, and how full its tiers are"))
    _add_top(commands.add_parser("top", help="the same, live: tiers, requests, tokens a second, stalls"))
    _add_keys(commands.add_parser("keys", help="make the keys by which clients connect from other machines"))
    _add_check(commands.add_parser("check", help="verify what is stored on disk, while no daemon runs"))
    _add_doctor(commands.add_parser("doctor", help="what this machine has, its rates, and what to change"))
    _add_demo(commands.add_parser("demo", help="a long document, most of its KV on disk, two questions"))
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_serve)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML; see systemd/spilld.toml")
    for setting in fields(Config):
        parser.add_argument("--" + setting.name.replace("_", "-"), metavar="VALUE")


def _serve(options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(Repeats())
    faulthandler.enable(2)  # systemd ends a daemon that hangs by SIGABRT: the log then says where it was
    given = {setting.name: _value(getattr(options, setting.name)) for setting in fields(Config)}

    def read() -> Config:
        return Config.load(options.config, given)

    config = read()
    # Torch's threads would else spin between its loops, where those of our kernels compute.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with engine():
        from .assembly import serve

    serve(config, read if options.config else None)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_doctor)
    parser.add_argument("--config", type=Path, metavar="FILE", help="the daemon's; see systemd/spilld.toml")


def _doctor(options: argparse.Namespace) -> None:
    with engine():
        from .doctor import examine

    for finding in examine(Config.load(options.config, {})):
        print(f"{finding.what}: {finding.found}", flush=True)
        if finding.advice:
            print(f"    {finding.advice}", flush=True)


def _value(text: str | None) -> object:
    """An option's value as TOML would have it: a number, true or false, and all else is a string."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return None if text is None else kind(text)
        except ValueError:
            continue
    return text


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="of the daemon; by default its socket in your runtime directory")
    parser.add_argument("--tenant", default="", help="a secret that separates what is stored for you")
    parser.add_argument(
        "--keys",
        type=Path,
        default=os.environ.get("SPILLD_KEYS") or None,
        metavar="FILE",
        help="what `spilld keys --client` made, for a daemon that has keys; by default $SPILLD_KEYS",
    )
    parser.add_argument(
        "--wait", type=float, default=30.0, metavar="SECONDS", help="how long for a daemon that starts"
    )


def _client(options: argparse.Namespace) -> Client:
    from .client import Client

    def connect(timeout: float) -> Client:
        return Client(options.address, tenant=options.tenant, keys=options.keys, connect_timeout=timeout)

    try:
        return connect(min(PATIENCE_S, options.wait))
    except Unreachable as error:
        if options.wait <= PATIENCE_S:
            raise
        print(f"spilld: {error.message}; waiting for {options.wait:g} s", file=sys.stderr)
    return connect(options.wait - PATIENCE_S)


def _add_ask(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_ask)
    _add_address(parser)
    parser.add_argument(
        "file",
        type=Path,
        nargs="?",
        metavar="FILE",
        help="a text file, - for standard input; none: the session",
    )
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--session", metavar="NAME", help="append to this session, so that more can be asked")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--priority", choices=PRIORITIES, default="normal", help="beside others; by default %(default)s"
    )


def _ask(options: argparse.Namespace) -> None:
    from .terminal import ask

    if options.file is None and options.session is None:
        raise InvalidRequest("there is nothing to ask about: give a FILE, a --session, or both")
    text = None if options.file is None else _read(options.file)
    with _client(options) as client:
        ask(
            client,
            text,
            options.question,
            session=options.session,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            priority=options.priority,
        )


def _read(file: Path) -> str:
    if str(file) == "-":
        return sys.stdin.read()
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpilldError(f"cannot read {file}: {error}; give a UTF-8 text file") from error


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_chat)
    _add_address(parser)
    parser.add_argument("--system", help="what the model is told before the first message")
    parser.add_argument("--session", metavar="NAME", help="go on with this session, or begin it")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.7)


def _chat(options: argparse.Namespace) -> None:
    from .terminal import chat

    with _client(options) as client:
        chat(client, options.system, options.session, options.max_tokens, options.temperature)


def _add_sessions(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_sessions)
    _add_address(parser)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="names, tokens, and where the KV lies (without an action, too)")
    for action, what in (
        ("fork", "copy NAME, or its first --tokens tokens, to INTO"),
        ("rename", "call NAME INTO"),
    ):
        chosen = actions.add_parser(action, help=what)
        chosen.add_argument("name", metavar="NAME")
        chosen.add_argument("into", metavar="INTO")
        if action == "fork":
            chosen.add_argument("--tokens", type=int)
    for action, what in (
        ("pin", "keep NAME and its KV on disk"),
        ("unpin", "end that"),
        ("delete", "delete NAME"),
    ):
        actions.add_parser(action, help=what).add_argument("name", metavar="NAME")
    expire = actions.add_parser("expire", help="delete NAME once it was not used for SECONDS")
    expire.add_argument("name", metavar="NAME")
    expire.add_argument("ttl_s", type=float, metavar="SECONDS")
    leaves = actions.add_parser("export", help="write NAME and its KV to a new FILE")
    leaves.add_argument("name", metavar="NAME")
    leaves.add_argument("file", type=Path, metavar="FILE")
    comes = actions.add_parser("import", help="make a session NAME of such a FILE")
    comes.add_argument("file", type=Path, metavar="FILE")
    comes.add_argument("name", metavar="NAME")


def _sessions(options: argparse.Namespace) -> None:
    from .terminal import export_session, import_session, sessions

    if options.action in ("export", "import"):
        move = export_session if options.action == "export" else import_session
        with _client(options) as client:
            move(client, options.name, options.file)
        return
    known = ("into", "tokens", "ttl_s")
    fields = {name: getattr(options, name) for name in known if hasattr(options, name)}
    with _client(options) as client:
        if options.action not in (None, "list"):
            getattr(client, options.action)(options.name, **fields)
        sessions(client)


def _add_stats(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_stats)
    _add_address(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _stats(options: argparse.Namespace) -> None:
    from .terminal import stats

    with _client(options) as client:
        stats(client, options.json)


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_top)
    _add_address(parser)
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="how often to look")
    parser.add_argument("--once", action="store_true", help="look twice, print what was seen, and end")


def _top(options: argparse.Namespace) -> None:
    from .top import top

    if not options.every > 0:
        raise InvalidRequest(f"--every is {options.every:g}; allowed: seconds above 0")
    with _client(options) as client:
        top(client, options.every, options.once)


def _add_keys(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_keys)
    parser.add_argument("--client", metavar="NAME", help="a key for this client, not the daemon's")
    parser.add_argument("--tenant", help="whose sessions the client has; by default nobody else's")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="by default %(default)s")


def _keys(options: argparse.Namespace) -> None:
    if options.client is None:
        made = make_server(options.folder)
        print(f'{made}: the daemon\'s key. Set `keys = "{options.folder}"` in its configuration,')
        print("and authorise clients by `spilld keys --client NAME`")
    else:
        made = make_client(options.folder, options.client, options.tenant)
        print(f"{made}: the key of {options.client}, who may connect from now on. Take the file, unseen, to")
        print(f"where the client is, and there: `spilld ask --address tcp://HOST:PORT --keys {made.name}`")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_check)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML, for its `state`")
    parser.add_argument("--state", metavar="FOLDER", help="the state folder; by default the daemon's")
    parser.add_argument("--repair", action="store_true", help="forget what is damaged: it is computed again")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _check(options: argparse.Namespace) -> int:
    from .terminal import check

    config = Config.load(options.config, {"state": options.state})
    return 0 if check(config.state / "kv", options.repair, options.json) else 1


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_demo)
    parser.add_argument("--tokens", type=int, default=7600, help="length of the document's context")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--verify", action="store_true", help="compare with plain transformers in float32")


def _demo(options: argparse.Namespace) -> int:
    with engine():
        from .demo import demo

    return demo(options.tokens, options.json, options.verify)


if __name__ == "__main__":
    sys.exit(main())
