"""Faults under a running engine: lost KV is computed again, or its request fails and no other."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from spilld.attention.cpu import CpuAttention
from spilld.cuda_ext.device.cpu import CpuDevice
from spilld.cuda_ext.errors import OutOfMemory
from spilld.errors import PromptTooLong, StorageFailed
from spilld.models.model import Model
from spilld.offload.errors import ExtentMissing
from spilld.offload.system import SystemCalls
from spilld.protocol.messages import Failed, PromptLogprob

from ..offload.faults import error
from ..offload.run_tier import on_system
from .harness import (
    Harness,
    column_bytes,
    disk_tier,
    engine,
    random_split,
    said,
    shared,
    smallest_host_budget,
    some_tokens,
    window_bytes,
)

PROMPT = some_tokens(1, 1500)
FIELDS: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@pytest.fixture(scope="session")
def expected(model: Model, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What PROMPT is answered with when nothing goes wrong."""
    with engine(model, tmp_path_factory.mktemp("calm"), disk_budget=0) as harness:
        return harness.ask(PROMPT, **FIELDS)


@contextmanager
def spilling(model: Model, state: Path, seed: int = 1, **settings: Any) -> Iterator[Harness]:
    """An engine that keeps most of PROMPT's KV on disk."""
    budgets = {
        "host_budget": smallest_host_budget(model, chunk=128),
        "chunk_tokens": 128,
        "disk_budget": "64MiB",
    }
    with engine(model, state, random_split(seed), **{**budgets, **settings}) as harness:
        yield harness


