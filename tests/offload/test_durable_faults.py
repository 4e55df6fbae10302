"""The durable store on a disk that interrupts, stalls, disappears, or forgets what its index took."""

from __future__ import annotations

import errno
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from spilld.offload.disk.files.extent import RunKey, extent_bytes
from spilld.offload.disk.files.segment import Range
from spilld.offload.disk.index.database import Database
from spilld.offload.disk.prefetch import Prefetcher
from spilld.offload.disk.read_ticket import ExtentRead
from spilld.offload.disk.spiller import Spiller
from spilld.offload.errors import (
    ExtentCorrupt,
    ExtentMissing,
    FolderUnusable,
    OffloadError,
    ReadError,
    ReadFailed,
    ReadTimeout,
    TierFull,
    WriteFailed,
)
from spilld.offload.maintenance.check import check
from spilld.offload.prefix_cache.run_cache import RunCache
from spilld.offload.system import PAGE, SystemCalls, page_aligned

from .faults import ScriptedSystem, Stall, error
from .run_tier import RunTier, on_system
from .test_disk import open_tier
from .test_durable import numbers, read_checkpoint, stored
from .test_store import COLUMNS, RUN, Known, Rig, content, rigged
from .tier_contract import LAYERS, LAYOUT, LAYOUTS, assert_tier, blocks, chain, key, put

EXTENT = extent_bytes(LAYOUT, 12)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """With more room on disk than these tests write: nothing is evicted."""
    with rigged(tmp_path, disk_runs=30) as rig:
        yield rig


def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.002)


# A disk that does things in parts.


