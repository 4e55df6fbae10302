"""Sessions in files: what is imported goes on as the original would, and nothing else is imported."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spilld.errors import (
    ContextNotFound,
    CorruptArchive,
    Draining,
    ForeignArchive,
    ForeignSession,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    TransferNotFound,
)
from spilld.kv.attention_span import BLOCK
from spilld.models.model import Model
from spilld.offload.disk.files.extent_io import ExtentIO
from spilld.offload.errors import WriteFailed
from spilld.offload.maintenance.check import check
from spilld.offload.prefix_cache.block_hash import chain, root
from spilld.protocol.messages import (
    PIECE_BYTES,
    ChangeSession,
    CloseTransfer,
    Exported,
    ExportSession,
    Failed,
    Imported,
    ImportSession,
    Message,
    OpenTransfer,
    Piece,
    ReadTransfer,
    Reply,
    Transfer,
    TransferRequest,
    WriteTransfer,
)

from .harness import Harness, disk_tier, engine, shared, smallest_host_budget, some_tokens, window_bytes

PROMPT = some_tokens(3, 1400)
MORE = some_tokens(4, 300)
FIELDS: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
PATIENCE_S = 60.0


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


def request(harness: Harness, message: TransferRequest) -> Reply:
    """The answer, once there is one; a failure is raised."""
    answers: list[Reply] = []
    if isinstance(message, ExportSession | ImportSession):
        harness.engine.archives.begin(message, answers.append)
    else:
        harness.engine.archives.serve(message, answers.append)
    give_up = time.monotonic() + PATIENCE_S
    while not answers:
        assert time.monotonic() < give_up, "no answer"
        harness.engine.turn()
        time.sleep(0.001)
    (answer,) = answers
    if isinstance(answer, Failed):
        raise answer.error()
    return answer


def exported(harness: Harness, session: str = "s", tenant: str = "") -> tuple[Exported, bytes]:
    answer = request(harness, ExportSession(request_id="e", session=session, tenant=tenant))
    assert isinstance(answer, Exported)
    content = b""
    while len(content) < answer.nbytes:
        piece = request(harness, ReadTransfer(request_id="r", transfer=answer.transfer, offset=len(content)))
        assert isinstance(piece, Piece)
        content += piece.data
    request(harness, CloseTransfer(request_id="c", transfer=answer.transfer))
    assert leftovers(harness) == []
    harness.run()
    return answer, content


def sent(harness: Harness, content: bytes) -> str:
    opened = request(harness, OpenTransfer(request_id="o", nbytes=len(content)))
    assert isinstance(opened, Transfer)
    for at in range(0, len(content), PIECE_BYTES):
        piece = content[at : at + PIECE_BYTES]
        request(harness, WriteTransfer(request_id="w", transfer=opened.transfer, offset=at, data=piece))
    return opened.transfer


def imported(harness: Harness, content: bytes, session: str = "s", tenant: str = "") -> Imported:
    transfer = sent(harness, content)
    try:
        answer = request(
            harness, ImportSession(request_id="i", transfer=transfer, session=session, tenant=tenant)
        )
    finally:
        assert leftovers(harness) == []
        harness.run()
    assert isinstance(answer, Imported)
    return answer


def leftovers(harness: Harness) -> list[Path]:
    return list((harness.config.state / "transfers").iterdir())


def runs(harness: Harness) -> int:
    return len(disk_tier(harness).runs())


def names(harness: Harness, tenant: str = "") -> list[str]:
    return [session.name for session in harness.engine.sessions.store.of(tenant)]


@pytest.fixture(scope="session")
def original(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, list[int]]]:
    """By format: the archive of a session, and what it answers to MORE."""
    found = {}
    for form in ("exact", "k8v4"):
        with engine(model, tmp_path_factory.mktemp(form), format=form) as harness:
            harness.ask(PROMPT, session="s", tenant="a secret", **FIELDS)
            answer, content = exported(harness, tenant="a secret")
            assert (answer.tokens, answer.cached_tokens, answer.nbytes) == (1408, 1407, len(content))
            found[form] = content, harness.ask(MORE, session="s", tenant="a secret", **FIELDS)
    return found


Original = dict[str, tuple[bytes, list[int]]]


@pytest.mark.parametrize("form", ["exact", "k8v4"])
@pytest.mark.parametrize("tenant", ["a secret", "another"])
def test_it_goes_on_elsewhere(
    model: Model, original: Original, form: str, tenant: str, tmp_path: Path
) -> None:
    content, wanted = original[form]
    with engine(model, tmp_path / "s", keep_state=True, format=form) as harness:
        answer = imported(harness, content, "new", tenant)
        assert (answer.session.name, answer.session.tokens) == ("new", 1408)
        assert (answer.cached_tokens, answer.note) == (1407, "")
        assert answer.session.kv_bytes["disk"] > 0
        assert names(harness, tenant) == ["new"]
        assert names(harness) == []
        assert harness.ask(MORE, session="new", tenant=tenant, **FIELDS) == wanted
        assert harness.done().usage.cached_tokens == 1407
        harness.ask(PROMPT, "another's", tenant="a third", **FIELDS)
        assert harness.done("another's").usage.cached_tokens == 0
    assert check(tmp_path / "s" / "kv", repair=False).clean


def test_the_secret_is_not_in_the_file(original: Original, model: Model) -> None:
    """Neither as it is nor as a hash that could be compared with guesses."""
    content, _ = original["exact"]
    first = root(model.fingerprint, "exact", b"a secret")
    secrets = [first, *chain(first, PROMPT, len(PROMPT) // BLOCK)]
    assert not [secret for secret in (b"a secret", *secrets) if secret in content]


def test_into_less_memory_and_after_a_restart(model: Model, original: Original, tmp_path: Path) -> None:
    content, wanted = original["k8v4"]
    tight: dict[str, Any] = {
        "device_budget": 2 * window_bytes(model),
        "host_budget": smallest_host_budget(model),
        "disk_budget": "64MiB",
    }
    with engine(model, tmp_path / "s", keep_state=True, **tight) as harness:
        assert imported(harness, content).cached_tokens == 1407
    with engine(model, tmp_path / "s", **tight) as harness:
        assert harness.ask(MORE, session="s", **FIELDS) == wanted
        assert harness.done().usage.cached_tokens == 1407


def test_its_kv_is_evicted_as_that_of_a_session(model: Model, original: Original, tmp_path: Path) -> None:
    """After that of requests without one, from the import on."""
    content, wanted = original["k8v4"]
    tight: dict[str, Any] = {
        "device_budget": 2 * window_bytes(model),
        "host_budget": smallest_host_budget(model),
        "disk_budget": 10 << 20,
    }
    with engine(model, tmp_path / "s", **tight) as harness:
        assert imported(harness, content).cached_tokens == 1407
        for seed in range(100, 124):
            harness.engine._upkeep._ticked = 0.0
            harness.ask(some_tokens(seed, 1000), max_tokens=1)
            while harness.engine.writing:
                harness.engine.rest()
        assert harness.ask(MORE, session="s", **FIELDS) == wanted
        assert harness.done().usage.cached_tokens == 1407


def test_deleted_and_evicted_it_comes_back(model: Model, original: Original, tmp_path: Path) -> None:
    _, wanted = original["k8v4"]
    with engine(model, tmp_path / "s") as harness:
        harness.ask(PROMPT, session="s", **FIELDS)
        _, content = exported(harness)
        harness.engine.manage(ChangeSession(request_id="m", session="s", action="delete"))
        cache = harness.engine._store.disk
        assert cache is not None
        for place in disk_tier(harness).runs():
            cache.cache.discard(place.run)
        assert imported(harness, content).cached_tokens == 1407
        assert harness.ask(MORE, session="s", **FIELDS) == wanted


def test_what_is_there_already_is_not_written_again(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "s") as harness:
        harness.ask(PROMPT, session="s", **FIELDS)
        _, content = exported(harness)
        before = runs(harness)
        assert imported(harness, content, "copy").cached_tokens == 1407
        assert runs(harness) == before


def test_a_fork_takes_nothing_of_what_it_left(model: Model, tmp_path: Path) -> None:
    """A part of a run, and a tail that goes on for longer: only what is the session's is in the file."""
    with engine(model, tmp_path / "a", format="exact") as harness:
        harness.ask(PROMPT, session="s", **FIELDS)
        whole, content = exported(harness)
        fork = ChangeSession(request_id="m", session="s", action="fork", into="f", tokens=1290)
        harness.engine.manage(fork)
        part, less = exported(harness, "f")
        assert (whole.cached_tokens, part.cached_tokens) == (1407, 1289)
        assert len(less) < len(content)
        wanted = harness.ask(MORE, session="f", **FIELDS)
    with engine(model, tmp_path / "b", format="exact") as harness:
        imported(harness, less, "f")
        assert harness.ask(MORE, session="f", **FIELDS) == wanted
        assert harness.done().usage.cached_tokens == 1289


