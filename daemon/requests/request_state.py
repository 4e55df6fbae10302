"""One request on its way: what it has produced, and the events that tell its client."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as Sequence_

from spilld.errors import SpilldError
from spilld.kv.batch import BatchItem
from spilld.kv.sequence import Sequence
from spilld.offload.disk.files.extent import RunKey
from spilld.protocol.messages import (
    Accepted,
    Done,
    Event,
    Failed,
    Progress,
    PromptLogprob,
    Token,
    Usage,
)
from spilld.runner.sampler import Choice, Sampler
from spilld.scheduler.fair_share import Flow
from spilld.sessions.idle_contexts import Key
from spilld.sessions.journal import Entry
from spilld.sessions.store import Session
from spilld.tokenizer.cut import cut
from spilld.tokenizer.detokenizer import Detokenizer
from spilld.tokenizer.stop_strings import StopStrings
from spilld.tokenizer.tokenizer import Tokenizer

NOBODY = b""
"""The client of a request whose connection is lost."""


class Generation:
    """Collects the output of one request. Its events carry sequence numbers 0, 1, 2, ...

    sequence is what it runs on: one that is being continued, or a new one once it is admitted, which then
    begins with the tokens of `history`. session is what it continues or leaves behind. number is that of its
    entry in the journal. milestone is a tail amid its answer, of no use once there is a later one. queue_s is
    how long it waited for its first step, None before.
    """

    def __init__(self, job: int, client: bytes, entry: Entry) -> None:
        self.job = job
        self.number = 0
        self.request = entry.request
        self.prompt = list(entry.prompt)
        self.turns: list[int] | None = (
            None  # the prompt without the beginning of an answer, if it is messages
        )
        self.handle = entry.handle
        self.sequence: Sequence | None = None
        self.milestone: RunKey | None = None
        self.session: Session | None = None
        self.history: list[int] = []
        self.max_tokens = self.request.max_tokens
        self.recomputed = 0
        self.suspect = False  # a step that it was part of broke: it is computed alone
        self.sampler = Sampler(self.request.sampling, self.request.logprobs)
        self.produced: list[int] = []
        self.prompt_logprobs: list[PromptLogprob] = []
        self.read_bytes = {"device": 0, "host": 0, "disk": 0}
        self.disk_read_bytes = 0
        self.prefetch_hits = 0
        self.prefetch_stalls = 0
        self.stall_s = 0.0
        self.engine_s = 0.0
        self.queue_s: float | None = None
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self.first = 0
        self.told = 0
        self.uncounted = 0  # computed tokens that no event has told of
        self.acknowledged = 0
        self._arrived = self._waits_since = time.monotonic() - (time.time() - entry.arrived)
        self._cached: int | None = None
        self._text: list[str] = []
        self._ends: list[int] = []  # of each token, where the text that it completed ends
        self._whole = False  # all its text was shown, and none held back
        self._stops = StopStrings(self.request.stop)
        self._stopped = False
        self._eos: frozenset[int] = frozenset()
        self.flow = Flow(self.request.tenant or client.hex(), self.request.priority)
        """Whose time it takes: the tenant's, or the connection's that sent it."""
        self.listen(client)

    def listen(self, client: bytes) -> None:
        """Its events go to this client from now on, or to NOBODY."""
        self.client = client
        self._deserted = None if client else time.monotonic()

    @property
    def unread(self) -> bool:
        """Its client has as many events under way as it wants."""
        ahead = self.request.ahead
        return ahead is not None and self.client != NOBODY and self.told - self.acknowledged >= ahead

    @property
    def unheard_s(self) -> float:
        """How long it has had no client."""
        return 0.0 if self._deserted is None else time.monotonic() - self._deserted

    @property
    def waited_s(self) -> float:
        """How long it has waited for its next token: since the last, or since it arrived or was restored."""
        return max(0.0, time.monotonic() - self._waits_since)

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
    def answer(self) -> list[int]:
        """What was produced, as part of the sequence. An end-of-text is none: what is appended later goes on
        before it."""
        return self.produced[:-1] if self._at_eos else self.produced

    @property
    def reason(self) -> str | None:
        """Why nothing more is to be produced."""
        if self._at_eos:
            return "eos"
        if self._stopped:
            return "stop"
        return "length" if len(self.produced) >= self.max_tokens else None

    @property
    def _at_eos(self) -> bool:
        return bool(self.produced) and self.produced[-1] in self._eos

    @property
    def before(self) -> list[int]:
        """What its sequence held before its prompt, once it has started."""
        return self.history if self.sequence is None else self.sequence.tokens[: self.first]

    @property
    def tokens(self) -> list[int]:
        """All of its sequence that is known."""
        before = self.history if self.sequence is None else self.sequence.tokens
        if self.sequence is not None and self.started:
            return before
        return [*before, *self.prompt, *self.answer]

    @property
    def started(self) -> bool:
        """Admitted: its prompt is part of its sequence."""
        return self._cached is not None

    @property
    def wants_prompt(self) -> bool:
        """Log probabilities of its prompt are asked for and not all known."""
        asked = self.request.prompt_logprobs is not None
        return asked and len(self.prompt_logprobs) < len(self.prompt)

    def prepare(
        self, before: Sequence_[int], tokenizer: Tokenizer, eos: frozenset[int], told: Sequence_[Event]
    ) -> None:
        """The answer will follow `before` and the prompt. told: what the last process had said of it."""
        self._eos = frozenset() if self.request.ignore_eos else eos
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, [*before, *self.prompt])
        if told:
            self._waits_since = time.monotonic()
        for event in told:
            self.told = event.seq + 1
            if isinstance(event, Accepted):
                self._cached = event.cached_tokens
            elif isinstance(event, Token):
                self._take(event.token)

    def begin(
        self, first: int, sequence: Sequence, first_token_s: float | None, token_s: float | None
    ) -> list[Event]:
        """The request is admitted; its prompt begins at position `first` of the sequence. What there is to
        tell: nothing, if the last process told it."""
        self.first = first
        if self.wants_prompt and sequence.computed == first:
            self.prompt_logprobs.append(PromptLogprob(token=self.prompt[0], logprob=None))
        if self._cached is not None:
            return []
        self._cached = sequence.computed
        return [
            Accepted(
                request_id=self.request.request_id,
                seq=self.told,
                prompt_tokens=len(self.prompt),
                cached_tokens=self._cached,
                first_token_s=first_token_s,
                token_s=token_s,
            )
        ]

    def restart(self) -> None:
        """Its sequence is computed again from the first token."""
        if self.wants_prompt:
            del self.prompt_logprobs[0 if self.first else 1 :]  # nothing predicts a sequence's first token

    def account(self, part: BatchItem, disk_read: int, stalled_s: float, took_s: float) -> None:
        """A step's cost, or this request's share of it."""
        for tier, count in part.read_bytes.items():
            self.read_bytes[tier] += count
        self.prefetch_hits += part.hits
        self.prefetch_stalls += part.stalls
        self.disk_read_bytes += disk_read
        self.stall_s += stalled_s
        if self.produced:
            self.decode_s += took_s
        else:
            self.prefill_s += took_s

    @property
    def left_s(self) -> float:
        """Until its deadline; below 0 after it."""
        deadline = self.request.deadline_s
        return math.inf if deadline is None else deadline - (time.monotonic() - self._arrived)

    @property
    def text(self) -> str:
        return "".join(self._text)

    def progress(self, sequence: Sequence) -> Event:
        """Tokens of the prefill, which a recomputation starts anew."""
        cached = min(self._cached or 0, sequence.computed)
        done, total = sequence.computed - cached, len(sequence.tokens) - cached
        return Progress(request_id=self.request.request_id, seq=self.told, done=done, total=total)

    def token(self, choice: Choice) -> Event:
        """The event of a sampled token; `reason` says whether it was the last."""
        self._waits_since = time.monotonic()
        return Token(
            request_id=self.request.request_id,
            seq=self.told,
            token=choice.token,
            text=self._take(choice.token),
            logprob=choice.logprob,
            top=choice.top,
        )

    def _take(self, token: int) -> str:
        self.produced.append(token)
        if self._at_eos:
            return ""
        shown = self._detokenizer.push(token)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(shown))
        text, hit = self._stops.push(shown)
        self._stopped = hit is not None
        self._text.append(text)
        return text

    def conclude(self) -> None:
        """No token will come: what was held back is text, be it for a stop or for a character that never
        came."""
        if self._stopped:
            return
        text, hit = self._stops.push(self._detokenizer.finish())
        self._stopped = hit is not None
        self._whole = not self._stopped
        self._text.append(text if hit else text + self._stops.finish())

    @property
    def answered(self) -> bool:
        """There is an answer, if an empty one: it has ended, or some of it was told."""
        return bool(self.text) or (not self.appends and (self._whole or self._stopped))

    def kept(self) -> list[int]:
        """The answer as a session goes on with it: tokens that show what was told of it, and no more."""
        return (
            self.answer
            if self._whole
            else cut(self._tokenizer, [*self.before, *self.prompt], self.answer, self._ends, self.text)
        )

    def done(self, kv_bytes: dict[str, int], form: str, handle: str | None) -> Done:
        """The last event, after `conclude`. form: of the records."""
        wanted = self.request.prompt_logprobs is not None
        return Done(
            request_id=self.request.request_id,
            seq=self.told,
            reason=self.reason or "length",
            text=self.text,
            usage=self._usage(kv_bytes, form),
            context=handle,
            prompt_logprobs=tuple(self.prompt_logprobs) if wanted else None,
        )

    def failed(self, error: SpilldError) -> Event:
        return Failed.because(error, self.request.request_id, self.told)

    def _usage(self, kv_bytes: dict[str, int], form: str) -> Usage:
        queued_s = self.waited_s if self.queue_s is None else self.queue_s
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
            queue_ms=queued_s * 1e3,
            format=form,
            prefetch_hits=self.prefetch_hits,
            prefetch_stalls=self.prefetch_stalls,
            engine_ms=self.engine_s * 1e3,
        )
