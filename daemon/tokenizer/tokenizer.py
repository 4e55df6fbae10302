"""From text and messages to tokens: a model's tokenizer and chat template."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from spilld.errors import CorruptModel, InvalidRequest, PromptTooLong
from spilld.protocol.messages import Message

from .chat_template import ChatTemplate
from .control_tokens import ControlTokens
from .template_process import Mode
from .tokenizer_files import (
    read_backend,
    read_settings,
    read_template,
    special_names,
)
from .vocabulary import bounds

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Settings of a tokenizer that name a special token."""

LONGEST_PROMPT = 1 << 25
"""Characters that a chat template may make, whatever the model takes."""

UNSEEN = 4
"""A template may leave text out, so it is given up to this many times what the model can take."""

CHANGED = (
    "this model's chat template changes earlier turns, so a context cannot be continued: "
    "send the whole conversation without a context"
)


class Tokenizer:
    """A model's tokenizer and chat template.

    tokenizer.json is read as it is: transformers' wrapper costs three times the memory and time. Any thread
    may use it; others run while it tokenises.

    Args:
        backend: The tokenizer; it is changed, and belongs to this object.
        template: The chat template; None for none.
        variables: bos_token and the like, for the template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: str | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._variables = variables or {}
        _make_special(backend, self._variables)
        special = {i: entry for i, entry in backend.get_added_tokens_decoder().items() if entry.special}
        self._special = frozenset(special)
        self._size = backend.get_vocab_size()
        self._start = self._ids("", start=True)
        unknown = backend.token_to_id(getattr(backend.model, "unk_token", None) or "")
        self._control = self._special - {unknown}
        found = bounds(backend)
        stand_ins = _add_stand_ins(backend, special)
        self._meant = {backend.token_to_id(name): token for token, name in stand_ins.items()}
        self._bounds = {
            known: bound and bound.with_token(*stand_ins.values()) for known, bound in found.items()
        }
        names = {special[token].content: name for token, name in stand_ins.items()}
        self._parser = ControlTokens(names)
        self._template = None if template is None else ChatTemplate(template, self._variables, names)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer of a model folder.

        Raises:
            CorruptModel: The folder has no usable tokenizer.
        """
        try:
            settings = read_settings(folder)
            return cls(read_backend(folder), read_template(folder, settings), special_names(settings))
        except Exception as error:  # tokenizers raises bare Exception for a damaged file
            said = " ".join(str(error).split())
            raise CorruptModel(f"{folder} has no usable tokenizer: {said}") from error

    @property
    def eos(self) -> int | None:
        """The tokenizer's own end token."""
        return self._backend.token_to_id(self._variables.get("eos_token", ""))

    @property
    def size(self) -> int:
        """How many ids the tokenizer knows; the model may have more."""
        return self._size

    @property
    def has_template(self) -> bool:
        """Whether it can make a prompt of messages."""
        return self._template is not None

    def start(self) -> None:
        """Start what renders the chat template, so that the first chat need not wait for it."""
        if self._template is not None:
            self._template.start()

    def close(self) -> None:
        """Kill the process that renders the chat template."""
        if self._template is not None:
            self._template.close()

    def encode(
        self, text: str, *, start: bool = True, special: bool = False, most: int | None = None
    ) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: The text.
            start: Whether to add a start token if the tokenizer itself adds one; false where the text
                continues a context.
            special: Whether control tokens that are written in the text are meant as such, a start token too;
                else they are text.
            most: How many tokens are allowed; None for any number. It is checked before the text is
                tokenised, by a bound.

        Raises:
            InvalidRequest: The text is not valid Unicode, or becomes a control token.
            PromptTooLong: The text has certainly more than `most` tokens.
        """
        self._refuse_too_long(text, most, special=special)
        if not special:
            return self._text_ids(text, start=start)
        ids = self._text_ids(self._parser.parse(text), start=start)
        count = len(self._start) if start else 0
        return ids[count:] if ids[count : 2 * count] == self._start else ids

    def begun(self, tokens: list[int]) -> list[int]:
        """Return tokens that begin a context: with the tokenizer's start token, if any, in front.

        It is added only where it is not there yet.
        """
        return tokens if tokens[: len(self._start)] == self._start else self._start + tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        known = [token for token in tokens if token not in self._meant]
        text: str = self._backend.decode(known, skip_special_tokens=True)
        return text

    def is_silent(self, token: int) -> bool:
        """Whether a token never shows in text: a special one, or an id the tokenizer does not know."""
        shown = self._backend.id_to_token(token) is not None and token not in self._meant
        return token in self._special or not shown

    def chat(self, messages: Sequence[Message], *, answer: bool = True, most: int | None = None) -> list[int]:
        """Return the token ids of a conversation.

        If the last message is the assistant's, they end where its content does, so that it may go on. Control
        tokens in messages are text.

        Args:
            messages: The conversation.
            answer: Whether to end where the model's answer begins; else with the last message's turn.
            most: How many tokens are allowed; None for any number.

        Raises:
            InvalidRequest: The model has no chat template, or its template refuses these messages.
            PromptTooLong: As in `encode`.
        """
        return self._template_ids(self._render(messages, answer, most), most)

    def chat_append(
        self,
        past: Sequence[Message],
        messages: Sequence[Message],
        *,
        answer: bool = True,
        most: int | None = None,
    ) -> list[int]:
        """Return token ids to append to a context that holds `past`.

        The context holds all of it, or, where its last message is the model's, all up to the end of that
        message's content.

        Args:
            past: The messages of the context.
            messages: Those to append.
            answer: Whether the model is to answer.
            most: How many tokens are allowed; None for any number.

        Raises:
            SpilldError: As in `chat_continue`.
        """
        if past and past[-1].role == "assistant":
            last = past[-1].content
            return self.chat_continue(past[:-1], last, messages, closed=False, more=answer, most=most)
        before = self._render(past, False, most) if past else ""
        whole = self._render((*past, *messages), answer, most)
        if not whole.startswith(before):
            raise InvalidRequest(CHANGED)
        return self._template_ids(whole[len(before) :], most)

    def chat_continue(
        self,
        previous: Sequence[Message],
        answer: str,
        messages: Sequence[Message],
        *,
        closed: bool,
        more: bool = True,
        most: int | None = None,
    ) -> list[int]:
        """Return token ids to append to a context that holds `previous` and the model's `answer` to it.

        Args:
            previous: The messages before the answer.
            answer: The model's answer.
            messages: Those to append.
            closed: Whether the context's last token already ends the answer's turn; otherwise the first ids
                returned do.
            more: Whether the model is to answer again.
            most: How many tokens are allowed; None for any number.

        Raises:
            InvalidRequest: The template renders the past differently once the conversation goes on; and as in
                `chat`.
            PromptTooLong: As in `encode`.
        """
        if not messages:
            return []
        opened = self._render(previous, True, most)
        whole = self._render((*previous, Message(role="assistant", content=answer), *messages), more, most)
        rest = whole[len(opened) :]
        if not rest.startswith(answer):  # templates may strip the answer or set it off by a space
            rest, answer = rest.lstrip(), answer.strip()
        if not whole.startswith(opened) or not rest.startswith(answer):
            raise InvalidRequest(CHANGED)
        ids = self._template_ids(rest[len(answer) :], most)
        return self._without_turn_end(ids) if closed else ids

    def _without_turn_end(self, ids: list[int]) -> list[int]:
        end = next((index for index, token in enumerate(ids) if token in self._special), None)
        if end is None or self.decode(ids[:end]).strip():
            return ids
        return ids[end + 1 :]

    def _template_ids(self, text: str, most: int | None) -> list[int]:
        self._refuse_too_long(text, most, special=True)
        return self._text_ids(text, start=False)

    def _render(self, messages: Sequence[Message], answer: bool, most: int | None) -> str:
        """Render messages, with stand-ins for the template's control tokens."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template: send a raw prompt instead of messages")
        mode: Mode = "answer" if answer else "turns"
        if messages and messages[-1].role == "assistant":
            mode = "continue"
        turns = [(message.role, message.content) for message in messages]
        room = self._room(most)
        written = sum(len(role) + len(content) for role, content in turns)
        if most is not None and (len(turns) > most or written > UNSEEN * room):
            raise PromptTooLong(
                f"{len(turns)} messages of {written} characters; of this model, whose context has {most} "
                f"tokens, its chat template is given at most {most} messages of {UNSEEN * room} characters"
            )
        return self._template.render(turns, mode, room)

    def _room(self, most: int | None) -> int:
        """Return how many characters a prompt of `most` tokens can have."""
        bound = self._bounds[True]
        return LONGEST_PROMPT if most is None or bound is None else min(most * bound.longest, LONGEST_PROMPT)

    def _refuse_too_long(self, text: str, most: int | None, *, special: bool) -> None:
        bound = self._bounds[special]
        if most is not None and bound is not None and bound.exceeded(text, most):
            raise PromptTooLong(f"a text of {len(text)} characters has more than {most} tokens of this model")

    def _text_ids(self, text: str, *, start: bool) -> list[int]:
        """Return the token ids of a text in which control tokens are written by their stand-ins only."""
        ids = self._ids(text, start=start)
        made = self._control.intersection(ids[len(self._start) if start else 0 :])
        if made:
            raise InvalidRequest(
                f"the tokenizer makes {self._backend.id_to_token(min(made))!r}, a control token, of plain "
                "text: leave it out, or send token ids"
            )
        return [self._meant.get(token, token) for token in ids]

    def _ids(self, text: str, *, start: bool) -> list[int]:
        try:  # a batch of one: `encode` holds the GIL, and computes offsets of tokens
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=start)
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest("the text is not valid Unicode (a lone surrogate?)") from error
        ids: list[int] = encoding.ids
        return ids


def _make_special(backend: tokenizers.Tokenizer, variables: dict[str, str]) -> None:
    """Make the tokens that a tokenizer's settings name special ones, as transformers does."""
    named = {variables[key] for key in NAMED if key in variables}
    known = {entry.content for entry in backend.get_added_tokens_decoder().values() if entry.special}
    missing = sorted(name for name in named - known if backend.token_to_id(name) is not None)
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in missing])


def _add_stand_ins(
    backend: tokenizers.Tokenizer, special: dict[int, tokenizers.AddedToken]
) -> dict[int, str]:
    """Add a stand-in for each special token, which the tokenizer then does not look for in texts any more."""
    secret = secrets.token_hex(8)
    stand_ins = {token: f"\U000f0000{secret}{token}\U000f0001" for token in special}
    backend.encode_special_tokens = True
    backend.add_tokens(
        [
            tokenizers.AddedToken(name, normalized=False, lstrip=entry.lstrip, rstrip=entry.rstrip)
            for entry, name in zip(special.values(), stand_ins.values(), strict=True)
        ]
    )
    return stand_ins
