"""The client's side of the conversation, without a socket: ids, queues, sequence numbers, deadlines.

Link moves frames between a socket and this, Client and AsyncClient wait. Times are time.monotonic() seconds.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from spilld.errors import (
    AccessDenied,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    ProtocolError,
    RequestNotFound,
    SpilldError,
    Unreachable,
)
from spilld.fields import FieldError, Struct, readers
from spilld.protocol.messages import (
    Accepted,
    Acknowledge,
    Cancel,
    ChangeSession,
    Done,
    Event,
    Failed,
    Generate,
    Message,
    Prompt,
    Reply,
    Request,
    Resume,
    Sampling,
    Token,
)
from spilld.protocol.wire import decode, encode

FRESH_S = 1.0
"""How long it counts that an attempt to connect was ended: others follow within a fifth of that."""

LAST_WORDS_S = 0.1
"""How long what a daemon sent before it went away may still be under way inside libzmq."""

AHEAD = 256
"""Events that the daemon may send without knowing that they came."""

ACKNOWLEDGED = 64
"""So many events are acknowledged at a time."""

KEPT = 16384
"""Events of a call that nobody takes are kept here; then it pauses at the daemon."""

Promptable = str | Sequence[int] | Sequence[Message | Mapping[str, str]]
"""A text, token ids, or a chat."""


class Options(TypedDict, total=False):
    """What `generate` takes besides the prompt; protocol.Generate and protocol.Sampling explain each."""

    max_tokens: int
    stop: Sequence[str]
    ignore_eos: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    context: str | None
    session: str | None
    parse_special: bool
    keep: bool
    priority: str
    timeout: float | None
    """Seconds for the whole call; then it is cancelled and raises DeadlineExceeded."""


def generate_request(request_id: str, tenant: str, prompt: Promptable, options: Options) -> Generate:
    """The request for what a caller gave to `generate`."""
    rest: dict[str, Any] = dict(options)
    sampling = {name: rest.pop(name) for name in readers(Sampling) if name in rest}
    stop = rest.pop("stop", ())
    return Generate(
        request_id=request_id,
        tenant=tenant,
        prompt=_prompt(prompt),
        sampling=Sampling(**sampling),
        deadline_s=rest.pop("timeout", None),
        ahead=AHEAD,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        **rest,
    )


def change_request(
    request_id: str, tenant: str, action: str, session: str, fields: Mapping[str, Any]
) -> ChangeSession:
    return ChangeSession(request_id=request_id, tenant=tenant, action=action, session=session, **fields)


def _prompt(given: Promptable) -> Prompt:
    if isinstance(given, str):
        return given
    if isinstance(given, bytes | Mapping):
        raise InvalidRequest(
            f"prompt is {type(given).__name__}; allowed: a text, token ids or a list of messages"
        )
    try:
        if any(isinstance(item, Message | Mapping) for item in given[:1]):
            return tuple(Struct(Message).read(item, f"messages[{i}]") for i, item in enumerate(given))
        # integers of numpy and torch are taken too; a bool stays one, and is refused
        return tuple(item if isinstance(item, int) else operator.index(item) for item in given)  # type: ignore[arg-type]
    except (FieldError, TypeError) as error:
        raise InvalidRequest(f"prompt: {error}") from error


class Call:
    """One request and what has come back."""

    def __init__(self, request: Request, *, deadline: float | None, connect_by: float) -> None:
        self.request = request
        self.deadline = deadline
        self.connect_by = connect_by
        self.lost_by: float | None = None  # the link broke: nothing can come after this
        self.resuming = False
        self.replies: deque[Reply] = deque()
        self.next_seq = 0
        self.acknowledged = 0
        self.open = True  # a reply may still come
        self.error: SpilldError | None = None
        self.done: Done | None = None
        self.begun = False
        self.pieces: list[str] = []
        self.on_change: Callable[[], None] | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def lasts(self) -> bool:
        """It outlives the link: the daemon keeps what comes of it."""
        return isinstance(self.request, Generate | Resume)

    def result(self) -> Done:
        """The last event, once it has arrived. Raises what ended the call instead."""
        if self.done is not None:
            return self.done
        if self.error is None and not self.open:
            raise Cancelled("this generation was closed before its end: text_so_far is what came of it")
        raise self.error or RuntimeError("there is no result yet: read the generation to its end first")

    def note(self, reply: Reply) -> None:
        """Keep what is to be known of a reply before, or whether or not, it is taken."""
        match reply:
            case Accepted():
                self.begun = True
            case Token(text=text):
                self.pieces.append(text)
            case Done(text=text):
                self.done, self.pieces = reply, [text]

    def changed(self) -> None:
        if self.on_change is not None:
            self.on_change()


class Calls:
    """Every call in flight on one connection. Frames to send are appended to `outbox`."""

    def __init__(
        self,
        address: str,
        tenant: str,
        connect_timeout: float,
        reconnect_s: float,
        on_lost: Callable[[float], None] | None = None,
    ) -> None:
        self.address = address
        self.tenant = tenant
        self.connect_timeout = connect_timeout
        self.reconnect_s = reconnect_s
        self._on_lost = on_lost
        self.connected = False
        self.refused = False
        """It will not be connected any more."""
        self._turned_away = "", 0.0  # why, and until when that is worth telling
        self.closed = False
        self.outbox: deque[list[bytes]] = deque()
        self._calls: dict[str, Call] = {}

    def next_id(self) -> str:
        """128 random bits: whoever knows the id of a request may cancel it."""
        return secrets.token_hex(16)

    def start(self, request: Request, now: float, timeout: float | None = None) -> Call:
        """Send a request. Raises InvalidRequest or FrameTooLarge before anything is sent."""
        if self.closed:
            raise Unreachable("this client is closed")
        if self.refused:
            raise self.unreachable(now)
        frames = encode(request)
        deadline = None if timeout is None else now + timeout
        call = Call(request, deadline=deadline, connect_by=now + self.connect_timeout)
        self._calls[call.request_id] = call
        self.outbox.append(frames)
        return call

    def take(self, call: Call, now: float) -> Reply | None:
        """The next reply; None if there is none yet, or none any more (see `call.open`). Raises its error."""
        if call.open and (error := self._overdue(call, now)) is not None:
            self.cancel(call, error)
        if call.replies:
            reply = call.replies.popleft()
            self._acknowledge(call)
            return reply
        if call.error is not None:
            raise call.error
        return None

    def _acknowledge(self, call: Call) -> None:
        """Have the daemon go on with a call, if it may have paused it and its events can be kept."""
        due = call.lasts and call.next_seq - call.acknowledged >= ACKNOWLEDGED
        if due and call.open and len(call.replies) < KEPT:
            call.acknowledged = call.next_seq
            self.outbox.append(encode(Acknowledge(request_id=call.request_id, next_seq=call.next_seq)))

    def _overdue(self, call: Call, now: float) -> SpilldError | None:
        if call.deadline is not None and now >= call.deadline:
            call.replies.clear()
            return DeadlineExceeded("the timeout of this call has passed; it was cancelled")
        give_up = self._give_up(call)
        if give_up is None or now < give_up:
            return None
        if call.lost_by is not None:
            return self._gone(call, now)
        return self.unreachable(now)

    def _give_up(self, call: Call) -> float | None:
        """When the missing link ends a call."""
        if call.lost_by is not None or self.connected:
            return call.lost_by
        return call.connect_by

    def wait_s(self, call: Call, now: float) -> float | None:
        """How long `take` can be left alone if no frame arrives; None: for ever."""
        times = [moment for moment in (call.deadline, self._give_up(call)) if moment is not None]
        return max(0.0, min(times) - now) if times else None

    def ask_to_cancel(self, call: Call) -> None:
        """Tell the daemon to stop a call that has not ended: it ends with what the daemon says then."""
        if call.open:
            self.outbox.append(encode(Cancel(request_id=call.request_id)))

    def cancel(self, call: Call, error: SpilldError | None = None) -> None:
        """Tell the daemon to stop a call that has not ended; it ends here at once. From any thread."""
        if call.open:
            self.ask_to_cancel(call)
            self._end(call, error)
        if error is None:
            call.replies.clear()

    def _end(self, call: Call, error: SpilldError | None = None) -> None:
        self._calls.pop(call.request_id, None)
        call.open, call.error = False, error
        call.changed()

    def end(self, error: SpilldError) -> None:
        """End the call that an error names, or all calls if it names none."""
        for call in list(self._calls.values()):
            if error.request_id in ("", call.request_id):
                self._end(call, error)

    def received(self, frames: Sequence[bytes]) -> None:
        """Route a reply to its call. An error that names no call ends all of them."""
        try:
            reply = decode(frames)
            if not isinstance(reply, Reply):
                raise ProtocolError(f"the daemon sent a request: {type(reply).__name__}")
            if isinstance(reply, Failed) and not reply.request_id:
                raise reply.error()
        except SpilldError as error:
            wrong = ProtocolError(f"from the daemon: {error}") if isinstance(error, InvalidRequest) else error
            wrong.request_id = error.request_id
            self.end(wrong)
            return
        call = self._calls.get(reply.request_id)
        if call is None or reply.seq < call.next_seq:  # a repeat has been handled before
            return
        if isinstance(reply, Failed) and self._begins_anew(call, reply):
            self.outbox.append(encode(call.request))
        else:
            self._route(call, reply)

    def _begins_anew(self, call: Call, failed: Failed) -> bool:
        """The request was lost with the link, before the daemon had it."""
        lost = call.resuming and failed.code == RequestNotFound.code and isinstance(call.request, Generate)
        call.resuming = False
        return lost and call.next_seq == 0

    def _route(self, call: Call, reply: Reply) -> None:
        if reply.seq > call.next_seq:
            self.cancel(
                call, ProtocolError(f"reply {reply.seq} came where {call.next_seq} was due: one is lost")
            )
            return
        call.next_seq += 1
        if isinstance(reply, Failed):
            self._end(call, reply.error())
            return
        call.replies.append(reply)
        call.note(reply)
        if call.done is not None or not isinstance(reply, Event):
            self._end(call)
        self._acknowledge(call)
        call.changed()

    def link_up(self) -> None:
        self.connected, self._turned_away = True, ("", 0.0)
        for call in self._calls.values():
            if call.lost_by is not None and call.lasts:
                call.lost_by, call.resuming = None, True
                self._resume(call)

    def _resume(self, call: Call) -> None:
        call.acknowledged = call.next_seq
        resume = Resume(request_id=call.request_id, tenant=self.tenant, next_seq=call.next_seq)
        self.outbox.append(encode(resume))

    def link_lost(self, now: float) -> None:
        """The daemon is gone; it may come back, and then knows the generations that it had."""
        if not self.connected:  # an attempt to connect has failed, no more
            return
        self.connected = False
        for call in list(self._calls.values()):
            call.lost_by = now + (max(self.reconnect_s, LAST_WORDS_S) if call.lasts else LAST_WORDS_S)
            call.changed()
        if self._on_lost is not None and any(call.lasts for call in self._calls.values()):
            self._on_lost(self.reconnect_s)

    def turned_away(self, why: str, now: float, *, final: bool) -> None:
        """Somebody listens, but ended the attempt to connect. final: libzmq makes no other."""
        self._turned_away = why, math.inf if final else now + FRESH_S
        if final:
            self.refused = True
            self.end(self.unreachable(now))

    def close(self) -> None:
        """Cancel every call; no other can start."""
        for call in list(self._calls.values()):
            if call.lasts:
                self.outbox.append(encode(Cancel(request_id=call.request_id)))
        self.closed = True
        self.end(Unreachable("this client was closed"))

    def _gone(self, call: Call, now: float) -> SpilldError:
        if now < self._turned_away[1]:
            return self.unreachable(now)
        if not call.lasts:
            return Unreachable(f"the daemon at {self.address} went away; its log says why")
        return Unreachable(
            f"the daemon at {self.address} went away and was not back within {self.reconnect_s:g} s; its log "
            f"says why. It keeps the request for a while: resume({call.request_id!r})"
        )

    def unreachable(self, now: float, waited_s: float | None = None) -> SpilldError:
        """Why there is no connection. waited_s: for it, if not connect_timeout."""
        why, until = self._turned_away
        waited = self.connect_timeout if waited_s is None else waited_s
        if now < until:
            return AccessDenied(f"the daemon at {self.address} does not let this client in: {why}")
        return Unreachable(
            f"no daemon answered at {self.address} within {waited:g} s; start one with `spilld serve`"
        )
