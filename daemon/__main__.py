"""The command line: spilld serve | ask | chat | stats | demo."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from .config import Config
from .errors import SpilldError


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
    _add_stats(commands.add_parser("stats", help="what the daemon is doing, and how full its tiers are"))
    _add_demo(commands.add_parser("demo", help="a long document, most of its KV on disk, two questions"))
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_serve)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML; see systemd/spilld.toml")
    for setting in fields(Config):
        parser.add_argument("--" + setting.name.replace("_", "-"), metavar="VALUE")


def _serve(options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = Config.load(options.config, {s.name: _number(getattr(options, s.name)) for s in fields(Config)})
    from .assembly import serve  # loads torch, which the client commands do without

    serve(config)


def _number(text: str | None) -> object:
    """An option's value as TOML would have it: numbers are numbers, all else is a string."""
    for kind in (int, float):
        try:
            return None if text is None else kind(text)
        except ValueError:
            continue
    return text


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="of the daemon; by default its socket in your runtime directory")


def _add_ask(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_ask)
    _add_address(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="a text file, or - for standard input")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)


def _ask(options: argparse.Namespace) -> None:
    from .terminal import ask

    text = sys.stdin.read() if str(options.file) == "-" else _read(options.file)
    ask(options.address, text, options.question, options.max_tokens, options.temperature)


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpilldError(f"cannot read {file}: {error}; give a UTF-8 text file") from error


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_chat)
    _add_address(parser)
    parser.add_argument("--system", help="what the model is told before the first message")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.7)


def _chat(options: argparse.Namespace) -> None:
    from .terminal import chat

    chat(options.address, options.system, options.max_tokens, options.temperature)


def _add_stats(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_stats)
    _add_address(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _stats(options: argparse.Namespace) -> None:
    from .terminal import stats

    stats(options.address, options.json)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_demo)
    parser.add_argument("--tokens", type=int, default=7600, help="length of the document's context")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--verify", action="store_true", help="compare with plain transformers in float32")


def _demo(options: argparse.Namespace) -> int:
    from .demo import demo

    return demo(options.tokens, options.json, options.verify)


if __name__ == "__main__":
    sys.exit(main())
