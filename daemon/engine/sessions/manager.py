"""Session manager: what requests continue and leave behind, and which KV stays on disk for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spilld.errors import ForeignSession, InvalidRequest
from spilld.kv.attention_span import BLOCK
from spilld.kv.checkpoint import ResumePoint, find_resume_point
from spilld.kv.sequence import KVSequence
from spilld.models.model import Model
from spilld.offload.disk.files.extent import RunKey
from spilld.offload.prefix_cache.block_hash import root
from spilld.offload.store.store import Store
from spilld.protocol.messages import (
    ChangeSession,
    Generate,
    Message,
    SessionInfo,
)
from spilld.requests.request_state import RequestState
from spilld.sessions.idle_contexts import Key
from spilld.sessions.store import Session, SessionStore
from spilld.tokenizer.tokenizer import Tokenizer

OF_A_SESSION = 1
"""Priority of the KV of a named session; that of other requests is 0."""

KEPT_AT_ONCE = 8
"""Sessions whose KV is looked up at a time."""


@dataclass(frozen=True)
class Chat:
    """Makes the prompt of messages that continue a session. Thread-safe; it may take long."""

    tokenizer: Tokenizer
    past: tuple[Message, ...]
    messages: tuple[Message, ...]
    answer: bool
    most: int

    def __call__(self) -> tuple[list[int], list[int]]:
        """Apply the chat template.

        Returns:
            The prompt, and the prompt without the beginning of an answer.

        Raises:
            SpilldError: The template refuses the messages, or they are too long.
        """
        turns = self._tokens(answer=False)
        return (self._tokens(answer=True) if self.answer else turns), turns

    def _tokens(self, *, answer: bool) -> list[int]:
        if self.past:
            return self.tokenizer.chat_append(self.past, self.messages, answer=answer, most=self.most)
        return self.tokenizer.chat(self.messages, answer=answer, most=self.most)


class SessionManager:
    """Knows what sessions contain, and keeps their KV in the tiered store: pinned, or evicted last.

    Attributes:
        store: The sessions on disk.
        context_ttl_s: Lifetime of a kept context, in seconds.
    """

    def __init__(self, store: SessionStore, blocks: Store, model: Model, context_ttl_s: float) -> None:
        self.store = store
        self._blocks = blocks
        self._model = model
        self.context_ttl_s = context_ttl_s
        self._pins: dict[Key, list[RunKey]] = {}
        self._to_keep = dict.fromkeys(store.names())

    def root(self, tenant: str) -> bytes:
        """Return the first value of a tenant's token chains."""
        return root(self._model.fingerprint, self._blocks.layouts.format, tenant.encode())

    def session(self, request: Generate, handle: str | None) -> Session | None:
        """Return the session that a request continues or will leave behind, if any.

        Args:
            request: The client's message.
            handle: Name of the session if the request names none.

        Raises:
            ContextNotFound: The context is unknown.
            ForeignSession: The session is of another model.
        """
        session = self._session(request, handle)
        if session is not None:
            self.refuse_foreign(session)
        return session

    def _session(self, request: Generate, handle: str | None) -> Session | None:
        if request.context is not None:
            return self.store.get(request.tenant, request.context)
        if request.session is not None:
            new = Session(tenant=request.tenant, name=request.session)
            return self.store.find(request.tenant, request.session) or new
        if handle is not None:
            return Session(tenant=request.tenant, name=handle, listed=False, ttl_s=self.context_ttl_s)
        return None

    def refuse_foreign(self, session: Session) -> None:
        """Refuse a session whose tokens are another model's.

        Raises:
            ForeignSession: They are.
        """
        if session.identity not in (b"", self._model.identity):
            raise ForeignSession(
                f"session {session.name!r} is of model {session.model!r}, here is {self._model.name!r}, or "
                "its weights or its tokenizer differ: serve that model again, or begin another session"
            )

    def prompt(self, request: Generate, tokens: list[int], session: Session) -> list[int]:
        """Return a prompt of text or token ids as the session needs it.

        A text that begins a sequence gets the tokens that the model's texts begin with.
        """
        new = request.session is not None and not session.tokens
        if isinstance(request.prompt, str) and new:
            return self._model.tokenizer.begun(tokens)
        return tokens

    def chat(self, request: Generate, session: Session, most: int) -> Chat | None:
        """Return what makes a prompt of messages, of at most `most` tokens; None if there are no messages.

        Raises:
            InvalidRequest: The session holds a raw prompt.
        """
        messages = tuple(part for part in request.prompt if isinstance(part, Message))
        if not messages and (request.prompt or not _unanswered(session.messages)):
            return None
        if session.tokens and session.messages is None:
            raise InvalidRequest("the session holds a raw prompt: append text or tokens, not messages")
        past = (session.messages or ()) if session.tokens else ()
        return Chat(self._model.tokenizer, past, messages, request.max_tokens > 0, most)

    def tokens_after(self, state: RequestState) -> list[int]:
        """Return the tokens of the sequence after a request, ending where the sent text does.

        As long as nothing was sent of an answer to messages, the model's turn has not begun.
        """
        if state.session is None:
            return list(state.tokens)
        prompt = state.prompt
        if state.turns is not None and not state.answered:
            prompt = state.turns
        return [*state.before, *prompt, *state.kept()]

    def after(self, session: Session, state: RequestState, tokens: list[int]) -> Session:
        """Return the session after a request that has left it these tokens."""
        return replace(
            session,
            tokens=tuple(tokens),
            messages=_chat(session, state),
            model=self._model.name,
            identity=self._model.identity,
        )

    def hold(self, session: Session) -> None:
        """See SessionStore.hold; the session's KV on disk gets its priority later."""
        self.store.hold(session)
        self._to_keep[session.key] = None

    def put(self, session: Session) -> None:
        """See SessionStore.put; the session's KV on disk gets its priority later."""
        self.store.put(session)
        self._to_keep[session.key] = None

    def stored(self, session: Session) -> ResumePoint | None:
        """Return up to where the session's KV is on disk, None if none is."""
        return self.find(session.tenant, session.tokens)

    def find(self, tenant: str, tokens: Sequence[int]) -> ResumePoint | None:
        """Return up to where these tokens' KV is on disk, None if none is."""
        exactly = bool(self._model.geometry.states)
        return find_resume_point(self._blocks, self.root(tenant), tokens, exactly=exactly)

    def change(self, request: ChangeSession) -> Session:
        """Fork, rename, pin, unpin or expire a session.

        Returns:
            The session afterwards.

        Raises:
            ContextNotFound: There is no such session.
            InvalidRequest: The change is invalid.
        """
        tenant, name, into = request.tenant, request.session, request.into
        match request.action:
            case "fork":
                self.store.fork(tenant, name, _given(request.action, into), request.tokens)
            case "rename":
                self.store.rename(tenant, name, _given(request.action, into))
                self._unpin((tenant, name))
            case "pin" | "unpin":
                ttl_s = self.store.get(tenant, name).ttl_s
                self.store.keep(tenant, name, pinned=request.action == "pin", ttl_s=ttl_s)
                self._unpin((tenant, name))
            case "expire":
                self.store.keep(tenant, name, pinned=self.store.get(tenant, name).pinned, ttl_s=request.ttl_s)
        session = self.store.get(tenant, into if into and request.action in ("fork", "rename") else name)
        self._to_keep[session.key] = None
        return session

    def forget(self, key: Key) -> None:
        """Delete a session.

        KV that it shares with another is evicted like that of requests until the other is used again.

        Raises:
            ContextNotFound: There is no such session.
        """
        runs = self._runs(self.store.get(*key))
        self.store.delete(*key)
        self._unpin(key)
        self._blocks.prioritise(runs, 0)

    def info(self, session: Session, in_use: tuple[KVSequence | None, bool]) -> SessionInfo:
        """Return what a client learns of a session.

        Args:
            session: Any session.
            in_use: Its sequence if that is in memory, and whether a request runs on it.
        """
        sequence, running = in_use
        return SessionInfo(
            name=session.name,
            tokens=len(session.tokens),
            kv_bytes=self.kv_bytes(sequence) if sequence else self._stored_bytes(session),
            running=running,
            pinned=session.pinned,
            ttl_s=session.ttl_s,
            created=session.created,
            used=session.used,
            chat=session.messages is not None,
            model=session.model,
        )

    def kv_bytes(self, sequence: KVSequence) -> dict[str, int]:
        """Return bytes of KV by tier: exact tokens on the device, records where they are served from."""
        exact = sequence.computed - (sequence.table.stop - 1) * BLOCK
        token = self._model.geometry.token_numbers * int(self._model.module.dtype.itemsize)
        return {"device": exact * token, **self._blocks.usage(sequence.table)}

    def _stored_bytes(self, session: Session) -> dict[str, int]:
        resume = self.stored(session)
        blocks = sum(ref.count for ref in resume.refs) if resume else 0
        return {"device": 0, "host": 0, "disk": blocks * self._blocks.column_bytes}

    def keep_what_waits(self) -> None:
        """Give the KV of changed sessions its priority, once it is on disk.

        It is evicted after that of requests without a session, or not at all if pinned. Only a few sessions
        are done at a time, as each is looked up block by block.
        """
        if not self._blocks.writing:
            for key in list(self._to_keep)[:KEPT_AT_ONCE]:
                del self._to_keep[key]
                self._keep(key)

    def _keep(self, key: Key) -> None:
        self._unpin(key)
        session = self.store.find(*key)
        if session is None or not (runs := self._runs(session)):
            return
        if session.listed:
            self._blocks.prioritise(runs, OF_A_SESSION)
        if session.pinned:
            self._pins[key] = runs
            self._blocks.pin(runs)

    def _runs(self, session: Session) -> list[RunKey]:
        """Return the runs on disk that hold the session's KV."""
        resume = self.stored(session)
        return resume.runs if resume else []

    def _unpin(self, key: Key) -> None:
        if key in self._pins:
            self._blocks.unpin(self._pins.pop(key))


def _given(action: str, into: str | None) -> str:
    if into is None:
        raise InvalidRequest(f"into is None; allowed: the name that {action} shall give")
    return into


def _unanswered(messages: tuple[Message, ...] | None) -> bool:
    """Return whether the model is to speak next."""
    return messages is not None and len(messages) > 0 and messages[-1].role != "assistant"


def _chat(session: Session, state: RequestState) -> tuple[Message, ...] | None:
    """Return the chat after a request; None once anything but messages went into the session."""
    asked = state.request.prompt
    new = tuple(message for message in asked if isinstance(message, Message))
    if len(new) != len(asked) or (session.tokens and session.messages is None):
        return None
    chat = (*(session.messages or ()), *new)
    if not chat or not state.answered:
        return chat or None
    if chat[-1].role == "assistant":  # the answer continues that message
        chat, text = chat[:-1], chat[-1].content + state.completion.text
    else:
        text = state.completion.text
    return (*chat, Message(role="assistant", content=text))