class Faulty(SystemCalls):
    """Real system calls, except where `fails` says otherwise: it gets a call's name, file and offset."""

    def __init__(self, fails: Callable[[str, int, int], None]) -> None:
        self._fails = fails

    def preadv(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._fails("preadv", file, offset)
        return super().preadv(file, buffers, offset)

    def pwritev(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._fails("pwritev", file, offset)
        return super().pwritev(file, buffers, offset)

    def ftruncate(self, file: int, nbytes: int) -> None:
        self._fails("ftruncate", file, nbytes)
        super().ftruncate(file, nbytes)


def until_said(harness: Harness, count: int, request_id: str = "r") -> None:
    while said(harness, request_id) < count:
        assert harness.engine.turn()


def damage(harness: Harness, request_id: str = "r") -> int:
    """Flip a byte in the records of every run of a request; how many there were."""
    table = running(harness, request_id).table
    tier = disk_tier(harness)
    for index, ref in enumerate(table.runs):
        place = tier.locate(ref.run)
        path = tier._folder.segment(place.range.segment)
        file = os.open(path, os.O_RDWR)
        at = (
            place.offset(index % place.identity.layers)
            + 256
            + 1000 * (index + 1) % place.identity.payload_bytes(0)
        )
        os.pwrite(file, bytes([os.pread(file, 1, at)[0] ^ 0x10]), at)
        os.fsync(file)
        os.close(file)
    return len(table.runs)


def running(harness: Harness, request_id: str = "r") -> Any:
    """The sequence that a request runs on."""
    state = harness.engine.requests.find(request_id)
    assert state is not None
    assert state.sequence is not None
    return state.sequence


@pytest.mark.parametrize("moment", ["prefill", "decode"])
def test_damaged_extents_are_computed_again(
    model: Model, expected: list[int], moment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with spilling(model, tmp_path / "s") as harness, caplog.at_level(logging.WARNING):
        harness.add("r", PROMPT, **FIELDS, prompt_logprobs=0 if moment == "prefill" else None)
        if moment == "decode":
            until_said(harness, 7)
        else:
            while not (harness.events.get("r") and len(running(harness).table.runs) > 1):
                assert harness.engine.turn()
        assert damage(harness) > 1
        harness.run()
        assert harness.tokens() == expected
        assert "is computed again" in caplog.text
        stats = harness.engine.stats()
        assert stats["recomputations"] == caplog.text.count("is computed again")
        assert stats["prefetch_corrupt"] == stats["prefetch_failures"] != 0
        if moment == "prefill":
            _check_prompt(harness.done().prompt_logprobs)


def _check_prompt(found: tuple[PromptLogprob, ...] | None) -> None:
    """A recomputation neither loses nor repeats an entry."""
    assert found is not None
    assert [entry.token for entry in found] == PROMPT
    assert [entry.logprob is None for entry in found] == [True] + [False] * (len(PROMPT) - 1)


def test_one_read_error_costs_a_recomputation(model: Model, expected: list[int], tmp_path: Path) -> None:
    faults = [error(errno.EIO)]

    def fails(name: str, _file: int, _offset: int) -> None:
        if name == "preadv" and faults:
            raise faults.pop()

    with spilling(model, tmp_path / "s") as harness:
        on_system(disk_tier(harness), Faulty(fails))
        assert harness.ask(PROMPT, **FIELDS) == expected
        assert not faults


def test_a_request_whose_kv_stays_lost_fails_alone(model: Model, expected: list[int], tmp_path: Path) -> None:
    other = some_tokens(8, 1200)
    with spilling(model, tmp_path / "s", seed=2) as harness:
        alone = harness.ask(other, "b", max_tokens=60, ignore_eos=True)
        harness.events.clear()
        tier = disk_tier(harness)
        harness.add("r", PROMPT, **FIELDS)
        harness.add("b", other, max_tokens=60, ignore_eos=True)
        until_said(harness, 3)
        table = running(harness).table

        def fails(name: str, file: int, offset: int) -> None:
            for ref in list(table.runs):
                with suppress(ExtentMissing):
                    place = tier.locate(ref.run)
                    if (
                        name == "preadv"
                        and place.file == file
                        and place.range.offset <= offset < place.range.end
                    ):
                        raise error(errno.EIO)

        on_system(tier, Faulty(fails))
        harness.run()
        with pytest.raises(StorageFailed, match="lost 3 times"):
            harness.tokens("r")
        assert harness.tokens("b") == alone
        assert harness.ask(PROMPT, **FIELDS) == expected, "the next one starts anew"


def test_reads_that_never_return_fail_by_their_deadline(
    model: Model, expected: list[int], tmp_path: Path
) -> None:
    over = threading.Event()

    def fails(name: str, _file: int, _offset: int) -> None:
        if name == "preadv":
            over.wait(30)

    with spilling(model, tmp_path / "s", read_deadline_s=0.1) as harness:
        harness.add("r", PROMPT, **FIELDS)
        until_said(harness, 2)
        on_system(disk_tier(harness), Faulty(fails))
        harness.run()
        with pytest.raises(StorageFailed, match="lost 3 times"):
            harness.tokens()
        over.set()
        assert harness.ask(PROMPT, **FIELDS) == expected


@pytest.mark.parametrize("call", ["ftruncate", "pwritev"])
def test_a_full_disk_is_no_loss_while_host_memory_suffices(
    model: Model, expected: list[int], call: str, tmp_path: Path
) -> None:
    with spilling(model, tmp_path / "s", host_budget=16 * column_bytes(model, "k8v4")) as harness:
        on_system(disk_tier(harness), Faulty(full(call)))
        assert harness.ask(PROMPT, **FIELDS) == expected
        assert "No space left" in str(harness.engine.stats()["disk_failure"])
        assert harness.done().usage.kv_bytes["disk"] == 0


@pytest.mark.parametrize("call", ["ftruncate", "pwritev"])
def test_a_full_disk_fails_what_host_memory_cannot_hold(
    model: Model, expected: list[int], call: str, tmp_path: Path
) -> None:
    with spilling(model, tmp_path / "s") as harness:
        on_system(disk_tier(harness), Faulty(full(call)))
        harness.add("r", PROMPT, **FIELDS)
        harness.run()
        with pytest.raises(StorageFailed, match="raise the host or the disk budget"):
            harness.tokens()
        with pytest.raises(PromptTooLong):
            harness.add("x", PROMPT, **FIELDS)
        assert harness.ask(PROMPT[:600], max_tokens=5, ignore_eos=True)


def test_a_waiting_request_that_fits_no_more_fails_instead_of_waiting(model: Model, tmp_path: Path) -> None:
    with spilling(model, tmp_path / "s", device_budget=window_bytes(model)) as harness:
        harness.add("r", PROMPT, **FIELDS)
        harness.add("b", PROMPT, **FIELDS)
        harness.add("c", PROMPT[:300], **FIELDS)
        until_said(harness, 2)
        on_system(disk_tier(harness), Faulty(full("pwritev")))  # met by the first's checkpoint at its end
        until_said(harness, 30)
        while harness.engine._store.writing:
            harness.engine._store.settle()  # the disk has failed before the next is admitted
        harness.run()
        assert len(harness.tokens("r")) == 30, "what is on disk stays readable"
        with pytest.raises(StorageFailed, match="No space left"):
            harness.tokens("b")
        assert len(harness.tokens("c")) == 30


def full(call: str) -> Callable[[str, int, int], None]:
    def fails(name: str, _file: int, _offset: int) -> None:
        if name == call:
            raise error(errno.ENOSPC)

    return fails


def test_a_step_that_breaks_leaves_nothing_behind(
    model: Model, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More often than there are staging buffers: a read that nobody takes would block the ring for good."""

    def breaks(*arguments: Any) -> Any:
        raise RuntimeError("a bug")

    with spilling(model, tmp_path / "s") as harness:
        for name in (f"r{number}" for number in range(6)):
            harness.add(name, PROMPT, **FIELDS)
            until_said(harness, 2, name)
            monkeypatch.setattr(CpuAttention, "forward", breaks)
            harness.engine.turn()
            monkeypatch.undo()
            harness.engine.check_integrity()
            assert isinstance(harness.events[name][-1], Failed)
        assert harness.ask(PROMPT, **FIELDS) == expected


def test_a_window_that_has_no_memory_fails_one_request(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is put behind a window when it is taken: those that run go on, and so do later ones."""
    with engine(model, tmp_path, format="exact") as harness:
        harness.add("runs", some_tokens(1, 40), max_tokens=8)
        harness.engine.turn()
        with monkeypatch.context() as patch:

            def full(self: CpuDevice, address: int, nbytes: int) -> None:
                raise OutOfMemory("nothing is left")

            patch.setattr(CpuDevice, "map", full)
            harness.add("finds none", some_tokens(2, 40), max_tokens=8)
            harness.engine.turn()
        harness.run()
        failed = harness.events["finds none"][-1]
        assert isinstance(failed, Failed)
        assert failed.code == "overloaded"
        assert len(harness.tokens("runs")) == 8
        assert len(harness.ask(some_tokens(2, 40), "later", max_tokens=8)) == 8
