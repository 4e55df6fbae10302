"""Text in, tokens out, and back: the tokenizer with its chat template, incremental decoding, stop strings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from .errors import CorruptModel, InvalidRequest

if TYPE_CHECKING:
    from .protocol import Message

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder shows for bytes that are no character, or not one yet."""

CHANGED = (
    "this model's chat template changes earlier turns, so a context cannot be continued: "
    "send the whole conversation without a context"
)


class Tokenizer:
    """A model's tokenizer and chat template.

    tokenizer.json is read as it is: transformers' wrapper costs three times the memory and time.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: str | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        """variables: bos_token and the like, for the template."""
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._template = template
        self._variables = variables or {}
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Raises CorruptModel if the folder has no usable tokenizer."""
        try:
            settings = _json(folder / "tokenizer_config.json")
            backend = _backend(folder)
        except Exception as error:  # tokenizers raises bare Exception for a damaged file
            raise CorruptModel(f"{folder} has no usable tokenizer: {error}") from error
        variables = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in settings.items()
            if key.endswith("_token") and isinstance(value, (str, dict))
        }
        return cls(backend, _template(folder, settings), variables)

    @property
    def eos(self) -> int | None:
        """The tokenizer's own end token."""
        return self._backend.token_to_id(self._variables.get("eos_token", ""))

    @property
    def size(self) -> int:
        """Ids the tokenizer knows; the model may have more."""
        return self._backend.get_vocab_size()

    @property
    def has_template(self) -> bool:
        """Whether it can make a prompt of messages."""
        return self._template is not None

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Token ids of a text. A start token is added iff the tokenizer itself adds one and `start` is true
        (false: the text continues a context)."""
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=start).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest("the text is not valid Unicode (a lone surrogate?)") from error
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self._backend.decode(list(tokens), skip_special_tokens=True)
        return text

    def is_silent(self, token: int) -> bool:
        """Whether a token never shows in text: special, or an id the tokenizer does not know."""
        return token in self._special or self._backend.id_to_token(token) is None

    def chat(self, messages: Sequence[Message], *, answer: bool = True) -> list[int]:
        """Token ids of a conversation up to where the model's answer begins; without `answer` up to the end
        of the last message.

        Raises InvalidRequest if the model has no chat template or its template refuses these messages.
        """
        return self.encode(self._render([_turn(message) for message in messages], answer=answer), start=False)

    def chat_append(
        self, past: Sequence[Message], messages: Sequence[Message], *, answer: bool = True
    ) -> list[int]:
        """Token ids to append to a context that holds `past`: all of it, or, where its last message is the
        model's, all up to the end of what that says. Raises as chat_continue."""
        if past and past[-1].role == "assistant":
            return self.chat_continue(past[:-1], past[-1].content, messages, closed=False, more=answer)
        turns = [_turn(message) for message in past]
        before = self._render(turns, answer=False) if turns else ""
        whole = self._render([*turns, *(_turn(message) for message in messages)], answer=answer)
        if not whole.startswith(before):
            raise InvalidRequest(CHANGED)
        return self.encode(whole[len(before) :], start=False)

    def chat_continue(
        self,
        previous: Sequence[Message],
        answer: str,
        messages: Sequence[Message],
        *,
        closed: bool,
        more: bool = True,
    ) -> list[int]:
        """Token ids to append to a context that holds `previous` and the model's `answer` to it.

        closed: the context's last token already ends the answer's turn; otherwise the first ids returned do.
        more: the model is to answer again. Raises InvalidRequest if the template renders the past otherwise
        once the conversation goes on.
        """
        if not messages:
            return []
        turns = [_turn(message) for message in previous]
        opened = self._render(turns)
        whole = self._render(
            [*turns, {"role": "assistant", "content": answer}, *(_turn(message) for message in messages)],
            answer=more,
        )
        rest = whole[len(opened) :]
        if not rest.startswith(answer):  # templates may strip the answer or set it off by a space
            rest, answer = rest.lstrip(), answer.strip()
        if not whole.startswith(opened) or not rest.startswith(answer):
            raise InvalidRequest(CHANGED)
        tail = self.encode(rest[len(answer) :], start=False)
        return self._without_turn_end(tail) if closed else tail

    def _without_turn_end(self, tail: list[int]) -> list[int]:
        end = next((index for index, token in enumerate(tail) if token in self._special), None)
        if end is None or self.decode(tail[:end]).strip():
            return tail
        return tail[end + 1 :]

    def _render(self, turns: list[dict[str, str]], *, answer: bool = True) -> str:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        if self._template is None:
            raise InvalidRequest("this model has no chat template: send a raw prompt instead of messages")
        try:
            rendered, _ = render_jinja_template(
                conversations=[turns],
                chat_template=self._template,
                add_generation_prompt=answer,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from error
        text: str = rendered[0]
        return text


class Detokenizer:
    """Decodes one answer token by token. Never splits a character.

    The texts pushed out and finish(), joined, are tokenizer.decode(all tokens); except that a run of
    byte-fallback tokens that turns out broken after a whole character of it was shown cannot take that
    character back. A push decodes only the tokens since the last but one that ended a character, so its
    cost does not grow.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        """With the prompt's tokens, the first word keeps the space that some tokenizers would drop."""
        self._tokenizer = tokenizer
        self._window = [token for token in prompt[-16:] if not tokenizer.is_silent(token)]
        self._read = len(self._window)
        self._shown = len(tokenizer.decode(self._window).rstrip(_UNFINISHED))

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        if self._tokenizer.is_silent(token):
            return ""
        self._window.append(token)
        if len(self._window) - self._read > 16 and self._ends_unfinished(self._window[-8:]):
            return ""  # a long run of broken bytes: look at its end only, until it ends
        text = self._tokenizer.decode(self._window)
        if text.endswith(_UNFINISHED):
            return ""
        new = text[self._shown :]
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._shown = len(self._tokenizer.decode(self._window))
        return new

    def finish(self) -> str:
        """What is still held back, with U+FFFD for bytes that never became a character."""
        new = self._tokenizer.decode(self._window)[self._shown :]
        self._window, self._read, self._shown = [], 0, 0
        return new

    def _ends_unfinished(self, tokens: list[int]) -> bool:
        return self._tokenizer.decode(tokens).endswith(_UNFINISHED)


class StopStrings:
    """Cuts a stream of text before the stop string that is complete first.

    Where the text is split into pushes does not matter. Of two stops complete at once the longer counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise InvalidRequest("a stop string must not be empty")
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that can be shown now, the stop string hit). Nothing may be pushed after a hit."""
        held = self._held + text
        hits = [(held.index(stop) + len(stop), stop) for stop in self._stops if stop in held]
        if hits:
            end, hit = min(hits, key=lambda found: found[0])  # min keeps the first, thus the longest
            self._held = ""
            return held[: end - len(hit)], hit
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], None

    def finish(self) -> str:
        """The text held back that turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _turn(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def _backend(folder: Path) -> tokenizers.Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    import transformers

    wrapped = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    backend: tokenizers.Tokenizer = wrapped.backend_tokenizer
    return backend


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, or tokenizer_config.json's entry: a text, or named ones (`default`)."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content