class Choppy(SystemCalls):
    """Every other read and write is interrupted, the others move some pages of what they were asked to."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.calls: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self.lock = threading.Lock()

    def preadv(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        part = self._part("preadv", buffers)
        count = super().preadv(file, [part], offset)
        buffers[0][count:] = b"\xa5" * (len(buffers[0]) - count)
        return count

    def pwritev(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        return super().pwritev(file, [self._part("pwritev", buffers)], offset)

    def fdatasync(self, file: int) -> None:
        """Not what is tested here."""

    def _part(self, name: str, buffers: Sequence[memoryview]) -> memoryview:
        (whole,) = buffers
        with self.lock:
            self.calls[name] += 1
            if self.calls[name] % 2:
                self.met[f"{name} interrupted"] += 1
                raise InterruptedError(errno.EINTR, "interrupted")
            pages = self.random.randint(1, max(1, len(whole) // PAGE))
            self.met[f"{name} short"] += pages * PAGE < len(whole)
        return whole[: pages * PAGE]

    def assert_met(self) -> None:
        """It was not spared anything."""
        for kind in ("preadv interrupted", "preadv short", "pwritev interrupted", "pwritev short"):
            assert self.met[kind] > 10, f"{kind}: {self.met[kind]}"


@pytest.mark.parametrize("seed", range(4))
def test_what_is_written_in_parts_is_read_whole(tmp_path: Path, seed: int) -> None:
    runs = {n: 1 + (5 * n + seed) % 12 for n in range(10)}
    for system in (Choppy(seed), Choppy(100 + seed)):
        tier = RunTier(tmp_path / "kv", 4_000_000, LAYOUTS, bytes(32), system)
        for n, count in runs.items():
            if key(n) in tier:
                tier.delete(key(n))
            put(tier, n, count)
        assert_tier(tier, runs)
        system.assert_met()
        tier.close()
        tier = RunTier(tmp_path / "kv", 4_000_000, LAYOUTS, bytes(32))
        assert_tier(tier, runs)
        tier.close()


@pytest.mark.parametrize("seed", range(3))
def test_threads_that_are_interrupted_lose_nothing(rig: Rig, seed: int) -> None:
    system = Choppy(seed)
    on_system(rig.path.tier, system)
    known, checkpoints = rig.open(4 * COLUMNS), {(1, 2): numbers(1), (3,): numbers(2)}
    while len(known.blocks) < 4 * COLUMNS:
        rig.fill(known, RUN)
        rig.store.write_behind()
    rig.store.save(known.table)
    for tokens, values in checkpoints.items():
        rig.store.checkpoints.save(bytes(32), tokens, 0, values)
        rig.settled()
    rig.check()
    system.assert_met()
    rig.reopen()
    on_system(rig.path.tier, Choppy(seed + 50))
    again = rig.open(4 * COLUMNS, like=known.names)
    assert rig.attach(again) == 4 * COLUMNS
    rig.check()
    found = {tuple(tokens): run for run, tokens in rig.store.checkpoints.find(bytes(32))}
    assert found.keys() == checkpoints.keys()
    for tokens, run in found.items():
        np.testing.assert_array_equal(read_checkpoint(rig, run), checkpoints[tokens])


# A disk that stalls.


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_the_owner_goes_on_while_a_write_stalls(rig: Rig, call: str) -> None:
    """For 5 s, as a drive that collects garbage does; for less in the second case."""
    stall_s = 5.0 if call == "pwritev" else 0.5
    old = stored(rig, RUN)
    slow = rig.open(RUN)
    rig.fill(slow, RUN)
    stall, slowest, turns = Stall(), 0.0, 0
    rig.system.script[call].append(stall)
    rig.store.write_behind()
    assert stall.begun.wait(10)
    other, end = rig.open(COLUMNS - RUN), time.monotonic() + stall_s
    while time.monotonic() < end:
        began = time.monotonic()
        rig.store.settle()
        rig.store.write_behind()
        slowest = max(slowest, time.monotonic() - began)
        if len(other.blocks) < COLUMNS - RUN:
            rig.fill(other, 1)
        rig.assert_scan(slow, turns % LAYERS, range(1, RUN + 1))
        rig.assert_scan(old, turns % LAYERS, range(1, RUN + 1))
        assert not slow.table.runs, "a run that nobody has written is there"
        assert rig.store.writing
        turns += 1
        time.sleep(0.005)
    assert turns > 20
    assert slowest < stall_s / 4, "settle waited for the disk"
    stall.over.set()
    rig.settled()
    assert [ref.blocks for ref in slow.table.runs] == [range(1, RUN + 1)]
    assert rig.store.spill_failure is None
    rig.check()
    rig.reopen()
    again = rig.open(RUN, like=slow.names)
    assert rig.attach(again) == RUN
    rig.check()


def test_a_run_whose_write_stalls_waits_and_the_rest_of_it_follows(tmp_path: Path) -> None:
    system = ScriptedSystem()
    tier = open_tier(tmp_path / "kv", system)
    spiller, stall, runs = Spiller(tier, EXTENT), Stall(), {1: 2, 2: 5, 3: 1}
    system.script["pwritev"].extend([None, stall])
    for n, count in runs.items():
        place = tier.reserve(key(n), first=n, count=count, chain_hash=chain(n))
        rows = np.tile(np.arange(count), (LAYERS, 1))
        spiller.submit(place, blocks(n, count), rows)
    assert stall.begun.wait(10)
    began = time.monotonic()
    assert spiller.finished() == []
    assert spiller.wait(0.1) == []
    assert 0.1 <= time.monotonic() - began < 2
    assert not any(key(n) in tier for n in runs)
    stall.over.set()
    ended: list[RunKey] = []
    while spiller.pending:
        ended.extend(spilled.run for spilled in spiller.wait(10) if spilled.ok)
    assert ended == [key(n) for n in runs]
    spiller.close()
    tier.close()
    tier = open_tier(tmp_path / "kv", ScriptedSystem())
    assert_tier(tier, runs)
    tier.close()


@pytest.mark.parametrize("waits", [True, False])
def test_a_read_that_stalls_ends_by_its_deadline(tmp_path: Path, waits: bool) -> None:
    """The other thread goes on; the room of the run is given away only when the read has returned."""
    system = ScriptedSystem()
    tier = open_tier(tmp_path / "kv", system)
    put(tier, 1)
    put(tier, 2)
    prefetch, stall = Prefetcher(tier, 3, EXTENT, deadline_s=0.3), Stall()
    system.script["preadv"].append(stall)
    began = time.monotonic()
    (slow,) = prefetch.submit([ExtentRead(key(1), 0)])
    assert stall.begun.wait(10)
    (fast,) = prefetch.submit([ExtentRead(key(2), 1)])
    np.testing.assert_array_equal(prefetch.wait(fast), blocks(2, 2)[1])
    prefetch.release(fast)
    if waits:
        with pytest.raises(ReadTimeout):
            prefetch.wait(slow)
    else:
        until(lambda: slow in prefetch.finished())
        assert isinstance(slow.error, ReadTimeout)
    assert 0.3 <= time.monotonic() - began < 1.5
    assert not stall.over.is_set()
    where = tier.locate(key(1)).range
    tier.delete(key(1))
    put(tier, 3)
    assert tier.locate(key(3)).range != where, "the room of a run was given away under a read"
    prefetch.check_integrity()
    stall.over.set()
    until(lambda: prefetch.finished() == [] and not prefetch._abandoned)
    put(tier, 4)
    assert tier.locate(key(4)).range == where
    tickets = prefetch.submit([ExtentRead(key(n), layer) for n in (2, 3, 4) for layer in range(LAYERS)])
    for ticket in tickets:
        n = int.from_bytes(ticket.read.run)
        np.testing.assert_array_equal(prefetch.wait(ticket), blocks(n, 2)[ticket.read.layer])
        prefetch.release(ticket)
    prefetch.close()
    tier.close()
    tier = open_tier(tmp_path / "kv", ScriptedSystem())
    assert_tier(tier, {2: 2, 3: 2, 4: 2})
    tier.close()


def test_a_scan_that_stalls_ends_by_its_deadline_and_can_be_made_again(rig: Rig) -> None:
    known = stored(rig, 2 * RUN)
    rig.path.prefetch.deadline_s = 0.3
    stall = Stall()
    rig.system.script["preadv"].append(stall)
    began = time.monotonic()
    with pytest.raises(ReadTimeout):
        rig.scan(known, 0, range(1, 2 * RUN + 1))
    assert 0.3 <= time.monotonic() - began < 1.5
    rig.assert_scan(known, 1, range(1, 2 * RUN + 1))
    assert rig.store.spill_failure is None
    stall.over.set()
    rig.settled()
    rig.check()
    rig.reopen()
    assert rig.attach(rig.open(2 * RUN, like=known.names)) == 2 * RUN
    rig.check()


# A disk that disappears.


NEVER = 10**9


class Vanishing(SystemCalls):
    """Real calls, so many of them; then each fails, with one error and from `again` calls later another."""

    def __init__(self, calls: float, *, again: int = 20) -> None:
        self.left = calls
        self.again = again
        self.failed: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def gone(self) -> bool:
        return self.left <= 0

    def go(self) -> None:
        with self.lock:
            self.left = 0

    def open(self, path: Path, flags: int) -> int:
        self._meet("open")
        return super().open(path, flags)

    def close(self, file: int) -> None:
        """The descriptor is gone in any case, as close(2) has it."""
        super().close(file)
        self._meet("close")

    def preadv(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._meet("preadv")
        return super().preadv(file, buffers, offset)

    def pwritev(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._meet("pwritev")
        return super().pwritev(file, buffers, offset)

    def fdatasync(self, file: int) -> None:
        self._meet("fdatasync")

    def fsync_folder(self, folder: Path) -> None:
        self._meet("fsync_folder")

    def ftruncate(self, file: int, nbytes: int) -> None:
        self._meet("ftruncate")
        super().ftruncate(file, nbytes)

    def free_bytes(self, folder: Path) -> int:
        self._meet("free_bytes")
        return super().free_bytes(folder)

    def unlink(self, path: Path) -> None:
        self._meet("unlink")
        super().unlink(path)

    def _meet(self, name: str) -> None:
        with self.lock:
            self.left -= 1
            if self.left < 0:
                self.failed[name] += 1
                raise error(errno.EIO if sum(self.failed.values()) <= self.again else errno.ENODEV)


@contextmanager
def index_that_follows(system: Vanishing) -> Iterator[None]:
    """SQLite has calls of its own: what it is asked fails once the disk is gone."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("rows", "run", "transaction"):
            real = getattr(Database, name)

            def ask(*args: object, real: Callable[..., object] = real) -> object:
                if system.gone:
                    raise error(errno.EIO)
                return real(*args)

            patched.setattr(Database, name, ask)
        yield