@pytest.mark.parametrize("length", [20, 255, 256, 257, 512, 513, 768, 769, 1025])
def test_any_length(model: Model, length: int, tmp_path: Path) -> None:
    with engine(model, tmp_path / "a") as harness:
        harness.ask(PROMPT[:length], session="s", max_tokens=1)
        answer, content = exported(harness)
        wanted = harness.ask(MORE, session="s", **FIELDS)
    with engine(model, tmp_path / "b") as harness:
        assert imported(harness, content).cached_tokens == answer.cached_tokens
        assert harness.ask(MORE, session="s", **FIELDS) == wanted
        assert harness.done().usage.cached_tokens == answer.cached_tokens == (length if length >= 256 else 0)


def test_a_chat_goes_on(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "a") as harness:
        book = harness.engine.sessions.store
        harness.ask(PROMPT, session="s", **FIELDS)
        chat = (Message(role="user", content="hi"), Message(role="assistant", content="\N{SNOWMAN}"))
        book.put(replace(book.get("", "s"), messages=chat, ttl_s=5000.0, pinned=True))
        _, content = exported(harness)
    with engine(model, tmp_path / "b") as harness:
        imported(harness, content)
        session = harness.engine.sessions.store.get("", "s")
        assert (session.messages, session.ttl_s, session.pinned) == (chat, 5000.0, False)


