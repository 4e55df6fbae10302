"""spilld ask: one question, about a text, a session, or nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest, SpilldError
from ..protocol import PRIORITIES
from .connection import add_options, connected

if TYPE_CHECKING:
    from ..client import Client, Message, Welcome

RAW = "Question: {question}\nAnswer:"
RAW_STOP = "\nQuestion:"

DESCRIPTION = """\
Ask one question.

  spilld ask "Who are you?"                     just that
  spilld ask report.txt "Who signed it?"        about a text file; - is standard input
  spilld ask --session report "And when?"       about what the session holds
  echo "Who are you?" | spilld ask              the question from standard input

The model's chat template is used, if it has one. The answer goes to standard output as it is, all else to
standard error.
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "ask",
        help="ask a question, about a text file or without one",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [[FILE] QUESTION]",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="[FILE] QUESTION",
        help="the question, in quotes, after the file that it is about, if any (default: standard input)",
    )
    parser.add_argument(
        "--session", metavar="NAME", help="append to this session, so that more can be asked (default: none)"
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="a plain text, ending in `Answer:`, without the chat template (default: only if there is none)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="the longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: always the likeliest word; more: more varied (default: %(default)g)",
    )
    parser.add_argument(
        "--priority",
        choices=PRIORITIES,
        default="normal",
        help="beside other requests (default: %(default)s)",
    )
    add_options(parser)


def run(options: argparse.Namespace) -> None:
    text, question = _asked(options.words)
    with connected(options) as (client, welcome):
        from rich.console import Console

        from ..answer import Output, show

        chat = _is_chat(client, welcome, options)
        raw = _raw(text, question, options.session is not None)
        output, console = Output(sys.stdout), Console(stderr=True)
        with client.generate(
            _messages(text, question) if chat else raw,
            session=options.session,
            stop=[] if chat else [RAW_STOP],
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            priority=options.priority,
        ) as generation:
            try:
                done = show(generation, output, console)
            finally:
                if output.terminal:
                    output.end_line()
        if done.reason == "length" and console.is_terminal:
            console.print(
                f"[dim](cut at {done.usage.generated_tokens} tokens: --max-tokens)[/]", highlight=False
            )


def _asked(words: list[str]) -> tuple[str | None, str]:
    """The text, if there is one, and the question. Raises InvalidRequest, or SpilldError for a file."""
    if len(words) > 2:
        raise InvalidRequest('a question of several words needs quotes: spilld ask "Who are you?"')
    if not words or words == ["-"]:
        text, question = None, _read("-", "question").strip()
    elif len(words) == 1:
        text, question = None, words[0]
        if Path(question).is_file():
            raise InvalidRequest(f'what about {question}? spilld ask {question} "What is it about?"')
    else:
        text, question = _read(words[0], "text"), words[1]
    if not question.strip():
        raise InvalidRequest("there is no question")
    return text, question


def _read(file: str, what: str) -> str:
    """A text file, or standard input, which whoever types it is told. what: the text is, in a word."""
    name = "standard input" if file == "-" else file
    if file == "-" and sys.stdin.isatty():
        print(f"spilld: type the {what}, then Ctrl-D", file=sys.stderr, flush=True)
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return content.decode()
    except UnicodeDecodeError as error:
        raise SpilldError(f"cannot read {name}: it is not UTF-8 text (byte {error.start})") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SpilldError(
            f'cannot read {name}: {why}; give FILE "QUESTION", or "QUESTION" in quotes'
        ) from error


def _is_chat(client: Client, welcome: Welcome, options: argparse.Namespace) -> bool:
    """Whether to ask by a message: if the session holds some, or, for what is new, the model takes them."""
    if options.session is not None:
        held = next((info for info in client.sessions() if info.name == options.session), None)
        if held is not None and held.chat and options.raw:
            raise InvalidRequest(
                f"the session {held.name!r} is a chat: leave --raw out, or take another session"
            )
        if held is not None:
            return held.chat is True
    return welcome.chat is True and not options.raw


def _messages(text: str | None, question: str) -> list[Message]:
    from ..protocol import Message

    return [Message(role="user", content=question if text is None else f"{text}\n\n{question}")]


def _raw(text: str | None, question: str, session: bool) -> str:
    about = f"{text}\n\n" if text is not None else "\n\n" if session else ""
    return about + RAW.format(question=question)
