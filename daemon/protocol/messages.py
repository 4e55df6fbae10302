"""Protocol version 1: the messages. PROTOCOL.md specifies them, wire.py makes frames of them.

Requests (client to daemon):  Generate, Resume, Acknowledge, Cancel, Release, ListSessions, ChangeSession,
                              Hello, Stats, TransferRequest (ExportSession, OpenTransfer, ReadTransfer,
                              WriteTransfer, ImportSession, CloseTransfer).
Replies (daemon to client):   Event (Accepted, Progress, Token, Done, Failed), Released, Sessions, Welcome,
                              StatsReply, Exported, Piece, Transfer, Imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from spilld.errors import SpilldError, error_for
from spilld.fields import (
    Blob,
    FieldReader,
    Flag,
    Int,
    ListOf,
    LogProb,
    MapOf,
    Maybe,
    OneOf,
    Real,
    Struct,
    Text,
    TupleOf,
)

PROTOCOL = 1
"""The version this side speaks: the last byte of frame 0."""

MAGIC = b"spilld\x00"

MAX_FRAME_BYTES = 16 * 2**20

HEARTBEAT_MS = 5_000
"""How often each side sends the other a ZMTP PING."""

SILENT_MS = 15_000
"""After how long without an answer a peer counts as gone."""

PIECE_BYTES = 4 * 2**20
"""The most that one message carries of an archive."""

TOKEN = Int(0, 2**31 - 1)
HANDLE = Text(1, 128)
TENANT = Text(0, 64)
COUNT = Int(0)

TRANSFER = Text(32, 32)
"""128 random bits in hexadecimal: whoever knows them may use the transfer."""

PRIORITIES = ("low", "normal", "high")

Id = Annotated[str, Text(1, 64)]
Top = tuple[tuple[int, float], ...]
TOP = ListOf(TupleOf((TOKEN, LogProb())), 20)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: Annotated[float, Real(0, 100)] = 0.0
    top_k: Annotated[int, Int(0)] = 0
    top_p: Annotated[float, Real(0, 1, above=True)] = 1.0
    min_p: Annotated[float, Real(0, 1)] = 0.0
    repetition_penalty: Annotated[float, Real(0, above=True)] = 1.0
    seed: Annotated[int | None, Maybe(Int(0, 2**64 - 1))] = None


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: Annotated[str, Text(1, 64)]
    content: Annotated[str, Text()]


class Checked(FieldReader):
    """Takes the prompt as it is: wire.py has read it under its name on the wire."""

    def read(self, value: object, name: str) -> object:
        """Return the value as it is."""
        return value


Prompt = tuple[int, ...] | str | tuple[Message, ...]
"""Token ids, a text, or a chat; on the wire `tokens`, `text` or `messages`."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt. Answered by Accepted, any number of Progress and Token, then Done or Failed.

    Cancelled, overdue or drained after Accepted, it leaves the prompt and the part of the answer that was
    sent in its session; before Accepted, or failed otherwise, it leaves that as it was.

    request_id names it in later connections too, and without keys lets anybody cancel it: 128 random bits.
    """

    request_id: Id
    prompt: Annotated[Prompt, Checked()]
    context: Annotated[str | None, Maybe(HANDLE)] = None
    """Append the prompt to this handle's context. Only then, or with a session, may the prompt be empty."""
    session: Annotated[str | None, Maybe(HANDLE)] = None
    """Append the prompt to the session of this name, which is made if there is none."""
    parse_special: Annotated[bool, Flag()] = False
    """Control tokens that a text spells out, such as <|im_end|>, are meant as such; else they are text."""
    tenant: Annotated[str, TENANT] = ""
    """A secret: nothing that was stored under one can be named, read or noticed under another."""
    keep: Annotated[bool, Flag()] = False
    """Keep the context: Done carries a handle for it."""
    max_tokens: Annotated[int, Int(0)] = 256
    """0 appends the prompt and generates nothing."""
    stop: Annotated[tuple[str, ...], ListOf(Text(1, 256), 16)] = ()
    ignore_eos: Annotated[bool, Flag()] = False
    sampling: Annotated[Sampling, Struct(Sampling)] = Sampling()
    logprobs: Annotated[int | None, Maybe(Int(0, 20))] = None
    """The log probability of each token, and of this many most likely ones."""
    prompt_logprobs: Annotated[int | None, Maybe(Int(0, 20))] = None
    deadline_s: Annotated[float | None, Maybe(Real(0, above=True))] = None
    """Seconds from acceptance."""
    priority: Annotated[str, OneOf(PRIORITIES)] = "normal"
    """How urgent it is beside others: each level gets eight times the engine time of the one below."""
    ahead: Annotated[int | None, Maybe(Int(1))] = None
    """Events that may be sent without being acknowledged; then it pauses. None: any number."""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Send the events of a Generate from next_seq on: the past ones, then those to come.

    It is for after a lost connection or a restart of the daemon. Answered by Failed (code request_not_found)
    if the daemon knows of no such Generate.
    """

    request_id: Id
    tenant: Annotated[str, TENANT] = ""
    next_seq: Annotated[int, COUNT] = 0


@dataclass(frozen=True, kw_only=True)
class Acknowledge:
    """All events of a Generate before next_seq have come, and more may. No reply."""

    request_id: Id
    next_seq: Annotated[int, COUNT]
    tenant: Annotated[str | None, Maybe(TENANT)] = None
    """As for Cancel."""


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """End a Generate, whatever connection it came from.

    Answered by its Failed (code cancelled), or by its Done if that came first.
    """

    request_id: Id
    tenant: Annotated[str | None, Maybe(TENANT)] = None
    """The tenant of the Generate, else nothing happens; with keys that of the key. None: any tenant."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """Give a context handle back. Answered by Released or Failed."""

    request_id: Id
    context: Annotated[str, HANDLE]
    tenant: Annotated[str, TENANT] = ""


@dataclass(frozen=True, kw_only=True)
class ListSessions:
    """List the tenant's sessions. Answered by Sessions."""

    request_id: Id
    tenant: Annotated[str, TENANT] = ""


