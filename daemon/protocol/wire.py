"""Messages to frames and back: a header of 8 bytes, then one msgpack map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgpack

from spilld.errors import (
    FrameTooLarge,
    InvalidRequest,
    PromptTooLong,
    ProtocolError,
    SpilldError,
    WrongVersion,
)
from spilld.fields import (
    FieldError,
    FieldReader,
    Ints,
    ListOf,
    Struct,
    Text,
    read,
    readers,
)

from .messages import (
    MAGIC,
    MAX_FRAME_BYTES,
    PROTOCOL,
    REQUESTS,
    TOKEN,
    TYPES,
    Generate,
    Message,
    Prompt,
    Reply,
    Request,
)
from .unpack import TooMuch, unpack

SMALL_BYTES = 2048
"""Up to this size a body is unpacked whole: whatever its lists claim, that costs little."""

_NAMES = {cls: name for name, cls in TYPES.items()}

_PROMPTS: dict[str, FieldReader] = {
    "tokens": Ints(TOKEN),
    "text": Text(),
    "messages": ListOf(Struct(Message)),
}

_LISTS = {"tokens": 0, "messages": 4}
"""Fields with many items, and how many lists and maps each of these may be; more than one where it has fields
that are not known here."""

_FIELDS = tuple(
    dict.fromkeys(["id", "type", *_PROMPTS, *(name for cls in REQUESTS.values() for name in readers(cls))])
)
"""All fields that requests may have; those that identify the message first."""


def encode(message: Request | Reply) -> list[bytes]:
    """Encode a message as two frames. A request is checked first.

    Raises:
        InvalidRequest: A field of a request is wrong; the error names it.
        FrameTooLarge: The message has more than MAX_FRAME_BYTES.
        ProtocolError: A reply holds what msgpack cannot carry.
    """
    fields: dict[str, object] = {"type": _NAMES[type(message)], "id": message.request_id, **vars(message)}
    del fields["request_id"]
    if isinstance(message, Generate):
        fields[_prompt_key(message.prompt)] = fields.pop("prompt")
    if isinstance(message, Request):
        _build(fields)
    try:
        surrogates = (
            "strict" if isinstance(message, Request) else "replace"
        )  # an error must always get through
        body = msgpack.packb(fields, default=vars, unicode_errors=surrogates)
    except (TypeError, ValueError, OverflowError) as error:
        wrong = InvalidRequest if isinstance(message, Request) else ProtocolError
        raise wrong(f"{fields['type']} cannot be encoded: {error}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise FrameTooLarge(f"{fields['type']} has {len(body)} bytes; allowed: {MAX_FRAME_BYTES}")
    return [MAGIC + bytes([PROTOCOL]), body]


def decode(frames: Sequence[bytes]) -> Request | Reply:
    """Decode the message in two frames. Unknown fields are ignored.

    `request_id` of the error is set where the message named one.

    Raises:
        InvalidRequest: The type is unknown, or a field of a request is wrong.
        WrongVersion: The peer speaks another version of the protocol.
        FrameTooLarge: A frame has more than MAX_FRAME_BYTES.
        ProtocolError: Anything else is wrong.
    """
    return _decoded(frames, _whole, TYPES)


def decode_request(frames: Sequence[bytes], most: int) -> Request:
    """Decode a request from an untrusted peer, at a bounded cost; see decode.

    Args:
        frames: The two frames.
        most: How many tokens or messages a prompt may have.

    Raises:
        PromptTooLong: The prompt has more.
    """

    def careful(body: bytes) -> object:
        return unpack(body, _FIELDS, _LISTS, most) if len(body) > SMALL_BYTES else _whole(body)

    message = _decoded(frames, careful, REQUESTS)
    assert isinstance(message, Request)
    return message


def _decoded(
    frames: Sequence[bytes], unpacked: Callable[[bytes], object], types: Mapping[str, type]
) -> Request | Reply:
    fields: Mapping[str, object] = {}
    try:
        fields = _fields(_body(frames), unpacked)
        if (version := frames[0][-1]) != PROTOCOL:
            raise WrongVersion(
                f"the peer speaks protocol {version}, this side {PROTOCOL}; upgrade the older one"
            )
        return _build(fields, types)
    except TooMuch as much:
        fields = much.fields
        wrong = PromptTooLong if much.name in _LISTS else InvalidRequest
        raise _about(wrong(str(much)), fields) from None
    except SpilldError as error:
        _about(error, fields)
        raise


def _about(error: SpilldError, fields: Mapping[str, object]) -> SpilldError:
    """Give an error the id of the message that these fields are of, and return it."""
    request_id = fields.get("id")
    if isinstance(request_id, str) and 1 <= len(request_id) <= 64:
        error.request_id = request_id
    return error


def _fields(body: bytes, unpacked: Callable[[bytes], object]) -> Mapping[str, object]:
    try:
        fields = unpacked(body)
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"frame 1 is not msgpack: {error}") from error
    if not isinstance(fields, dict):
        raise ProtocolError(f"frame 1 is a {type(fields).__name__}; allowed: a map")
    return fields


def _body(frames: Sequence[bytes]) -> bytes:
    if len(frames) != 2:
        raise ProtocolError(f"a message has 2 frames, this one {len(frames)}")
    for number, frame in enumerate(frames):
        if len(frame) > MAX_FRAME_BYTES:
            raise FrameTooLarge(f"frame {number} has {len(frame)} bytes; allowed: {MAX_FRAME_BYTES}")
    header, body = frames
    if len(header) != len(MAGIC) + 1 or not header.startswith(MAGIC):
        raise ProtocolError(f"frame 0 is {header[:16]!r}; allowed: {MAGIC!r} and one version byte")
    return body


def _whole(body: bytes) -> object:
    """Unpack all of a body, from a trusted peer or of at most SMALL_BYTES."""
    if len(body) > SMALL_BYTES:
        _walk(body)
    return msgpack.unpackb(body)


def _walk(body: bytes) -> None:
    """Walk a body, which raises what unpackb raises if it is cut short or nested too deeply.

    It makes no objects. In a body that is whole no list claims more items than there are bytes, however lists
    are nested.
    """
    walker = msgpack.Unpacker(read_size=max(1, len(body)), max_buffer_size=MAX_FRAME_BYTES)
    walker.feed(body)
    walker.skip()


def _build(fields: Mapping[str, object], types: Mapping[str, type] = TYPES) -> Request | Reply:
    """Build the message that a map from the wire stands for."""
    name = fields.get("type")
    cls = types.get(name) if isinstance(name, str) else None
    try:
        if cls is None:
            raise FieldError("type", name, ", ".join(REQUESTS))
        values = dict(fields)
        values["request_id"] = readers(cls)["request_id"].read(fields.get("id"), "id")
        if cls is Generate:
            values["prompt"] = _prompt(fields)
        message: Request | Reply = read(cls, values)
        return message
    except FieldError as error:
        reply = cls is not None and issubclass(cls, Reply)
        raise (ProtocolError if reply else InvalidRequest)(
            f"{name}: {error}" if cls else str(error)
        ) from None


def _prompt(fields: Mapping[str, object]) -> Prompt:
    given = [key for key in _PROMPTS if fields.get(key) is not None]
    if len(given) != 1:
        raise FieldError("prompt", given, "exactly one of " + ", ".join(_PROMPTS))
    prompt: Prompt = _PROMPTS[given[0]].read(fields[given[0]], given[0])
    names = [key for key in ("context", "session") if fields.get(key) is not None]
    if len(names) > 1:
        raise FieldError("session", fields["session"], "nothing beside a context")
    if not prompt and not names:
        raise FieldError(given[0], prompt, "not empty, unless it continues a context or a session")
    return prompt


def _prompt_key(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return "text"
    return "messages" if prompt and isinstance(prompt[0], Message) else "tokens"