def assert_runs(rig: Rig, runs: dict[RunKey, list[bytes]]) -> None:
    """All these runs are there, and hold the blocks of these names."""
    found = rig.stored()
    assert runs.keys() <= found.keys(), "a committed run is lost"
    for run, names in runs.items():
        for layer, records in enumerate(found[run]):
            np.testing.assert_array_equal(records, np.stack([content(name)[layer] for name in names]))


def committed(sequences: Sequence[Known]) -> dict[RunKey, list[bytes]]:
    return {
        ref.run: [known.names[block] for block in ref.blocks]
        for known in sequences
        for ref in known.table.runs
    }


@pytest.mark.parametrize("index", [True, False], ids=["with its index", "its index answers"])
def test_host_memory_is_served_when_the_disk_is_gone(rig: Rig, index: bool) -> None:
    old, new = stored(rig, 2 * RUN), rig.open(COLUMNS)
    rig.store.checkpoints.save(bytes(32), [1], 0, numbers(1))
    rig.settled()
    ((checkpoint, _),) = rig.store.checkpoints.find(bytes(32))
    rig.fill(new, 2 * RUN)
    before = committed(rig.sequences)
    assert len(before) == 2
    system = on_system(rig.path.tier, Vanishing(0, again=NEVER))
    reasons: set[int] = set()
    with index_that_follows(system) if index else nullcontext():
        rig.fill(new, RUN)
        for layer in range(LAYERS):
            rig.assert_scan(new, layer, range(1, 3 * RUN + 1))
            with pytest.raises(ReadError) as failed:
                rig.scan(old, layer, range(1, 2 * RUN + 1))
            assert isinstance(failed.value.__cause__, OSError)
            reasons.add(failed.value.__cause__.errno or 0)
            system.again = 0  # a number of calls would depend on which reads a failed scan still cancels
        with pytest.raises(ReadFailed):
            read_checkpoint(rig, checkpoint)
        rig.store.save(new.table)
        rig.settled()
        assert isinstance(rig.store.spill_failure, WriteFailed)
        assert rig.store.capacity == COLUMNS
        rig.store.checkpoints.save(bytes(32), [2], 0, numbers(2))
        rig.store.write_behind()
        assert not rig.store.writing
        rig.fill(new, RUN)
        with pytest.raises(TierFull):
            rig.store.reserve(new.table, COLUMNS + 1)
        for layer in range(LAYERS):
            rig.assert_scan(new, layer, range(1, COLUMNS + 1))
        rig.store.stats()
        rig.close()
        with pytest.raises(FolderUnusable):
            RunTier(rig.folder, 1 << 20, LAYOUTS, bytes(32), system)
    assert reasons == {errno.EIO, errno.ENODEV}
    rig.start()
    assert_runs(rig, before)
    assert [tokens for _, tokens in rig.store.checkpoints.find(bytes(32))] == [[1]]
    np.testing.assert_array_equal(read_checkpoint(rig, checkpoint), numbers(1))
    again = rig.open(2 * COLUMNS, like=old.names)
    assert rig.attach(again) == 2 * RUN
    rig.fill(again, 2 * RUN)
    rig.store.save(again.table)
    rig.settled()
    assert rig.store.spill_failure is None
    rig.check()