@dataclass(frozen=True, kw_only=True)
class ChangeSession:
    """Change one session in one way.

    Answered by Sessions, which holds the session as it is then (the new one for fork and rename, none for
    delete), or by Failed.

    fork copies the first `tokens` tokens, or all, to the name `into`; what both have in common is stored
    once. rename gives it the name `into`. pin keeps its KV on disk whatever room is needed; unpin ends that.
    expire deletes it when it has not been used for ttl_s seconds, or never if that is None.
    """

    request_id: Id
    tenant: Annotated[str, TENANT] = ""
    session: Annotated[str, HANDLE]
    action: Annotated[str, OneOf(("fork", "rename", "pin", "unpin", "expire", "delete"))]
    into: Annotated[str | None, Maybe(HANDLE)] = None
    tokens: Annotated[int | None, Maybe(Int(1))] = None
    ttl_s: Annotated[float | None, Maybe(Real(0, above=True))] = None


@dataclass(frozen=True, kw_only=True)
class Hello:
    """Ask what the daemon serves. Answered by Welcome."""

    request_id: Id


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Ask for counters and gauges. Answered by StatsReply."""

    request_id: Id


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A message from the daemon to a client, in answer to a request.

    request_id is that of the request; it is empty in a Failed for a message whose id could not be read. seq
    is 0 for the first reply to a request, then one more for each.
    """

    request_id: Annotated[str, Text(0, 64)]
    seq: Annotated[int, COUNT] = 0


@dataclass(frozen=True, kw_only=True)
class Event(Reply):
    """One step of a Generate."""


@dataclass(frozen=True, kw_only=True)
class Accepted(Event):
    """The request is admitted. cached_tokens of the prompt need no prefill."""

    prompt_tokens: Annotated[int, COUNT]
    cached_tokens: Annotated[int, COUNT]
    first_token_s: Annotated[float | None, Maybe(Real(0))] = None
    """In how many seconds the first token is expected, from now; None as long as no prompt was computed."""
    token_s: Annotated[float | None, Maybe(Real(0))] = None
    """How many seconds each further one is expected to take beside what runs now; None as long as no token
    was computed."""


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """Prefill: `done` of `total` tokens."""

    done: Annotated[int, COUNT]
    total: Annotated[int, COUNT]


