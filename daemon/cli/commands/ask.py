"""spilld ask: one question, about a text, a session, or nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spilld.errors import InvalidRequest, SpilldError
from spilld.protocol.messages import PRIORITIES

from .connect import add_options, connected
from .sampling import add_sampling, sampling

if TYPE_CHECKING:
    from spilld.client.client import Client
    from spilld.client.generate_options import Options
    from spilld.protocol.messages import Message, SessionInfo, Welcome

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
    """Add the command to the parser."""
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
        "--system",
        metavar="TEXT",
        help="what the model is told before the question (default: what its template says)",
    )
    add_sampling(parser, temperature=0.0)
    parser.add_argument(
        "--priority",
        choices=PRIORITIES,
        default="normal",
        help="beside other requests (default: %(default)s)",
    )
    add_options(parser)


def run(options: argparse.Namespace) -> None:
    """Ask the question, and show the answer."""
    text, question = _asked(options.words)
    with connected(options) as (client, welcome):
        from rich.console import Console

        from spilld.cli.answer import Output, show

        known = _session_info(client, options)
        chat = _is_chat(known, welcome, options)
        if known is not None and options.system is not None:
            print("spilld: the session has begun, so --system is left out", file=sys.stderr)
        system = options.system if known is None else None
        raw = _raw(text, question, options.session is not None)
        output, console = Output(sys.stdout), Console(stderr=True)
        prompt = _messages(text, question, system) if chat else raw
        how: Options = {
            **sampling(options),
            "session": options.session,
            "stop": [] if chat else [RAW_STOP],
            "priority": options.priority,
        }
        with client.generate(prompt, **how) as generation:
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
    """Return the text, if there is one, and the question.

    Raises:
        InvalidRequest: There is no question, or it is not given as one argument.
        SpilldError: A file cannot be read.
    """
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
    """Read a text file, or standard input, for which a terminal shows a prompt.

    Args:
        file: The path, or - for standard input.
        what: What the text is, in a word.
    """
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


def _session_info(client: Client, options: argparse.Namespace) -> SessionInfo | None:
    """Return the session that is asked, if it exists already."""
    if options.session is None:
        return None
    return next((info for info in client.sessions() if info.name == options.session), None)


def _is_chat(known: SessionInfo | None, welcome: Welcome, options: argparse.Namespace) -> bool:
    """Whether to ask by a message: if the session holds messages or, if it is new, the model takes them."""
    if known is not None:
        if known.chat and options.raw:
            raise InvalidRequest(
                f"the session {known.name!r} is a chat: leave --raw out, or take another session"
            )
        return known.chat is True
    chat = welcome.chat is True and not options.raw
    if options.system is not None and not chat:
        why = "with --raw" if options.raw else f"as {welcome.model} has no chat template"
        raise InvalidRequest(f"--system is a message, and none is sent {why}: leave it out")
    return chat


def _messages(text: str | None, question: str, system: str | None) -> list[Message]:
    from spilld.protocol.messages import Message

    first = [] if system is None else [Message(role="system", content=system)]
    return [*first, Message(role="user", content=question if text is None else f"{text}\n\n{question}")]


def _raw(text: str | None, question: str, session: bool) -> str:
    about = f"{text}\n\n" if text is not None else "\n\n" if session else ""
    return about + RAW.format(question=question)