class TestRefused:
    def test_another_model(self, original: Original, tmp_path_factory: Any, tmp_path: Path) -> None:
        other = shared(tmp_path_factory, "qwen3")
        with engine(other, tmp_path / "s") as harness:
            with pytest.raises(ForeignArchive, match="import it where its model is served"):
                imported(harness, original["k8v4"][0])
            assert (names(harness), runs(harness)) == ([], 0)

    def test_another_format_takes_the_tokens(self, model: Model, original: Original, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s", format="k8v4") as harness:
            answer = imported(harness, original["exact"][0])
            assert "exact, here it is k8v4: it will be computed again" in answer.note
            assert (answer.cached_tokens, answer.session.tokens, runs(harness)) == (0, 1408, 0)
            history = harness.engine.sessions.store.get("", "s").tokens
            answer_here = harness.ask(MORE, session="s", **FIELDS)
        with engine(model, tmp_path / "t", format="k8v4") as harness:
            assert answer_here == harness.ask([*history, *MORE], **FIELDS)

    def test_a_name_that_is_taken_or_in_use(self, model: Model, original: Original, tmp_path: Path) -> None:
        content, _ = original["k8v4"]
        with engine(model, tmp_path / "s") as harness:
            harness.ask(PROMPT[:20], session="s", **FIELDS)
            before = runs(harness)
            with pytest.raises(InvalidRequest, match="there is a session 's' already"):
                imported(harness, content)
            transfer = sent(harness, content)
            harness.add("long", PROMPT[:20], session="t", max_tokens=100, ignore_eos=True)
            with pytest.raises(InvalidRequest, match="a request runs on session 't'"):
                request(harness, ImportSession(request_id="i", transfer=transfer, session="t"))
            assert leftovers(harness) == []
            harness.run()
            assert names(harness) == ["s", "t"]
            assert runs(harness) == before

    def test_a_session_that_is_not_there(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "s") as harness:
            with pytest.raises(ContextNotFound):
                exported(harness)
            harness.ask(PROMPT, session="s", tenant="mine", **FIELDS)
            with pytest.raises(ContextNotFound):
                exported(harness)

    def test_tokens_that_the_model_does_not_know(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "a") as harness:
            harness.ask(PROMPT[:30], session="s", **FIELDS)
            book = harness.engine.sessions.store
            book.put(replace(book.get("", "s"), tokens=(5, model.geometry.vocab)))
            _, content = exported(harness)
        with engine(model, tmp_path / "b") as harness, pytest.raises(CorruptArchive, match="does not know"):
            imported(harness, content)

    @pytest.mark.parametrize("longest", [300, 308, 309])
    def test_more_tokens_than_a_session_may_have(self, model: Model, longest: int, tmp_path: Path) -> None:
        """A full one is taken: it can be looked at, and exported again."""
        with engine(model, tmp_path / "a") as harness:
            harness.ask(PROMPT[:300], session="s", **FIELDS)
            _, content = exported(harness)
        with engine(model, tmp_path / "b", max_context=longest) as harness:
            if longest < 308:
                with pytest.raises(PromptTooLong, match="holds 308 tokens, a session here at most 300"):
                    imported(harness, content)
                assert names(harness) == []
            else:
                assert imported(harness, content).session.tokens == 308
                assert harness.ask([], session="s", max_tokens=0) == []

    def test_another_tokenizer(self, model: Model, original: Original, tmp_path: Path) -> None:
        """The weights are the same, and its tokens say something else."""
        other = replace(model, identity=b"another")
        with engine(other, tmp_path) as harness:
            with pytest.raises(ForeignArchive, match="its weights or its tokenizer differ"):
                imported(harness, original["k8v4"][0])
            assert names(harness) == []

    def test_one_that_says_nothing_of_the_tokenizer(
        self, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As older daemons wrote it."""
        with engine(replace(model, identity=b""), tmp_path / "a") as harness:
            harness.ask(PROMPT[:30], session="s", **FIELDS)
            _, content = exported(harness)
        with engine(model, tmp_path / "b") as harness:
            assert imported(harness, content).session.tokens == 38

    def test_a_session_of_another_model_is_not_exported_as_one_of_this(
        self, model: Model, tmp_path: Path
    ) -> None:
        with engine(model, tmp_path / "a") as harness:
            harness.ask(PROMPT[:30], session="s", **FIELDS)
            book = harness.engine.sessions.store
            book.put(replace(book.get("", "s"), model="other", identity=b"another"))
            with pytest.raises(ForeignSession, match="is of model 'other', here is"):
                exported(harness)


@pytest.fixture(scope="session")
def small(model: Model, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with engine(model, tmp_path_factory.mktemp("small")) as harness:
        harness.ask(PROMPT[:780], session="s", max_tokens=1)
        return exported(harness)[1]


@pytest.fixture(scope="module")
def target(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with engine(model, tmp_path_factory.mktemp("target")) as harness:
        yield harness


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_leaves_nothing(target: Harness, small: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(small) - 1) | st.integers(0, 1000) | st.just(len(small) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "longer"]))
    if kind == "flip":
        bad = small[:at] + bytes([small[at] ^ data.draw(st.integers(1, 255))]) + small[at + 1 :]
    else:
        bad = small[:at] if kind == "cut" else small + b"\0" * (at % 5000 + 1)
    with pytest.raises((CorruptArchive, ForeignArchive)):
        imported(target, bad)
    assert (names(target), runs(target)) == ([], 0)


def test_a_damaged_run_does_not_get_into_a_file(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "a", keep_state=True) as harness:
        harness.ask(PROMPT, session="s", **FIELDS)
    for segment in (tmp_path / "a" / "kv").glob("*.segment"):
        content = bytearray(segment.read_bytes())
        content[300] ^= 1
        segment.write_bytes(content)
    with engine(model, tmp_path / "a") as harness:
        before = runs(harness)
        answer, file = exported(harness)
        assert answer.cached_tokens < 1407
        assert runs(harness) < before, "nobody shall find it again"
        wanted = harness.ask(MORE, session="s", **FIELDS)
    with engine(model, tmp_path / "b") as harness:
        imported(harness, file)
        assert harness.ask(MORE, session="s", **FIELDS) == wanted


@pytest.mark.parametrize("call", ["write_extent", "sync", "commit"])
def test_a_disk_that_fails_costs_the_kv_only(
    model: Model, original: Original, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, wanted = original["k8v4"]

    def fail(*_: object) -> None:
        raise WriteFailed("no more")

    with engine(model, tmp_path / "s") as harness:
        with monkeypatch.context() as broken:
            tier = disk_tier(harness)
            broken.setattr(tier if call == "commit" else tier.io, call, fail)
            answer = imported(harness, content)
        assert (answer.cached_tokens, runs(harness)) == (0, 0)
        assert "no more" in answer.note
        assert harness.ask(MORE, session="s", **FIELDS) == wanted


def test_a_tier_without_room_costs_the_kv_only(model: Model, original: Original, tmp_path: Path) -> None:
    content, wanted = original["k8v4"]
    with engine(model, tmp_path / "s", disk_budget="256KiB", host_budget="64MiB") as harness:
        answer = imported(harness, content)
        assert "no room for the KV" in answer.note
        assert runs(harness) == 0
        assert harness.ask(MORE, session="s", **FIELDS) == wanted


def test_without_a_disk_tier(model: Model, original: Original, tmp_path: Path) -> None:
    content, wanted = original["k8v4"]
    with engine(model, tmp_path / "s", disk_budget=0) as harness:
        assert "no disk tier" in imported(harness, content).note
        answer, bare = exported(harness)
        assert (answer.cached_tokens, answer.tokens) == (0, 1408)
        assert len(bare) < 16384
        assert harness.ask(MORE, session="s", **FIELDS) == wanted


def test_it_is_whole_although_others_want_the_room(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being exported is not evicted meanwhile; requests go on."""
    read = ExtentIO.read_extent

    def slowly(*given: Any) -> Any:
        if threading.current_thread().name.startswith("spilld-archive"):
            time.sleep(0.2)
        return read(*given)

    monkeypatch.setattr(ExtentIO, "read_extent", slowly)
    host = smallest_host_budget(model, "exact")
    with engine(model, tmp_path / "s", format="exact", disk_budget="4MiB", host_budget=host) as harness:
        harness.ask(PROMPT, session="s", **FIELDS)
        answers: list[Reply] = []
        harness.engine.archives.begin(ExportSession(request_id="e", session="s"), answers.append)
        for seed in range(5, 9):
            harness.ask(some_tokens(seed, 1400), f"r{seed}", **FIELDS)
        while not answers:
            harness.engine.turn()
        (answer,) = answers
        assert isinstance(answer, Exported)
        assert answer.cached_tokens == 1407
        harness.run()


def test_stopped_in_the_middle(model: Model, original: Original, tmp_path: Path) -> None:
    content, _ = original["k8v4"]
    answers: list[Reply] = []
    with engine(model, tmp_path / "s", keep_state=True) as harness:
        harness.ask(PROMPT, session="s", **FIELDS)
        archives = harness.engine.archives
        archives.begin(ExportSession(request_id="e", session="s"), answers.append)
        archives.begin(
            ImportSession(request_id="i", transfer=sent(harness, content), session="t"), answers.append
        )
    ended = [answer for answer in answers if isinstance(answer, Failed)]
    assert len(answers) == 2
    assert all(answer.code == Draining.code for answer in ended)
    assert list((tmp_path / "s" / "transfers").iterdir()) == []
    assert check(tmp_path / "s" / "kv", repair=False).clean
    with engine(model, tmp_path / "s") as harness:
        assert harness.ask(MORE, session="s", **FIELDS)
        assert harness.done().usage.cached_tokens == 1407


class TestTransfers:
    @pytest.fixture
    def harness(self, model: Model, tmp_path: Path) -> Iterator[Harness]:
        with engine(model, tmp_path / "s", disk_budget="1MiB", disk_floor=0) as harness:
            yield harness

    def opened(self, harness: Harness, nbytes: int) -> str:
        answer = request(harness, OpenTransfer(request_id="o", nbytes=nbytes))
        assert isinstance(answer, Transfer)
        return answer.transfer

    def write(self, harness: Harness, transfer: str, offset: int, data: bytes) -> Reply:
        return request(harness, WriteTransfer(request_id="w", transfer=transfer, offset=offset, data=data))

    def test_only_its_owner_can_read_it(self, harness: Harness) -> None:
        name = self.opened(harness, 5)
        (file,) = leftovers(harness)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        assert len(bytes.fromhex(name)) == 16

    def test_offsets(self, harness: Harness) -> None:
        name = self.opened(harness, 5)
        for offset, data in ((1, b"a"), (0, b"abcdef")):
            with pytest.raises(InvalidRequest, match=f"offset is {offset}, .*; allowed: 0, and at most 5"):
                self.write(harness, name, offset, data)
        self.write(harness, name, 0, b"abc")
        with pytest.raises(InvalidRequest, match="3 of 5 bytes of it have come"):
            request(harness, ReadTransfer(request_id="r", transfer=name, offset=0))
        with pytest.raises(InvalidRequest, match="3 of 5 bytes of it have come"):
            request(harness, ImportSession(request_id="i", transfer=name, session="s"))
        self.write(harness, name, 3, b"de")
        piece = request(harness, ReadTransfer(request_id="r", transfer=name, offset=1))
        assert isinstance(piece, Piece)
        assert piece.data == b"bcde"
        with pytest.raises(InvalidRequest, match="offset is 5; allowed: 0 to 4"):
            request(harness, ReadTransfer(request_id="r", transfer=name, offset=5))

    def test_one_that_is_not_there(self, harness: Harness) -> None:
        gone = self.opened(harness, 5)
        request(harness, CloseTransfer(request_id="c", transfer=gone))
        assert leftovers(harness) == []
        for name in (gone, "f" * 32, "/" * 32):
            for message in (
                ReadTransfer(request_id="r", transfer=name, offset=0),
                WriteTransfer(request_id="r", transfer=name, offset=0, data=b""),
                ImportSession(request_id="r", transfer=name, session="s"),
                CloseTransfer(request_id="r", transfer=name),
            ):
                with pytest.raises(TransferNotFound):
                    request(harness, message)

    def test_what_nobody_asks_for_is_over(self, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("spilld.engine.sessions.archive_transfers.LOOK_S", 0.0)
        self.opened(harness, 5)
        harness.engine.turn()
        assert len(leftovers(harness)) == 1
        monkeypatch.setattr("spilld.sessions.transfers.IDLE_S", 0.0)
        give_up = time.monotonic() + PATIENCE_S
        while leftovers(harness):
            assert time.monotonic() < give_up, "it is not over"
            harness.engine.turn()

    def test_no_more_than_the_quota(self, harness: Harness) -> None:
        self.opened(harness, 60 << 20)
        with pytest.raises(Overloaded, match="raise that, or try again later"):
            self.opened(harness, 5 << 20)
        for _ in range(63):
            self.opened(harness, 1)
        with pytest.raises(Overloaded, match="64 transfers are open"):
            self.opened(harness, 1)

    def test_the_floor_is_left_free(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "t", disk_floor=1 << 60) as harness:
            harness.ask(PROMPT[:20], session="s", **FIELDS)
            for message in (
                OpenTransfer(request_id="o", nbytes=5),
                ExportSession(request_id="e", session="s"),
            ):
                with pytest.raises(Overloaded, match="disk_floor asks for"):
                    request(harness, message)
            harness.run()

    def test_left_behind_by_another_process(self, model: Model, tmp_path: Path) -> None:
        with engine(model, tmp_path / "t", keep_state=True):
            pass
        for name in ("0" * 32 + ".transfer", "not ours"):
            (tmp_path / "t" / "transfers" / name).write_bytes(b"x")
        with engine(model, tmp_path / "t") as harness:
            assert [path.name for path in leftovers(harness)] == ["not ours"]
