"""Renders a model folder's chat template, which is not trusted, in a process with limits.

Its time and memory are limited. `ChatTemplate` talks to it over its standard input. A message is 8 bytes of
length, big-endian, and a msgpack map. The first is the arguments of Renderer; every other is answered by a
map with `text`, or `error` and `message`.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Literal

import jinja2
import jinja2.ext
import msgpack
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .control_tokens import ControlTokens, Marks

MEMORY_BYTES = 1 << 30
CPU_S = 2
"""Seconds of computing that a rendering may take, and one more for each MiB that it is given."""

HEADER_BYTES = 8

Mode = Literal["answer", "turns", "continue"]
"""Up to where an answer begins; whole turns only; up to the end of the last message, which is to go on."""


class TooLong(Exception):
    """The template makes more text than is allowed."""


class Renderer:
    """A chat template with the values that do not change.

    It renders what transformers' `apply_chat_template` does.

    Args:
        source: The template.
        variables: Values that it may use, such as bos_token.
        control: The stand-in of each control token.
    """

    def __init__(self, source: str, variables: Mapping[str, str], control: Mapping[str, str]) -> None:
        self._source = source
        self._variables = variables
        self._control = ControlTokens(control)
        self._template: jinja2.Template | None = None
        self._marks = Marks(())

    def render(self, turns: Sequence[tuple[str, str]], mode: Mode, most: int) -> str:
        """Make the prompt of a conversation, in which every control token of the template has its stand-in.

        Args:
            turns: (role, content) of each message.
            mode: Where the prompt ends.
            most: How many characters it may have.

        Raises:
            TooLong: The prompt has more.
            Exception: Whatever the template raises.
        """
        marks = self._marks = Marks(part for turn in turns for part in turn)
        role, content = (self._control.mark(part, marks) for part in turns[-1]) if turns else ("", "")
        chat = [dict(zip(("role", "content"), turn, strict=True)) for turn in self._marked(turns)]
        if mode == "continue":
            chat[-1] = {"role": role, "content": content + marks.tag + " "}
        text = self._run(chat, mode == "answer", most)
        if mode == "continue":
            text = _cut(text, content, marks)
        return self._control.settle(text, marks)

    def _marked(self, turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        return [(self._control.mark(r, self._marks), self._control.mark(c, self._marks)) for r, c in turns]

    def _run(self, messages: list[dict[str, str]], answering: bool, most: int) -> str:
        if self._template is None:
            self._template = self._environment().from_string(self._source)
        parts, length = [], 0
        values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": answering}
        for part in self._template.generate(**values, **self._variables):
            parts.append(part)
            if (length := length + len(part)) > most:
                raise TooLong
        return "".join(parts)

    def _environment(self) -> jinja2.Environment:
        """Make an environment like that of transformers' chat templates."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        return environment


def _cut(text: str, content: str, marks: Marks) -> str:
    """Return what comes before the last tag.

    Templates that strip a message keep the tag, without the space behind it.
    """
    if content.strip() not in text or marks.tag not in text:
        raise ValueError("the last message is not in it as it was written, so it cannot be continued")
    before, _, after = text.rpartition(marks.tag)
    before = marks.remove_tag(before)
    return before if after.startswith(" ") else before.rstrip()


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks the model's part of a chat; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """A dict() without the attributes of the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    def __init__(*args: Any, **values: Any) -> None:
        # `self` may be one of the values
        own = dict(*args[1:], **values)
        for name in own:
            _refuse_private(name)
        Namespace.__init__(args[0], own)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace has no {name!r}: names begin without an underscore"
        )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def answer(renderer: Renderer, request: Mapping[str, Any]) -> dict[str, str]:
    """Make the process's answer to a request."""
    try:
        return {"text": renderer.render(request["turns"], request["mode"], request["most"])}
    except TooLong:
        return {"error": "long", "message": ""}
    except MemoryError:
        return {"error": "memory", "message": ""}
    except jinja2.TemplateSyntaxError as error:
        return {"error": "fails", "message": f"line {error.lineno}: {error.message}"}
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        return {"error": "refuses", "message": str(error)}
    except Exception as error:  # noqa: BLE001 (whatever it is, it is the template's)
        return {"error": "fails", "message": f"{type(error).__name__}: {error}"}


def pack(message: Mapping[str, Any]) -> bytes:
    """Pack a message, with its length in front."""
    body: bytes = msgpack.packb(message, unicode_errors="surrogatepass")
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def unpack(body: bytes) -> Any:
    """Unpack the body of a message."""
    return msgpack.unpackb(body, unicode_errors="surrogatepass")


def receive(link: socket.socket, most: int) -> bytes | None:
    """Receive the body of the next message; None at the end.

    Raises:
        ValueError: It has more than `most` bytes.
    """
    header = _exactly(link, HEADER_BYTES)
    if header is None:
        return None
    if (length := int.from_bytes(header, "big")) > most:
        raise ValueError(f"a message of {length} bytes")
    return _exactly(link, length)


def _exactly(link: socket.socket, count: int) -> bytes | None:
    parts = []
    while count:
        if not (part := link.recv(min(count, 1 << 20))):
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def main() -> None:
    """Render what is asked for until the daemon is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is for the daemon
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    renderer = None
    with suppress(ConnectionError), socket.socket(fileno=0) as link:  # the daemon may be killed
        while (body := receive(link, MEMORY_BYTES)) is not None:
            limit = int(time.process_time()) + 1 + CPU_S + (len(body) >> 20)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            if renderer is None:
                renderer = Renderer(**unpack(body))
            else:
                link.sendall(pack(answer(renderer, unpack(body))))


if __name__ == "__main__":
    main()