@pytest.mark.parametrize("index", [True, False], ids=["with its index", "its index answers"])
def test_a_disk_may_go_at_any_call(tmp_path: Path, index: bool) -> None:
    """What was committed by then is there when it is back; nothing but errors of the store is raised."""
    kept: Counter[int] = Counter()
    failed: Counter[str] = Counter()
    for calls in range(0, 130, 7):
        home = tmp_path / str(calls)
        home.mkdir()
        with rigged(home, disk_runs=30) as rig:
            system = on_system(rig.path.tier, Vanishing(calls))
            with index_that_follows(system) if index else nullcontext():
                before = a_day(rig)
                system.go()
                with suppress(OffloadError):
                    rig.store.save(rig.sequences[0].table)
                for known in list(rig.sequences):
                    rig.forget(known)
                rig.close()
            rig.start()
            assert_runs(rig, before)
            rig.check()
        kept[len(before)] += 1
        failed += system.failed
    assert len(kept) > 4, f"it always went at one moment: {kept}"
    assert {"pwritev", "preadv", "fdatasync", "ftruncate", "close"} <= failed.keys()


def a_day(rig: Rig) -> dict[RunKey, list[bytes]]:
    """Two sequences grow beyond host memory and are read, one is forgotten; the runs that were committed."""
    before: dict[RunKey, list[bytes]] = {}
    for _ in range(2):
        known = rig.open()
        try:
            rig.store.reserve(known.table, 20)
            while len(known.blocks) < 20:
                rig.fill(known, 2)
                rig.store.write_behind()
                rig.settled()
                before |= committed(rig.sequences)
        except TierFull:
            assert rig.store.spill_failure is not None
        rig.store.settle()
        for layer in range(LAYERS):
            in_host = [b for b in range(1, known.table.stop) if known.table.rows[0, b] >= 0]
            for block in in_host:
                row = known.table.rows[layer, block]
                np.testing.assert_array_equal(rig.store.records(layer)[row], known.blocks[block - 1][layer])
            try:
                rig.assert_scan(known, layer, range(1, known.table.stop))
            except ReadError:
                assert isinstance(rig.path.tier.system, Vanishing)
                assert rig.path.tier.system.gone
    rig.settled()
    return before | committed(rig.sequences)