@dataclass(frozen=True, kw_only=True)
class Token(Event):
    """One generated token. text may be empty: half a character, or kept back for a stop string."""

    token: Annotated[int, TOKEN]
    text: Annotated[str, Text()]
    logprob: Annotated[float | None, Maybe(LogProb())] = None
    top: Annotated[Top, TOP] = ()
    """The most likely tokens with their log probabilities, best first."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a request took.

    Tiers are device, host and disk. Fields with a default are newer than the others: an older daemon does not
    send them.
    """

    prompt_tokens: Annotated[int, COUNT]
    generated_tokens: Annotated[int, COUNT]
    cached_tokens: Annotated[int, COUNT]
    read_bytes: Annotated[dict[str, int], MapOf(COUNT)]
    """KV bytes attended to, per tier that they came from."""
    kv_bytes: Annotated[dict[str, int], MapOf(COUNT)]
    """Where the KV of the sequence lies at the end, bytes per tier."""
    disk_read_bytes: Annotated[int, COUNT]
    stall_ms: Annotated[float, Real(0)]
    prefill_ms: Annotated[float, Real(0)]
    decode_ms: Annotated[float, Real(0)]
    queue_ms: Annotated[float, Real(0)] = 0.0
    """From its arrival to its first step."""
    format: Annotated[str, Text()] = ""
    """How its KV outside the window is stored."""
    prefetch_hits: Annotated[int, COUNT] = 0
    """Extents from disk that were in memory when attention came to them."""
    prefetch_stalls: Annotated[int, COUNT] = 0
    """Extents that attention had to wait for: stall_ms in all."""
    engine_ms: Annotated[float, Real(0)] = 0.0
    """Its share of the steps that it was part of: what its client was charged."""


@dataclass(frozen=True, kw_only=True)
class PromptLogprob:
    """One prompt token; logprob is None for the first, which nothing predicts."""

    token: Annotated[int, TOKEN]
    logprob: Annotated[float | None, Maybe(LogProb())]
    top: Annotated[Top, TOP] = ()


@dataclass(frozen=True, kw_only=True)
class Done(Event):
    """The last event of a request that was served."""

    reason: Annotated[str, OneOf(("stop", "length", "eos"))]
    text: Annotated[str, Text()]
    usage: Annotated[Usage, Struct(Usage)]
    context: Annotated[str | None, Maybe(HANDLE)] = None
    saved: Annotated[bool, Flag()] = True
    """False: its session or context could not be written to disk. It goes on from memory, and is written once
    that can be done; it is lost if the daemon ends before."""
    prompt_logprobs: Annotated[tuple[PromptLogprob, ...] | None, Maybe(ListOf(Struct(PromptLogprob)))] = None


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """The last event of a request that was not served; code is one of errors.py."""

    code: Annotated[str, Text(1, 64)]
    message: Annotated[str, Text()]
    retryable: Annotated[bool, Flag()]

    @classmethod
    def because(cls, error: SpilldError, request_id: str, seq: int = 0) -> Failed:
        """Make the reply that says that a request failed."""
        return cls(
            request_id=request_id, seq=seq, code=error.code, message=error.message, retryable=error.retryable
        )

    def error(self) -> SpilldError:
        """Make the typed error that the daemon reports."""
        error = error_for(self.code, self.message)
        error.request_id = self.request_id
        return error


@dataclass(frozen=True, kw_only=True)
class Released(Reply):
    """A context was given back."""

    context: Annotated[str, HANDLE]


@dataclass(frozen=True, kw_only=True)
class SessionInfo:
    """A session as it is now. Times are seconds since 1970.

    kv_bytes is its KV in each tier, in bytes. KV that is in no tier (evicted, or never sealed) is computed
    again when the session goes on.
    """

    name: Annotated[str, HANDLE]
    tokens: Annotated[int, COUNT]
    kv_bytes: Annotated[dict[str, int], MapOf(COUNT)]
    running: Annotated[bool, Flag()]
    pinned: Annotated[bool, Flag()]
    ttl_s: Annotated[float | None, Maybe(Real(0))]
    created: Annotated[float, Real(0)]
    used: Annotated[float, Real(0)]
    chat: Annotated[bool | None, Maybe(Flag())] = None
    """Whether it holds messages, which messages go on with; None: an older daemon does not say."""
    model: Annotated[str, Text()] = ""
    """The name of the model that it goes on with; empty where that is not known."""


@dataclass(frozen=True, kw_only=True)
class Sessions(Reply):
    """Sessions, ordered by name."""

    sessions: Annotated[tuple[SessionInfo, ...], ListOf(Struct(SessionInfo))]


@dataclass(frozen=True, kw_only=True)
class Welcome(Reply):
    """What this daemon serves. version is spilld's own; max_context and max_frame_bytes are limits."""

    version: Annotated[str, Text()]
    protocol: Annotated[int, COUNT] = PROTOCOL
    model: Annotated[str, Text()]
    dtype: Annotated[str, Text()]
    format: Annotated[str, Text()]
    formats: Annotated[tuple[str, ...], ListOf(Text())]
    max_context: Annotated[int, COUNT]
    max_frame_bytes: Annotated[int, COUNT] = MAX_FRAME_BYTES
    chat: Annotated[bool | None, Maybe(Flag())] = None
    """Whether the model has a chat template, without which it takes no messages; None: an older daemon does
    not say."""


