"""Serve language models on this machine with contexts larger than its GPU, and talk to them."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from spilld.cli.commands import ask, chat, keys, machine, serve, sessions, watch

from .errors import SpilldError
from .printable import printable

COMMANDS = (serve, ask, chat, sessions, watch, keys, machine)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    What the user can correct is said in one line, without a traceback.

    Returns:
        The exit status of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that its encoding lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    options = make_parser().parse_args(argv)
    try:
        status = int(options.run(options) or 0)
        sys.stdout.flush()
    except BrokenPipeError:  # as of `spilld stats | head -1`
        _lose_output()
        return 128 + signal.SIGPIPE
    except SpilldError as error:
        message = printable(error.message) if sys.stderr.isatty() else error.message
        print(f"spilld: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line, with every command."""
    parser = Parser(
        prog="spilld", description=__doc__, epilog="`spilld COMMAND --help` says what a command takes."
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and end")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add(commands)
    return parser


class Parser(argparse.ArgumentParser):
    """A parser whose commands report unknown arguments themselves.

    The usage that is printed is the command's own, not the whole program's.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See ArgumentParser.parse_known_args; unknown arguments are an error."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown


class Version(argparse.Action):
    """Prints the version, which is looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print the version and exit."""
        from importlib.metadata import version

        print(f"spilld {version('spilld')}")
        parser.exit()


def _lose_output() -> None:
    """Redirect standard output to /dev/null, because its reader is gone.

    What is still buffered would otherwise fail again when the interpreter ends.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
