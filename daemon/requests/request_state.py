"""Request state: a request's phase, its sequence, and what it has produced and used."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from enum import Enum

from spilld.errors import SpilldError
from spilld.kv.batch import BatchItem
from spilld.kv.sequence import KVSequence
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
from spilld.runner.sampler import SampledToken, Sampler
from spilld.scheduler.fair_share import Flow
from spilld.scheduler.scheduler import JobId
from spilld.sessions.idle_contexts import Key
from spilld.sessions.journal import JournalEntry
from spilld.sessions.store import Session
from spilld.tokenizer.tokenizer import Tokenizer

from .completion import Completion
from .resource_use import ResourceUse

NO_CLIENT = b""
"""The client of a request whose connection is lost."""


class Phase(Enum):
    """What a request is doing. It moves down this list; a preempted request waits again."""

    BEHIND = "waits for its session, on which another request runs"
    COMPOSING = "its prompt is being made of messages"
    WAITING = "waits in the scheduler's queue"
    RUNNING = "is computed in every step"
    PAUSED = "runs, but is not computed: its client takes no more events for now"
    PREEMPTED = "made room for another: its KV is on disk, or on the way there"
    FINISHED = "has had its last event"


class RequestState:
    """Everything that the engine knows of one request. Its events are numbered 0, 1, 2, ...

    Attributes:
        job: Its number in this process, also the scheduler's.
        journal_id: Its row in the journal; 0 if it has none.
        client: The connection that its events go to, or NO_CLIENT.
        prompt: Token ids; empty until they are made of messages.
        turns: The prompt without the beginning of an answer, if it was made of messages.
        session: The session that it continues or leaves behind.
        history: Tokens that its sequence begins with, while it has no sequence.
        sequence: What it runs on: an idle one that it continues, or a new one from its admission on.
        checkpoint: Window checkpoint amid its answer, of no use once there is a later one.
        saving: While it is preempted, the window checkpoint that is being written.
        first: Position of its prompt in the sequence.
        next_seq: Sequence number of its next event.
        acknowledged: Its client has all events before this sequence number.
        uncounted: Computed tokens that no event has reported.
        parting: Position where a checkpoint is saved on the way, as other sequences begin alike; 0 for none.
        suspect: A step that it was part of failed: it is computed alone from then on.
    """

    def __init__(self, job: JobId, client: bytes, entry: JournalEntry) -> None:
        self.job = job
        self.journal_id = 0
        self.phase = Phase.BEHIND
        self.request = entry.request
        self.handle = entry.handle
        self.prompt = list(entry.prompt)
        self.turns: list[int] | None = None
        self.session: Session | None = None
        self.history: list[int] = []
        self.sequence: KVSequence | None = None
        self.checkpoint: RunKey | None = None
        self.saving: RunKey | None = None
        self.parting = 0
        self.first = 0
        self.next_seq = 0
        self.acknowledged = 0
        self.uncounted = 0
        self.recomputed = 0
        self.suspect = False
        self.sampler = Sampler(self.request.sampling, self.request.logprobs)
        self.completion = Completion(self.request)
        self.prompt_logprobs: list[PromptLogprob] = []
        self.use = ResourceUse()
        self.flow = Flow(self.request.tenant or client.hex(), self.request.priority)
        self._arrived = self._waits_since = time.monotonic() - (time.time() - entry.arrived)
        self._cached: int | None = None
        self.listen(client)

    # The client.

    def listen(self, client: bytes) -> None:
        """Send its events to this client from now on, or to NO_CLIENT."""
        self.client = client
        self._alone_since = None if client else time.monotonic()

    @property
    def unread(self) -> bool:
        """Whether its client has as many events under way as it wants."""
        ahead = self.request.ahead
        return ahead is not None and self.client != NO_CLIENT and self.next_seq - self.acknowledged >= ahead

    @property
    def without_client_s(self) -> float:
        """Seconds for which it has had no client."""
        return 0.0 if self._alone_since is None else time.monotonic() - self._alone_since

    @property
    def waited_s(self) -> float:
        """Seconds since its last token, or since it arrived or was restored."""
        return max(0.0, time.monotonic() - self._waits_since)

    @property
    def left_s(self) -> float:
        """Seconds until its deadline; below 0 after it."""
        deadline = self.request.deadline_s
        return math.inf if deadline is None else deadline - (time.monotonic() - self._arrived)

    # Tokens.

    @property
    def key(self) -> Key | None:
        """The session that the request names."""
        name = self.request.context or self.request.session
        return None if name is None else (self.request.tenant, name)

    @property
    def appends(self) -> bool:
        """Whether it only appends its prompt, and generates nothing."""
        return self.request.max_tokens == 0

    @property
    def held_back(self) -> int:
        """Number of tokens at the end that are left to the next request, which needs the last's logits."""
        return int(self.appends)

    def complete(self, sequence: KVSequence) -> bool:
        """Return whether everything known is computed."""
        return len(sequence.tokens) - sequence.computed <= self.held_back

    @property
    def running_sequence(self) -> KVSequence:
        """The sequence of a request that is known to have one."""
        assert self.sequence is not None
        return self.sequence

    @property
    def before(self) -> list[int]:
        """The tokens of its sequence before its prompt, once it has started."""
        return self.history if self.sequence is None else self.sequence.tokens[: self.first]

    @property
    def tokens(self) -> list[int]:
        """All known tokens of its sequence."""
        before = self.history if self.sequence is None else self.sequence.tokens
        if self.sequence is not None and self.started:
            return before
        return [*before, *self.prompt, *self.completion.in_sequence]

    @property
    def started(self) -> bool:
        """Whether it was admitted once, so that its prompt is part of its sequence."""
        return self._cached is not None

    @property
    def wants_prompt(self) -> bool:
        """Whether log probabilities of its prompt are requested and not all known."""
        asked = self.request.prompt_logprobs is not None
        return asked and len(self.prompt_logprobs) < len(self.prompt)

    @property
    def answered(self) -> bool:
        """Whether it has an answer, which may be empty: it has ended, or some text was sent."""
        return bool(self.completion.text) or (not self.appends and self.completion.ended)

    def kept(self) -> list[int]:
        """Return the tokens of its answer with which a session continues."""
        return self.completion.kept([*self.before, *self.prompt])

    # Events.

    def prepare(
        self, before: Sequence[int], tokenizer: Tokenizer, eos: frozenset[int], sent: Sequence[Event]
    ) -> None:
        """Set what its answer follows, and replay the events that were sent already.

        Args:
            before: Tokens that precede its prompt.
            tokenizer: The model's tokenizer.
            eos: Ids that end a text.
            sent: Its events that the last process has sent.
        """
        self.completion.prepare([*before, *self.prompt], tokenizer, eos)
        if sent:
            self._waits_since = time.monotonic()
        for event in sent:
            self.next_seq = event.seq + 1
            if isinstance(event, Accepted):
                self._cached = event.cached_tokens
            elif isinstance(event, Token):
                self.completion.push(event.token)

    def begin(
        self, first: int, sequence: KVSequence, first_token_s: float | None, token_s: float | None
    ) -> list[Event]:
        """Note its admission.

        Args:
            first: Position of its prompt in the sequence.
            sequence: The sequence that it runs on.
            first_token_s: Expected seconds until its first token, None if unknown.
            token_s: Expected seconds between tokens, None if unknown.

        Returns:
            An Accepted event, unless the last process sent it.
        """
        self.first = first
        if self.wants_prompt and sequence.computed == first:
            self.prompt_logprobs.append(PromptLogprob(token=self.prompt[0], logprob=None))
        if self._cached is not None:
            return []
        self._cached = sequence.computed
        return [
            Accepted(
                request_id=self.request.request_id,
                seq=self.next_seq,
                prompt_tokens=len(self.prompt),
                cached_tokens=self._cached,
                first_token_s=first_token_s,
                token_s=token_s,
            )
        ]

    def restart(self) -> None:
        """Note that its sequence is computed again from the first token."""
        if self.wants_prompt:
            del self.prompt_logprobs[0 if self.first else 1 :]  # nothing predicts a sequence's first token

    def progress(self, sequence: KVSequence) -> Event:
        """Return a Progress event: computed tokens of the prefill, which a recomputation starts again."""
        cached = min(self._cached or 0, sequence.computed)
        done, total = sequence.computed - cached, len(sequence.tokens) - cached
        return Progress(request_id=self.request.request_id, seq=self.next_seq, done=done, total=total)

    def token(self, choice: SampledToken) -> Event:
        """Take a sampled token, and return its event.

        Afterwards `completion.reason` says whether it was the last.
        """
        self._waits_since = time.monotonic()
        return Token(
            request_id=self.request.request_id,
            seq=self.next_seq,
            token=choice.token,
            text=self.completion.push(choice.token),
            logprob=choice.logprob,
            top=choice.top,
        )

    def done(self, kv_bytes: dict[str, int], form: str, handle: str | None) -> Done:
        """Return the last event of a request whose completion was concluded.

        Args:
            kv_bytes: Bytes of its KV by tier.
            form: Format of its records.
            handle: Name of the session or context that it leaves.
        """
        wanted = self.request.prompt_logprobs is not None
        return Done(
            request_id=self.request.request_id,
            seq=self.next_seq,
            reason=self.completion.reason or "length",
            text=self.completion.text,
            usage=self._usage(kv_bytes, form),
            context=handle,
            prompt_logprobs=tuple(self.prompt_logprobs) if wanted else None,
        )

    def failed(self, error: SpilldError) -> Event:
        """Return the last event of a request that failed."""
        return Failed.because(error, self.request.request_id, self.next_seq)

    def account(self, part: BatchItem, disk_read: int, stalled_s: float, took_s: float) -> None:
        """Count its part of a step, and its share of the step's cost."""
        self.use.add(part, disk_read, stalled_s, took_s, decoding=bool(self.completion.tokens))

    def _usage(self, kv_bytes: dict[str, int], form: str) -> Usage:
        use = self.use
        queued_s = self.waited_s if use.queue_s is None else use.queue_s
        return Usage(
            prompt_tokens=len(self.prompt),
            generated_tokens=len(self.completion.tokens),
            cached_tokens=self._cached or 0,
            read_bytes=use.read_bytes,
            kv_bytes=kv_bytes,
            disk_read_bytes=use.disk_read_bytes,
            stall_ms=use.stall_s * 1e3,
            prefill_ms=use.prefill_s * 1e3,
            decode_ms=use.decode_s * 1e3,
            queue_ms=queued_s * 1e3,
            format=form,
            prefetch_hits=use.prefetch_hits,
            prefetch_stalls=use.prefetch_stalls,
            engine_ms=use.engine_s * 1e3,
        )