@dataclass(frozen=True, kw_only=True)
class StatsReply(Reply):
    """Counters and gauges by name."""

    values: Annotated[dict[str, object], MapOf()]


# Archives of sessions.


@dataclass(frozen=True, kw_only=True)
class TransferRequest:
    """A request about an archive, or a piece of one. Each is answered by one reply, or by Failed."""

    request_id: Id


@dataclass(frozen=True, kw_only=True)
class ExportSession(TransferRequest):
    """Make an archive of a session, as it is between two requests. Answered by Exported."""

    session: Annotated[str, HANDLE]
    tenant: Annotated[str, TENANT] = ""


@dataclass(frozen=True, kw_only=True)
class OpenTransfer(TransferRequest):
    """Begin to send an archive of nbytes. Answered by Transfer."""

    nbytes: Annotated[int, COUNT]


@dataclass(frozen=True, kw_only=True)
class ReadTransfer(TransferRequest):
    """Read PIECE_BYTES of an archive from offset on, or what is left. Answered by Piece."""

    transfer: Annotated[str, TRANSFER]
    offset: Annotated[int, COUNT]


@dataclass(frozen=True, kw_only=True)
class WriteTransfer(TransferRequest):
    """Send the next piece of an archive; offset is what was sent before. Answered by Transfer."""

    transfer: Annotated[str, TRANSFER]
    offset: Annotated[int, COUNT]
    data: Annotated[bytes, Blob(PIECE_BYTES)]


@dataclass(frozen=True, kw_only=True)
class ImportSession(TransferRequest):
    """Make a session of the archive that was sent. Answered by Imported; the transfer ends in any case."""

    transfer: Annotated[str, TRANSFER]
    session: Annotated[str, HANDLE]
    tenant: Annotated[str, TENANT] = ""


@dataclass(frozen=True, kw_only=True)
class CloseTransfer(TransferRequest):
    """End a transfer, whole or not. Answered by Transfer."""

    transfer: Annotated[str, TRANSFER]


@dataclass(frozen=True, kw_only=True)
class Exported(Reply):
    """The archive can be read. cached_tokens of its tokens need not be computed where it is imported."""

    transfer: Annotated[str, TRANSFER]
    nbytes: Annotated[int, COUNT]
    tokens: Annotated[int, COUNT]
    cached_tokens: Annotated[int, COUNT]


@dataclass(frozen=True, kw_only=True)
class Piece(Reply):
    """A part of an archive."""

    data: Annotated[bytes, Blob(PIECE_BYTES)]


@dataclass(frozen=True, kw_only=True)
class Transfer(Reply):
    """A transfer, and how many bytes of it were sent."""

    transfer: Annotated[str, TRANSFER]
    nbytes: Annotated[int, COUNT]


@dataclass(frozen=True, kw_only=True)
class Imported(Reply):
    """A session was imported. note: why some KV of the archive will be computed again; empty otherwise."""

    session: Annotated[SessionInfo, Struct(SessionInfo)]
    cached_tokens: Annotated[int, COUNT]
    note: Annotated[str, Text()]


def is_last(reply: Reply) -> bool:
    """Whether no further reply to the same request follows."""
    return not isinstance(reply, Event) or isinstance(reply, Done | Failed)


Request = (
    Generate
    | Resume
    | Acknowledge
    | Cancel
    | Release
    | ListSessions
    | ChangeSession
    | Hello
    | Stats
    | TransferRequest
)

Tenanted = (
    Generate
    | Resume
    | Acknowledge
    | Cancel
    | Release
    | ListSessions
    | ChangeSession
    | ExportSession
    | ImportSession
)
"""The requests that name a tenant."""

REQUESTS: dict[str, type] = {
    "generate": Generate,
    "resume": Resume,
    "cancel": Cancel,
    "acknowledge": Acknowledge,
    "release": Release,
    "list_sessions": ListSessions,
    "change_session": ChangeSession,
    "hello": Hello,
    "stats": Stats,
    "export_session": ExportSession,
    "open_transfer": OpenTransfer,
    "read_transfer": ReadTransfer,
    "write_transfer": WriteTransfer,
    "import_session": ImportSession,
    "close_transfer": CloseTransfer,
}

REPLIES: dict[str, type] = {
    "accepted": Accepted,
    "progress": Progress,
    "token": Token,
    "done": Done,
    "failed": Failed,
    "released": Released,
    "sessions": Sessions,
    "welcome": Welcome,
    "stats_reply": StatsReply,
    "exported": Exported,
    "piece": Piece,
    "transfer": Transfer,
    "imported": Imported,
}

TYPES = REQUESTS | REPLIES
