"""One request on its way: what it has produced, and the events that tell its client."""

from __future__ import annotations

import time

from .contexts import Context, Key
from .errors import SpilldError
from .protocol import Accepted, Done, Event, Failed, Generate, Progress, PromptLogprob, Token, Usage
from .sampler import Choice, Sampler
from .sequence import Sequence
from .sessions import Session
from .text import Detokenizer, StopStrings, Tokenizer


class Generation:
    """Collects the output of one request. Its events carry sequence numbers 0, 1, 2, ...

    context is the context it runs on: one that is being continued, or a new one once it is admitted, which
    then begins with the tokens of `history`. session is what it continues or leaves behind.
    """

    def __init__(self, job: int, client: bytes, request: Generate, prompt: list[int]) -> None:
        self.job = job
        self.client = client
        self.request = request
        self.prompt = prompt
        self.context: Context | None = None
        self.session: Session | None = None
        self.history: list[int] = []
        self.max_tokens = request.max_tokens
        self.recomputed = 0
        self.sampler = Sampler(request.sampling, request.logprobs)
        self.produced: list[int] = []
        self.prompt_logprobs: list[PromptLogprob] = []
        self.read_bytes = {"device": 0, "host": 0, "disk": 0}
        self.disk_read_bytes = 0
        self.stall_s = 0.0
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self._arrived = time.monotonic()
        self.first = 0
        self._cached: int | None = None
        self._text: list[str] = []
        self._stops = StopStrings(request.stop)
        self._sent = 0

    @property
    def key(self) -> Key | None:
        """The session that the request names."""
        name = self.request.context or self.request.session
        return None if name is None else (self.request.tenant, name)

    @property
    def appends(self) -> bool:
        """It generates nothing."""
        return self.request.max_tokens == 0

    @property
    def held_back(self) -> int:
        """Tokens at the end that are left to the next request: the last, whose logits that one will need."""
        return int(self.appends)

    def complete(self, sequence: Sequence) -> bool:
        """Everything known is computed."""
        return len(sequence.tokens) - sequence.computed <= self.held_back

    @property
    def started(self) -> bool:
        """Admitted: its prompt is part of its sequence."""
        return self._cached is not None

    def begin(self, first: int, sequence: Sequence, tokenizer: Tokenizer) -> Event:
        """The request is admitted; its prompt begins at position `first` of the sequence."""
        self.first = first
        self._cached = sequence.computed
        self._detokenizer = Detokenizer(tokenizer, sequence.tokens)
        if self.request.prompt_logprobs is not None and sequence.computed == first and self.prompt:
            self.prompt_logprobs.append(PromptLogprob(token=self.prompt[0], logprob=None))
        return Accepted(
            request_id=self.request.request_id,
            seq=self._next(),
            prompt_tokens=len(self.prompt),
            cached_tokens=self._cached,
        )

    def restart(self) -> None:
        """Its sequence is computed again from the first token."""
        if not self.produced:
            del self.prompt_logprobs[0 if self.first else 1 :]  # nothing predicts a sequence's first token

    def account(self, read_bytes: dict[str, int], disk_read: int, stalled_s: float, took_s: float) -> None:
        """A step's cost, or this request's share of it."""
        for tier, count in read_bytes.items():
            self.read_bytes[tier] += count
        self.disk_read_bytes += disk_read
        self.stall_s += stalled_s
        if self.produced:
            self.decode_s += took_s
        else:
            self.prefill_s += took_s

    @property
    def overdue(self) -> bool:
        deadline = self.request.deadline_s
        return deadline is not None and time.monotonic() - self._arrived > deadline

    @property
    def text(self) -> str:
        return "".join(self._text)

    def progress(self, sequence: Sequence) -> Event:
        """Tokens of the prefill, which a recomputation starts anew."""
        cached = min(self._cached or 0, sequence.computed)
        done, total = sequence.computed - cached, len(sequence.tokens) - cached
        return Progress(request_id=self.request.request_id, seq=self._next(), done=done, total=total)

    def token(self, choice: Choice, silent: bool) -> tuple[Event, bool]:
        """The event of a sampled token, and whether it completed a stop string. silent: it has no text."""
        self.produced.append(choice.token)
        text, hit = ("", None) if silent else self._stops.push(self._detokenizer.push(choice.token))
        self._text.append(text)
        event = Token(
            request_id=self.request.request_id,
            seq=self._next(),
            token=choice.token,
            text=text,
            logprob=choice.logprob,
            top=choice.top,
        )
        return event, hit is not None

    def done(self, reason: str, kv_bytes: dict[str, int], handle: str | None) -> Event:
        """The last event. Its text has what was held back for a stop or a character that never came."""
        if reason != "stop":
            text, hit = self._stops.push(self._detokenizer.finish())
            self._text.append(text if hit else text + self._stops.finish())
        wanted = self.request.prompt_logprobs is not None
        return Done(
            request_id=self.request.request_id,
            seq=self._next(),
            reason=reason,
            text=self.text,
            usage=self._usage(kv_bytes),
            context=handle,
            prompt_logprobs=tuple(self.prompt_logprobs) if wanted else None,
        )

    def failed(self, error: SpilldError) -> Event:
        return Failed.because(error, self.request.request_id, self._next())

    def _usage(self, kv_bytes: dict[str, int]) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt),
            generated_tokens=len(self.produced),
            cached_tokens=self._cached or 0,
            read_bytes=self.read_bytes,
            kv_bytes=kv_bytes,
            disk_read_bytes=self.disk_read_bytes,
            stall_ms=self.stall_s * 1e3,
            prefill_ms=self.prefill_s * 1e3,
            decode_ms=self.decode_s * 1e3,
        )

    def _next(self) -> int:
        self._sent += 1
        return self._sent - 1