class Unclosable(ScriptedSystem):
    def close(self, file: int) -> None:
        super().close(file)
        raise error(errno.EIO)


def test_a_file_that_will_not_close_is_no_error_of_what_gave_it_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier(tmp_path / "kv", ScriptedSystem())
    put(tier, 1)
    on_system(tier, Unclosable())
    tier.delete(key(1))
    assert_tier(tier, {})
    assert "cannot close" in caplog.text
    put(tier, 2)
    tier.close()
    tier = open_tier(tmp_path / "kv", ScriptedSystem())
    assert_tier(tier, {2: 2})
    tier.close()


# A power cut that takes commits of the index back.


@dataclass
class History:
    """Small operations on a tier, and what the disk has of them when the power goes."""

    folder: Path
    seed: int
    tier: RunTier = field(init=False)
    live: dict[int, tuple[int, Range]] = field(default_factory=dict)
    """By run: blocks and place."""
    durable: dict[int, tuple[int, Range]] = field(default_factory=dict)
    """As `live`, when the index was last written into its file."""
    known: dict[int, tuple[int, Range]] = field(default_factory=dict)
    """As `durable`, when the file was copied."""
    moves: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.tier = open_tier(self.folder / "kv", ScriptedSystem())

    def play(self, operations: int) -> Path:
        """The folder as it is after the power cut."""
        cut, copied = self.folder / "cut", self.random.randrange(operations // 4, operations - 3)
        cut.mkdir(mode=0o700)
        for at in range(operations):
            choice = self.random.choices(["put", "delete", "resize", "move", "write"], [5, 3, 3, 2, 1])[0]
            getattr(self, choice)()
            if at == copied:
                if self.random.random() < 0.8:
                    self.write()
                shutil.copy(self.tier.index._db.path, cut / "index.sqlite")
                self.known = dict(self.durable)
        for path in (self.folder / "kv").glob("*.segment"):
            shutil.copy(path, cut / path.name)
        self.tier.close()
        return cut

    def put(self, n: int | None = None) -> None:
        """All as checkpoints of one block are: their headers differ by name and length only."""
        absent = [m for m in range(16) if m not in self.live]
        if n is None and not absent:
            return
        n = self.random.choice(absent) if n is None else n
        count = self.random.choice([1, 2, 3, 3, 5, 8])
        with suppress(TierFull):
            self.tier.put(key(n), 1, chain(0), blocks(n, count))
            self.live[n] = count, self.tier.locate(key(n)).range

    def delete(self) -> int | None:
        if not self.live:
            return None
        n = self.random.choice(sorted(self.live))
        self.tier.delete(key(n))
        del self.live[n]
        return n

    def resize(self) -> None:
        """The same name, and other bytes."""
        if (n := self.delete()) is not None:
            self.put(n)

    def move(self) -> None:
        move = self.tier.relocate(EXTENT)
        if move is None:
            return
        scratch = page_aligned(EXTENT)
        for layer in range(LAYERS):
            self.tier.io.copy_extent(move, layer, scratch)
        self.tier.io.sync(move.target)
        self.tier.moved(move)
        n = int.from_bytes(move.run)
        self.live[n] = self.live[n][0], move.target.range
        self.moves += 1

    def write(self) -> None:
        """SQLite writes its log into the index."""
        self.tier.index._db.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        self.durable = dict(self.live)

    @property
    def survivors(self) -> set[int]:
        """Runs that the index names and whose bytes nothing has touched."""
        return {n for n, what in self.known.items() if self.live.get(n) == what}


def verdicts(tier: RunTier) -> dict[int, str]:
    """Of each run that the index names; wrong bytes are no verdict."""
    found: dict[int, str] = {}
    for place in tier.runs():
        n = int.from_bytes(place.run)
        found[n] = "exact"
        for layer, records in enumerate(blocks(n, place.identity.count)):
            try:
                got = tier.get(place.run, layer)
            except (ExtentCorrupt, ExtentMissing):
                found[n] = "refused"
            else:
                np.testing.assert_array_equal(got, records, f"run {n} has bytes of another")
    return found


@pytest.mark.parametrize("batch", range(3))
def test_rows_that_come_back_never_serve_the_bytes_of_another(tmp_path: Path, batch: int) -> None:
    met: Counter[str] = Counter()
    for seed in range(20 * batch, 20 * batch + 20):
        home = tmp_path / str(seed)
        home.mkdir()
        history = History(home, seed)
        cut = history.play(30)
        shutil.copytree(cut, home / "checked")
        here = use(cut, history)
        repair(home / "checked", history, here)
        met += here
        met["moves"] += history.moves
        met["orphans"] += len(history.live.keys() - history.known.keys())
    for kind in ("exact", "refused", "lost", "survived", "moves", "orphans"):
        assert met[kind] > 1, f"these histories hardly show what is {kind}: {met}"


def use(folder: Path, history: History) -> Counter[str]:
    """A daemon starts on what the cut has left."""
    met: Counter[str] = Counter()
    tier = open_tier(folder, ScriptedSystem())
    tier.check_integrity()
    found = verdicts(tier)
    met.update(found.values())
    met["lost"] += len(history.known.keys() - found.keys())
    met["survived"] += len(history.survivors)
    assert found.keys() <= history.known.keys()
    assert all(found.get(n) == "exact" for n in history.survivors), (
        f"seed {history.seed}: a whole run is lost"
    )
    cache = RunCache(tier, EXTENT)
    for n, verdict in found.items():
        if verdict == "refused":
            cache.discard(key(n))
    kept = {n: tier.locate(key(n)).identity.count for n, verdict in found.items() if verdict == "exact"}
    assert_tier(tier, kept)
    for n in range(100, 106):
        while True:
            try:
                put(tier, n, 1 + n % 5)
                break
            except TierFull:
                tier.delete(key(kept.popitem()[0]))
        kept[n] = 1 + n % 5
    assert_tier(tier, kept)
    tier.close()
    assert check(folder, repair=False).clean
    tier = open_tier(folder, ScriptedSystem())
    assert_tier(tier, kept)
    tier.close()
    return met


def repair(folder: Path, history: History, met: Counter[str]) -> None:
    """Somebody checks what the cut has left, and finds what the daemon has met."""
    report = check(folder, repair=True)
    assert not report.index
    assert len(report.lost) == met["lost"]
    assert len(report.damaged) == met["refused"]
    assert report.clean == (not met["lost"] and not met["refused"])
    assert check(folder, repair=False).clean
    tier = open_tier(folder, ScriptedSystem())
    found = verdicts(tier)
    assert set(found.values()) <= {"exact"}
    assert history.survivors <= found.keys()
    assert len(found) == report.runs - len(report.lost) - len(report.damaged)
    tier.close()
