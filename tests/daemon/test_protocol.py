"""The frames: every message there and back, and everything that is not a message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spilld.errors import (
    FrameTooLarge,
    InternalError,
    InvalidRequest,
    ProtocolError,
    SpilldError,
    WrongVersion,
    error_for,
)
from spilld.fields import readers
from spilld.protocol import messages
from spilld.protocol.messages import (
    MAX_FRAME_BYTES,
    PIECE_BYTES,
    PRIORITIES,
    TYPES,
    Accepted,
    Acknowledge,
    Cancel,
    ChangeSession,
    CloseTransfer,
    Done,
    Exported,
    ExportSession,
    Failed,
    Generate,
    Hello,
    Imported,
    ImportSession,
    ListSessions,
    Message,
    OpenTransfer,
    Piece,
    Progress,
    PromptLogprob,
    ReadTransfer,
    Release,
    Released,
    Reply,
    Request,
    Resume,
    Sampling,
    SessionInfo,
    Sessions,
    Stats,
    StatsReply,
    Token,
    Transfer,
    Usage,
    Welcome,
    WriteTransfer,
)
from spilld.protocol.wire import decode, encode

HEADER = b"spilld\x00\x01"
EXAMPLE = "82a474797065a568656c6c6fa26964a161"

text = st.text(max_size=20)
count = st.integers(0, 2**63 - 1)
tokens = st.integers(0, 2**31 - 1)
ids = st.text(min_size=1, max_size=64)
handles = st.text(min_size=1, max_size=128)
tenants = st.text(max_size=64)
transfers = st.binary(min_size=16, max_size=16).map(bytes.hex)
logprobs = st.floats(max_value=0, allow_nan=False)
millis = st.floats(0, allow_nan=False, allow_infinity=False)
tops = st.lists(st.tuples(tokens, logprobs), max_size=20).map(tuple)
tiers = st.dictionaries(st.sampled_from(["device", "host", "disk"]), count)
positive = st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)

sampling = st.builds(
    Sampling,
    temperature=st.floats(0, 100),
    top_k=count,
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=positive,
    seed=st.none() | st.integers(0, 2**64 - 1),
)
chats = st.lists(st.builds(Message, role=ids, content=text), min_size=1, max_size=4).map(tuple)
usage = st.builds(
    Usage,
    prompt_tokens=count,
    generated_tokens=count,
    cached_tokens=count,
    read_bytes=tiers,
    kv_bytes=tiers,
    disk_read_bytes=count,
    stall_ms=millis,
    prefill_ms=millis,
    decode_ms=millis,
    queue_ms=millis,
    engine_ms=millis,
    format=text,
    prefetch_hits=count,
    prefetch_stalls=count,
)
infos = st.builds(
    SessionInfo,
    name=handles,
    tokens=count,
    kv_bytes=tiers,
    running=st.booleans(),
    pinned=st.booleans(),
    ttl_s=st.none() | positive,
    created=millis,
    used=millis,
)
prompt_logprobs = st.lists(
    st.builds(PromptLogprob, token=tokens, logprob=st.none() | logprobs, top=tops), max_size=3
)

MESSAGES: dict[type, st.SearchStrategy[Request | Reply]] = {
    Generate: st.builds(
        Generate,
        request_id=ids,
        prompt=st.lists(tokens, min_size=1, max_size=9).map(tuple) | st.text(min_size=1) | chats,
        tenant=tenants,
        keep=st.booleans(),
        max_tokens=st.integers(0, 2**63 - 1),
        stop=st.lists(st.text(min_size=1, max_size=256), max_size=16).map(tuple),
        ignore_eos=st.booleans(),
        sampling=sampling,
        logprobs=st.none() | st.integers(0, 20),
        prompt_logprobs=st.none() | st.integers(0, 20),
        deadline_s=st.none() | positive,
        priority=st.sampled_from(PRIORITIES),
        ahead=st.none() | st.integers(1, 2**63 - 1),
    ).flatmap(
        lambda request: st.sampled_from(
            [request, replace(request, context="c"), replace(request, session="\N{SNOWMAN}")]
        )
    ),
    Resume: st.builds(Resume, request_id=ids, tenant=tenants, next_seq=count),
    Acknowledge: st.builds(Acknowledge, request_id=ids, next_seq=count),
    Cancel: st.builds(Cancel, request_id=ids),
    Release: st.builds(Release, request_id=ids, tenant=tenants, context=handles),
    Hello: st.builds(Hello, request_id=ids),
    Stats: st.builds(Stats, request_id=ids),
    Accepted: st.builds(Accepted, request_id=ids, seq=count, prompt_tokens=count, cached_tokens=count),
    Progress: st.builds(Progress, request_id=ids, seq=count, done=count, total=count),
    Token: st.builds(
        Token, request_id=ids, seq=count, token=tokens, text=text, logprob=st.none() | logprobs, top=tops
    ),
    Done: st.builds(
        Done,
        request_id=ids,
        seq=count,
        reason=st.sampled_from(["stop", "length", "eos"]),
        text=text,
        usage=usage,
        context=st.none() | handles,
        prompt_logprobs=st.none() | prompt_logprobs.map(tuple),
    ),
    Failed: st.builds(
        Failed, request_id=st.just("") | ids, seq=count, code=ids, message=text, retryable=st.booleans()
    ),
    ListSessions: st.builds(ListSessions, request_id=ids, tenant=tenants),
    ChangeSession: st.builds(
        ChangeSession,
        request_id=ids,
        tenant=tenants,
        session=handles,
        action=st.sampled_from(["fork", "rename", "pin", "unpin", "expire", "delete"]),
        into=st.none() | handles,
        tokens=st.none() | st.integers(1, 2**40),
        ttl_s=st.none() | st.floats(1e-9, 1e9),
    ),
    Sessions: st.builds(Sessions, request_id=ids, seq=count, sessions=st.lists(infos, max_size=3).map(tuple)),
    Released: st.builds(Released, request_id=ids, seq=count, context=handles),
    Welcome: st.builds(
        Welcome,
        request_id=ids,
        seq=count,
        version=text,
        protocol=count,
        model=text,
        dtype=text,
        format=text,
        formats=st.lists(text, max_size=3).map(tuple),
        max_context=count,
        max_frame_bytes=count,
    ),
    ExportSession: st.builds(ExportSession, request_id=ids, session=handles, tenant=tenants),
    OpenTransfer: st.builds(OpenTransfer, request_id=ids, nbytes=count),
    ReadTransfer: st.builds(ReadTransfer, request_id=ids, transfer=transfers, offset=count),
    WriteTransfer: st.builds(
        WriteTransfer, request_id=ids, transfer=transfers, offset=count, data=st.binary(max_size=99)
    ),
    ImportSession: st.builds(
        ImportSession, request_id=ids, transfer=transfers, session=handles, tenant=tenants
    ),
    CloseTransfer: st.builds(CloseTransfer, request_id=ids, transfer=transfers),
    Exported: st.builds(
        Exported,
        request_id=ids,
        seq=count,
        transfer=transfers,
        nbytes=count,
        tokens=count,
        cached_tokens=count,
    ),
    Piece: st.builds(Piece, request_id=ids, seq=count, data=st.binary(max_size=99)),
    Transfer: st.builds(Transfer, request_id=ids, seq=count, transfer=transfers, nbytes=count),
    Imported: st.builds(Imported, request_id=ids, seq=count, session=infos, cached_tokens=count, note=text),
    StatsReply: st.builds(
        StatsReply, request_id=ids, seq=count, values=st.dictionaries(text, plain, max_size=4)
    ),
}


def test_every_message_has_a_strategy() -> None:
    assert set(MESSAGES) == set(TYPES.values())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("cls", list(MESSAGES), ids=lambda cls: cls.__name__)
def test_there_and_back(cls: type, data: st.DataObject) -> None:
    message = data.draw(MESSAGES[cls])
    frames = encode(message)
    again = decode(frames)
    assert type(again) is cls
    assert again == message
    assert encode(again) == frames


@settings(max_examples=200, deadline=None)
@given(message=st.one_of(*MESSAGES.values()), data=st.data())
def test_damaged_frames_are_refused_or_still_a_message(message: Request | Reply, data: st.DataObject) -> None:
    header, body = encode(message)
    at = data.draw(st.integers(0, len(body) - 1))
    damage = data.draw(st.binary(max_size=4))
    for frames in (
        [header, body[:at]],
        [header, body[:at] + damage + body[at:]],
        [header, body[:at] + damage + body[at + len(damage) :]],
        [header, body + b"\x00"],
    ):
        try:
            again = decode(frames)
        except SpilldError as error:
            assert error.message  # noqa: PT017 (a message is as good)
        else:
            assert type(again) in MESSAGES


@settings(max_examples=200, deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from(["type", "id", *readers(Generate), "tokens"]), plain), kind=plain
)
def test_any_map_is_refused_or_a_message(fields: dict[str, object], kind: object) -> None:
    for name in [kind, *TYPES]:
        body = msgpack.packb(fields | {"type": name})
        try:
            decode([HEADER, body])
        except (InvalidRequest, ProtocolError) as error:
            given_id = fields.get("id")
            readable = isinstance(given_id, str) and 1 <= len(given_id) <= 64
            assert error.request_id == (given_id if readable else "")  # noqa: PT017


GOOD: dict[str, object] = {"type": "generate", "id": "x", "text": "a"}

BAD_FIELDS: list[tuple[Mapping[str, object], str]] = [
    ({"id": ""}, "id is ''; allowed: a string of 1 to 64 characters"),
    ({"id": "i" * 65}, "id is "),
    ({"id": 7}, "id is 7"),
    ({"text": None}, "prompt is []; allowed: exactly one of tokens, text, messages"),
    ({"tokens": [1]}, "prompt is ['tokens', 'text']"),
    ({"text": ""}, "text is ''; allowed: not empty, unless it continues a context"),
    ({"text": None, "tokens": []}, "tokens is ()"),
    ({"text": None, "tokens": [1, -1]}, "tokens[1] is -1"),
    ({"text": None, "tokens": [1, True]}, "tokens[1] is True"),
    ({"text": None, "tokens": [1.0]}, "tokens[0] is 1.0"),
    ({"text": None, "tokens": [2**31]}, "tokens[0] is 2147483648"),
    ({"text": None, "tokens": "abc"}, "tokens is 'abc'"),
    ({"text": b"abc"}, "text is b'abc'"),
    ({"text": None, "messages": []}, "messages is ()"),
    ({"text": None, "messages": ["a"]}, "messages[0] is 'a'"),
    ({"text": None, "messages": [{"role": "user"}]}, "messages[0].content is None"),
    ({"text": None, "messages": [{"role": "", "content": ""}]}, "messages[0].role is ''"),
    ({"context": ""}, "context is ''"),
    ({"context": "c" * 129}, "context is "),
    ({"keep": 1}, "keep is 1; allowed: true or false"),
    ({"max_tokens": -1}, "max_tokens is -1; allowed: an integer from 0 to"),
    ({"max_tokens": True}, "max_tokens is True"),
    ({"max_tokens": None}, "max_tokens is None"),
    ({"stop": "end"}, "stop is 'end'"),
    ({"stop": [""]}, "stop[0] is ''; allowed: a string of 1 to 256 characters"),
    ({"stop": ["s" * 257]}, "stop[0] is "),
    ({"stop": ["s"] * 17}, "allowed: a list of at most 16"),
    ({"ignore_eos": "yes"}, "ignore_eos is 'yes'"),
    ({"logprobs": 21}, "logprobs is 21; allowed: an integer from 0 to 20"),
    ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
    ({"deadline_s": 0}, "deadline_s is 0; allowed: a finite number above 0"),
    ({"priority": "urgent"}, "priority is 'urgent'; allowed: low, normal, high"),
    ({"deadline_s": float("inf")}, "deadline_s is inf"),
    ({"sampling": None}, "sampling is None; allowed: a map of temperature, top_k"),
    (
        {"sampling": {"temperature": -0.1}},
        "sampling.temperature is -0.1; allowed: a finite number from 0 to 100",
    ),
    ({"sampling": {"temperature": 100.5}}, "sampling.temperature is 100.5"),
    ({"sampling": {"temperature": float("nan")}}, "sampling.temperature is nan"),
    ({"sampling": {"temperature": "hot"}}, "sampling.temperature is 'hot'"),
    ({"sampling": {"temperature": True}}, "sampling.temperature is True"),
    ({"sampling": {"top_k": -1}}, "sampling.top_k is -1"),
    ({"sampling": {"top_p": 0}}, "sampling.top_p is 0; allowed: a finite number above 0 to 1"),
    ({"sampling": {"top_p": 1.01}}, "sampling.top_p is 1.01"),
    ({"sampling": {"min_p": 1.01}}, "sampling.min_p is 1.01"),
    ({"sampling": {"repetition_penalty": 0}}, "sampling.repetition_penalty is 0"),
    ({"sampling": {"repetition_penalty": float("inf")}}, "sampling.repetition_penalty is inf"),
    ({"sampling": {"seed": -1}}, "sampling.seed is -1; allowed: an integer from 0 to 18446744073709551615"),
    ({"type": "telepathy"}, "type is 'telepathy'; allowed: generate, resume, cancel,"),
    ({"type": None}, "type is None"),
    ({"type": "release"}, "context is None; allowed: it must be given"),
    ({"session": ""}, "session is ''; allowed: a string of 1 to 128 characters"),
    ({"session": "s", "context": "c"}, "session is 's'; allowed: nothing beside a context"),
    ({"type": "read_transfer", "transfer": "f" * 31, "offset": 0}, "a string of 32 to 32 characters"),
    ({"type": "read_transfer", "transfer": "f" * 32, "offset": -1}, "offset is -1; allowed: an integer"),
    (
        {"type": "write_transfer", "transfer": "f" * 32, "offset": 0, "data": b"x" * (PIECE_BYTES + 1)},
        "allowed: at most 4194304 bytes",
    ),
    (
        {"type": "write_transfer", "transfer": "f" * 32, "offset": 0, "data": "text"},
        "data is 'text'; allowed: at most 4194304 bytes",
    ),
    ({"tenant": "x" * 65}, "a string of 0 to 64 characters"),
    ({"type": "change_session", "action": "pin"}, "session is None; allowed: it must be given"),
    (
        {"type": "change_session", "session": "s", "action": "burn"},
        "action is 'burn'; allowed: fork,",
    ),
]


@pytest.mark.parametrize(("changes", "says"), BAD_FIELDS, ids=lambda value: str(value)[:40])
def test_a_bad_field_is_named(changes: Mapping[str, object], says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode([HEADER, msgpack.packb({**GOOD, **changes})])
    assert says in str(caught.value)
    assert caught.value.request_id == ("" if "id" in changes else "x")


@pytest.mark.parametrize(
    "changes",
    [
        {"text": None, "tokens": [], "context": "c"},
        {"text": "", "context": "c"},
        {"sampling": {"temperature": 100, "top_p": 1, "min_p": 1, "seed": 2**64 - 1}},
        {"stop": ["s" * 256] * 16, "logprobs": 0, "deadline_s": 1},
        {"text": None, "tokens": [0, 2**31 - 1]},
    ],
)
def test_the_edges_are_allowed(changes: dict[str, object]) -> None:
    message = decode([HEADER, msgpack.packb(GOOD | changes)])
    assert isinstance(message, Generate)
    assert type(message.sampling.temperature) is float


def test_unknown_fields_are_ignored() -> None:
    body = GOOD | {"mood": {"deep": [1, {"er": None}]}, "seq": 9, "sampling": {"mirostat": 1, "top_k": 3}}
    assert decode([HEADER, msgpack.packb(body)]) == Generate(
        request_id="x", prompt="a", sampling=Sampling(top_k=3)
    )


def test_a_usage_of_an_older_or_a_newer_daemon_is_read() -> None:
    counted = ("prompt_tokens", "generated_tokens", "cached_tokens", "disk_read_bytes")
    old: dict[str, object] = dict.fromkeys(counted, 7) | {"read_bytes": {"disk": 1}, "kv_bytes": {}}
    old |= dict.fromkeys(("stall_ms", "prefill_ms", "decode_ms"), 1.5)
    newer = old | {"queue_ms": 2.5, "format": "int4", "prefetch_hits": 3, "prefetch_stalls": 4, "joules": 1e9}

    def read(usage: dict[str, object]) -> Usage:
        body = {"type": "done", "id": "x", "seq": 3, "reason": "eos", "text": "", "usage": usage}
        done = decode([HEADER, msgpack.packb(body)])
        assert isinstance(done, Done)
        return done.usage

    assert (read(old).queue_ms, read(old).format, read(old).prefetch_hits) == (0, "", 0)
    told = replace(read(old), queue_ms=2.5, format="int4", prefetch_hits=3, prefetch_stalls=4)
    assert read(newer) == told
    assert (told.prompt_tokens, told.stall_ms) == (7, 1.5)


def test_a_bad_reply_is_not_a_bad_request() -> None:
    with pytest.raises(ProtocolError, match=r"token: token is -1") as caught:
        decode([HEADER, msgpack.packb({"type": "token", "id": "x", "seq": 0, "token": -1, "text": ""})])
    assert caught.value.request_id == "x"


def test_requests_are_checked_before_they_leave() -> None:
    with pytest.raises(InvalidRequest, match=r"sampling\.top_p"):
        encode(Generate(request_id="x", prompt="a", sampling=Sampling(top_p=2.0)))
    with pytest.raises(InvalidRequest, match="surrogates"):
        encode(Generate(request_id="x", prompt="\ud800"))
    with pytest.raises(FrameTooLarge, match="16777216"):
        encode(Generate(request_id="x", prompt="a" * MAX_FRAME_BYTES))


def test_an_error_always_gets_through() -> None:
    failed = decode(encode(Failed(request_id="x", code="internal", message="/tmp/\udcff", retryable=False)))
    assert isinstance(failed, Failed)
    assert failed.message == "/tmp/?"
    with pytest.raises(ProtocolError, match="cannot be encoded"):
        encode(StatsReply(request_id="x", values={"set": {1}}))


def test_other_versions() -> None:
    with pytest.raises(WrongVersion, match="protocol 2, this side 1") as caught:
        decode([b"spilld\x00\x02", msgpack.packb({"id": "x", "type": "of the future"})])
    assert caught.value.request_id == "x"


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        ([], ProtocolError),
        ([HEADER], ProtocolError),
        ([HEADER, b"\x80", b""], ProtocolError),
        ([b"", b"\x80"], ProtocolError),
        ([b"spilld\x01\x01", b"\x80"], ProtocolError),
        ([HEADER + b"\x00", b"\x80"], ProtocolError),
        ([HEADER, b""], ProtocolError),
        ([HEADER, b"\x90"], ProtocolError),  # a list
        ([HEADER, b"\x81\x01\x02"], ProtocolError),  # a key that is no string
        ([HEADER, b"\x91" * 10_000], ProtocolError),  # too deep
        ([HEADER, b"\xdf\xff\xff\xff\xff"], ProtocolError),  # claims 4 billion entries
        ([HEADER, b"\x81\xa2id\xa1\xff"], ProtocolError),  # not UTF-8
        ([HEADER, b"\x81\xa1t\xc7\x0c\xff" + b"\xff" * 12], ProtocolError),  # an impossible timestamp
        ([HEADER, b"\x80" * (MAX_FRAME_BYTES + 1)], FrameTooLarge),
    ],
    ids=range(14),
)
def test_what_is_not_a_message(frames: list[bytes], error: type[SpilldError]) -> None:
    with pytest.raises(error) as caught:
        decode(frames)
    assert caught.type is error
    assert caught.value.request_id == ""


def test_errors_cross_the_wire_with_their_type() -> None:
    for code in ("invalid_request", "prompt_too_long", "overloaded", "internal", "wrong_version"):
        error = error_for(code, "why")
        failed = decode(encode(Failed.because(error, "x", 3)))
        assert isinstance(failed, Failed)
        assert type(failed.error()) is type(error)
        assert (failed.error().message, failed.error().request_id) == ("why", "x")
        assert (failed.code, failed.retryable, failed.seq) == (code, error.retryable, 3)
    assert type(error_for("internal", "")) is InternalError
    assert type(error_for("of the future", "")) is SpilldError


def test_the_page_knows_every_message_and_field() -> None:
    page = Path(messages.__file__).with_name("PROTOCOL.md").read_text()
    assert encode(Hello(request_id="a")) == [HEADER, bytes.fromhex(EXAMPLE)]
    assert EXAMPLE in page.replace(" ", "")
    sections = {part.split("\n")[0].strip("` "): part for part in page.split("\n### ")[1:]}
    for name, cls in {**TYPES, "sampling": Sampling, "usage": Usage}.items():
        for field in readers(cls):
            if field in ("request_id", "seq"):
                continue
            for shown in ("tokens", "text", "messages") if field == "prompt" else (field,):
                assert f"| `{shown}` |" in sections[name], (name, shown)
