"""A conversation that stays in the daemon: `spilld chat`."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from rich.console import Console
from rich.markup import escape

from spilld.client.client import Client, Generation
from spilld.client.generate_options import Options
from spilld.errors import (
    Cancelled,
    ContextNotFound,
    InvalidRequest,
    SpilldError,
    Unreachable,
)
from spilld.printable import printable
from spilld.protocol.messages import (
    Done,
    Message,
    SessionInfo,
    Welcome,
)

from .answer import Output, show

QUOTES = '"""'
"""Before and after a message of several lines."""

FAREWELLS = ("/bye", "/exit")

HELP = (
    f"{QUOTES} begins and ends a message of several lines, Ctrl-C stops an answer, Ctrl-D or /bye the chat."
)


class Conversation:
    """Messages and answers, in a session or, without one, in a context that is released at the end.

    The daemon is asked what it holds of the conversation: only what it does not hold is sent.
    """

    def __init__(self, client: Client, session: str | None, system: str | None, options: Options) -> None:
        self._client = client
        self._session = session
        self._context: str | None = None
        self._said = [Message(role="system", content=system)] if system else []
        self._options = options
        self._output = Output(sys.stdout)
        self._console = Console(stderr=True)

    def session_info(self) -> SessionInfo | None:
        """Return its session, if that exists already."""
        return next((info for info in self._client.sessions() if info.name == self._session), None)

    def say(self, line: str) -> None:
        """Send a message and show the answer.

        Ctrl-C stops it. A message that cannot be answered is not part of the conversation: the reason is
        shown.

        Raises:
            Unreachable: No daemon answers.
        """
        message = Message(role="user", content=line)
        new = [message] if self._goes_on() else [*self._said, message]
        try:
            try:
                self._answer(message, new)
            except ContextNotFound:  # it has expired: all messages are still here, so send them again
                self._context = None
                self._answer(message, [*self._said, message])
        except Unreachable:
            raise
        except SpilldError as error:
            self.note(f"{error.message}. This message is left out; the conversation goes on.")

    def close(self) -> None:
        """Release its context, if the daemon can be reached."""
        if self._context is not None:
            with suppress(Unreachable, ContextNotFound):
                self._client.release(self._context)

    def _goes_on(self) -> bool:
        """Whether the daemon has what was said so far."""
        return self._context is not None if self._session is None else self.session_info() is not None

    def _answer(self, message: Message, new: list[Message]) -> None:
        options: Options = {
            **self._options,
            "session": self._session,
            "context": self._context,
            "keep": self._session is None,
        }
        with self._client.generate(new, **options) as generation:
            try:
                done: Done | None = show(generation, self._output, self._console)
            except KeyboardInterrupt:
                done = self._stop(generation)
            finally:
                self._output.end_line()
        if done is not None and self._session is None:
            self._context = done.context
        if generation.begun:  # then the daemon has the message, and what was answered
            text = generation.text_so_far
            self._said += [message, Message(role="assistant", content=text)]
        if done is None:
            self.note("(stopped)" if generation.begun else "(stopped before it was read)")
        elif done.reason == "length":
            self.note(f"(cut at {done.usage.generated_tokens} tokens: --max-tokens)")

    def _stop(self, generation: Generation) -> Done | None:
        """Cancel it, and wait for the daemon's reply: None unless it was done before."""
        generation.cancel()
        with suppress(Cancelled):
            for _ in generation:
                continue
            return generation.result
        return None

    def note(self, what: str) -> None:
        """Print a remark beside the conversation."""
        self._console.print(f"[dim]{escape(printable(what))}[/]", highlight=False)


def chat(
    client: Client,
    welcome: Welcome,
    reach: Callable[[], None],
    *,
    session: str | None,
    system: str | None,
    options: Options,
) -> None:
    """Talk until the input ends.

    Args:
        client: A connected client.
        welcome: What its daemon serves.
        reach: Waits for a daemon that is gone; raises Unreachable.
        session: The session's name; None for a context that is not kept.
        system: The system message; None for none.
        options: Options of `generate` for every answer.

    Raises:
        InvalidRequest: The model or the session takes no messages; raised before the first.
        Unreachable: No daemon answers, and standard input or output is not a terminal.
    """
    if welcome.chat is False:
        raise InvalidRequest(
            f"{welcome.model} has no chat template: it goes on with texts and answers no messages. Use "
            "`spilld ask`, or serve a model that was made for chats (often called -Instruct or -it)"
        )
    conversation = Conversation(client, session, system, options)
    known = conversation.session_info() if session is not None else None
    if known is not None and known.chat is False:
        raise InvalidRequest(
            f"the session {session!r} holds a text, not a chat: go on with `spilld ask --session {session}`, "
            "or give another name"
        )
    talking = sys.stdin.isatty() and sys.stdout.isatty()
    if talking:
        begun = f"; session {session} goes on after {known.tokens:,} tokens" if known is not None else ""
        print(printable(f"{welcome.model}{begun}. {HELP}"))
    if known is not None and system is not None:
        print("spilld: the session has begun, so --system is left out", file=sys.stderr)
    for message in _messages("> " if talking else ""):
        try:
            reach()
            conversation.say(message)
        except KeyboardInterrupt:  # before there was an answer to stop
            if not talking:
                raise
            conversation.note("(stopped before it was read)")
        except Unreachable:
            if not talking:
                raise
            conversation.note(
                f"This message is left out: no daemon answers at {client.address}. The chat goes on once one "
                "does."
            )
    conversation.close()


def _messages(prompt: str) -> Iterator[str]:
    """Yield what is typed or pasted, until a farewell or the end of the input.

    Raises:
        SpilldError: The input is not UTF-8.
    """
    if prompt:
        with suppress(ImportError):
            import readline  # input() then has editing and a history

            readline.parse_and_bind("set enable-bracketed-paste on")  # a paste is one input()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    while True:
        try:
            typed = input(prompt).strip()
            message = _quoted(typed, prompt and ". ") if typed.startswith(QUOTES) else typed
        except KeyboardInterrupt:
            if not prompt:
                raise
            print("\n(Ctrl-D ends the chat)")
            continue
        except EOFError:
            if prompt:
                print()
            return
        except UnicodeDecodeError as error:
            raise SpilldError("standard input is not UTF-8") from error
        if typed in FAREWELLS:
            return
        if typed in ("/help", "/?"):
            print(HELP)
        elif message:
            yield message


def _quoted(typed: str, prompt: str) -> str:
    """Read a message between quotes that begins with `typed`; it ends where the input ends, too."""
    text = typed.removeprefix(QUOTES)
    while not text.rstrip().endswith(QUOTES):
        try:
            text += "\n" + input(prompt)
        except EOFError:
            break
    return text.rstrip().removesuffix(QUOTES).strip()
