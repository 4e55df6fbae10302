"""A store that is killed again and again: python torture.py FOLDER SEED LIVES [instants]

Each life opens the store in the folder, does random things, and dies by SIGKILL at a random system call or
transaction, or (instants) at a random moment. What it was told to be durable it wrote into a journal. After
one death, or several in a row, the folder is opened and held against the journal. What was written and not
synced is scrambled first in half of the cases, as a power cut would. One line of JSON a check; a failed
check ends the program with its traceback. The moment is random with threads, so a seed is a hint only.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from unittest.mock import patch

import numpy as np

from spilld.offload.archive.exported_runs import ExportedRuns
from spilld.offload.archive.imported_runs import ImportedRun, ImportedRuns
from spilld.offload.block_table import BlockTable
from spilld.offload.disk.files.extent import (
    RunKey,
    RunMove,
    RunPlace,
    largest_extent,
    run_bytes,
)
from spilld.offload.disk.index.database import Database
from spilld.offload.disk.index.index_row import Contents
from spilld.offload.disk.prefetch import Prefetcher
from spilld.offload.disk.spiller import Spiller
from spilld.offload.disk.tier import DiskTier
from spilld.offload.errors import ExtentMissing, TierFull
from spilld.offload.host.slab import HostSlab
from spilld.offload.maintenance.compaction import Compaction
from spilld.offload.maintenance.wear import WriteBudget
from spilld.offload.prefix_cache.block_hash import chain_hash, root
from spilld.offload.prefix_cache.run_cache import RunCache
from spilld.offload.record import Element, Format
from spilld.offload.store.disk_backend import DiskBackend
from spilld.offload.store.store import Store
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import (
    PAGE,
    Bytes,
    SystemCalls,
    page_aligned,
)

LAYOUTS = StoreLayout.of(Format.INT8, Element.FLOAT32, [(1, 1, 16), (1, 1, 32)])
LAYERS = len(LAYOUTS)
RUN = 4
CHECKPOINT_BLOCKS = 2
RUN_BYTES = run_bytes(LAYOUTS, RUN)
BUDGETS = [14 * RUN_BYTES, 14 * RUN_BYTES, 9 * RUN_BYTES]
DAILY = [None, None, 1000 * RUN_BYTES]
SEGMENT_BYTES = 9 * RUN_BYTES
COLUMNS = 16
FINGERPRINT = bytes(range(32))
ROOT = root(FINGERPRINT, LAYOUTS.format)
BLOCKS = 20
MOST_TICKS = 900
FAST = 1 << 40
"""Bytes a second of moves: whenever there is something to move."""


# What the model computes.


@lru_cache
def history(lineage: int) -> tuple[bytes, ...]:
    """Chain hashes of a sequence; each shares its beginning with sequence 0."""
    names: list[bytes] = []
    for block in range(BLOCKS):
        word = 0 if block < 3 * lineage else lineage
        names.append(chain_hash(names[-1] if names else ROOT, [word]))
    return tuple(names)


HISTORIES = range(6)


def noise(seed: bytes, layouts: StoreLayout) -> list[Bytes]:
    """Records that nothing but the seed has, uint8[record_bytes] for each layer."""
    generator = np.random.default_rng(int.from_bytes(blake2b(seed, digest_size=16).digest()))
    return [generator.integers(0, 256, nbytes, dtype=np.uint8) for nbytes in layouts.record_bytes]


@lru_cache(maxsize=1000)
def block(name: bytes) -> list[Bytes]:
    return noise(name, LAYOUTS)


def stacked(each: Iterable[list[Bytes]]) -> list[Bytes]:
    """Records of several blocks, uint8[blocks, record_bytes] for each layer."""
    return [np.stack(layer) for layer in zip(*each, strict=True)]


def checkpoint(anchor: bytes, tokens: Sequence[int]) -> list[Bytes]:
    """The numbers of a checkpoint, uint8[CHECKPOINT_BLOCKS, record_bytes] for each layer."""
    seeds = [anchor + json.dumps([list(tokens), n]).encode() for n in range(CHECKPOINT_BLOCKS)]
    return stacked(noise(seed, LAYOUTS.raw) for seed in seeds)


# Dying.


class Journal:
    """Lines that survive the process: each is one append."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, *words: object) -> None:
        line = json.dumps(words).encode() + b"\n"
        assert os.write(self._file, line) == len(line)


class Fate:
    """Death at a tick."""

    def __init__(self, journal: Journal, at: int) -> None:
        self.journal = journal
        self._left = at
        self._lock = threading.Lock()

    def tick(self, what: str) -> None:
        if self.comes(what):
            self.die()

    def comes(self, what: str) -> bool:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                moving = threading.current_thread().name == "spilld-move"
                self.journal.write("dies", what + " of a move" * moving)
            return self._left == 0

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


class MortalSystem(SystemCalls):
    """Every call may be the last, before or after it happened; a write also in its middle."""

    def __init__(self, fate: Fate) -> None:
        self.fate = fate
        self.paths: dict[int, str] = {}

    def open(self, path: Path, flags: int) -> int:
        self.fate.tick("before open")
        file = super().open(path, flags)
        self.paths[file] = path.name
        self.fate.tick("after open")
        return file

    def close(self, file: int) -> None:
        self.fate.tick("before close")
        super().close(file)

    def preadv(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.fate.tick("before preadv")
        return super().preadv(file, buffers, offset)

    def pwritev(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.fate.tick("before pwritev")
        self.fate.journal.write("wrote", self.paths[file], offset, len(buffers[0]))
        if self.fate.comes("in pwritev"):
            super().pwritev(file, [buffers[0][: len(buffers[0]) // 2 // PAGE * PAGE]], offset)
            self.fate.die()
        count = super().pwritev(file, buffers, offset)
        self.fate.tick("after pwritev")
        return count

    def fdatasync(self, file: int) -> None:
        """Nothing: the machine goes on. But from now on the data may not be scrambled."""
        self.fate.tick("before fdatasync")
        self.fate.journal.write("synced", self.paths[file])
        self.fate.tick("after fdatasync")

    def fsync_folder(self, folder: Path) -> None:
        self.fate.tick("before fsync_folder")

    def ftruncate(self, file: int, nbytes: int) -> None:
        self.fate.tick("before ftruncate")
        super().ftruncate(file, nbytes)
        self.fate.tick("after ftruncate")

    def unlink(self, path: Path) -> None:
        self.fate.tick("before unlink")
        super().unlink(path)
        self.fate.tick("after unlink")


@contextmanager
def mortal_transactions(fate: Fate) -> Iterator[None]:
    whole = Database.transaction

    @contextmanager
    def transaction(self: Database) -> Iterator[sqlite3.Connection]:
        fate.tick("before a transaction")
        with whole(self) as db:
            db.set_trace_callback(lambda statement: fate.tick("in a transaction"))
            try:
                yield db
            finally:
                db.set_trace_callback(None)
            fate.tick("before a commit")
        fate.tick("after a commit")

    with patch.object(Database, "transaction", transaction):
        yield


class JournalledTier(DiskTier):
    """Says what it is about to promise, and what it has promised."""

    journal: Journal

    def commit(self, *places: RunPlace) -> None:
        for place in places:
            contents = self._ledger.waiting(place).contents
            self.journal.write("committing", place.run.hex(), *describe(place, contents))
        super().commit(*places)
        for place in places:
            self.journal.write("committed", place.run.hex())

    def moved(self, move: RunMove) -> None:
        self.journal.write("moving")
        try:
            super().moved(move)
        except ExtentMissing:
            self.journal.write("stays")
            raise
        self.journal.write("moved")

    def delete(self, *runs: RunKey) -> None:
        for run in runs:
            self.journal.write("deleting", run.hex())
        super().delete(*runs)
        for run in runs:
            self.journal.write("deleted", run.hex())


def describe(place: RunPlace, contents: Contents) -> tuple[int, list[str], str, list[int] | None]:
    tokens = None if contents.tokens is None else list(contents.tokens)
    return place.identity.first, [name.hex() for name in contents.blocks], contents.parent.hex(), tokens


# A life.


class Life:
    """Random use of a store until fate, or some steps."""

    def __init__(self, folder: Path, fate: Fate, choose: random.Random) -> None:
        self.folder = folder
        self.fate = fate
        self.choose = choose
        self.serial = choose.getrandbits(30)
        self.open()

    def open(self) -> None:
        class Tier(JournalledTier):
            journal = self.fate.journal

        budget = self.choose.choice(BUDGETS)
        self.tier = Tier(
            *(self.folder, budget, LAYOUTS, FINGERPRINT, MortalSystem(self.fate)),
            segment_bytes=SEGMENT_BYTES,
        )
        extent = max(largest_extent(LAYOUTS, RUN), largest_extent(LAYOUTS.raw, CHECKPOINT_BLOCKS))
        self.cache = RunCache(self.tier, extent)
        padding = max(LAYOUTS.record_bytes)
        self.slab = HostSlab(COLUMNS * LAYOUTS.column_bytes + padding, LAYOUTS.record_bytes)
        daily = self.choose.choice(DAILY)
        wear = None if daily is None else WriteBudget(daily, self.tier.index)
        path = DiskBackend(
            *(self.tier, self.cache, Spiller(self.tier, extent), Prefetcher(self.tier, 4, extent, 1)),
            compaction=Compaction(self.tier, self.cache, extent, FAST, wear=wear),
            wear=wear,
        )
        self.store = Store(LAYOUTS, self.slab, RUN, path)
        self.spiller = path.spiller
        assert path.compaction is not None
        self.compaction = path.compaction
        self.sequences: list[tuple[BlockTable, tuple[bytes, ...]]] = []

    def run(self, steps: int) -> None:
        actions = [
            *(self.begin, self.begin, self.grow, self.grow, self.grow, self.save, self.write_behind),
            *(
                self.spill,
                self.save_checkpoint,
                self.read_checkpoint,
                self.wait,
                self.forget,
                self.discard,
                self.settle,
            ),
            *(self.thin_out, self.thin_out, self.compact, self.compact, self.arrive, self.depart),
        ]
        for _ in range(steps):
            with suppress(TierFull):
                self.choose.choice(actions)()
            self.store.check_integrity([table for table, _ in self.sequences])
            if self.choose.random() < 0.02:
                self.store.close()
                self.open()
        self.store.close()

    def begin(self) -> None:
        if len(self.sequences) == 3:
            return
        table, names = self.store.open(), history(self.choose.choice(HISTORIES))
        self.sequences.append((table, names))
        self.store.reserve(table, min(BLOCKS - 1, self.store.unreserved))
        refs = [ref for ref in self.store.find(names) if ref.blocks.stop - 1 <= table.reserved]
        if refs and self.choose.random() < 0.7:
            self.store.attach(table, refs, names[: refs[-1].blocks.stop])

    def grow(self) -> None:
        if not self.sequences:
            return
        table, names = self.choose.choice(self.sequences)
        start = len(table.chain)
        stop = min(start + self.choose.randint(1, 6), table.reserved + 1)
        self.store.settle()
        if stop > start:
            first = table.stop
            self.store.grow(table, names[start:stop])
            for n in range(first, table.stop):
                for layer, record in enumerate(block(names[n])):
                    self.store.records(layer)[table.rows[layer, n]] = record
            self.store.settle()

    def save(self) -> None:
        if self.sequences:
            self.store.save(self.choose.choice(self.sequences)[0])

    def write_behind(self) -> None:
        self.store.write_behind()

    def spill(self) -> None:
        for table, _ in self.sequences:
            if spans := table.host_spans():
                span = self.choose.choice(spans)
                self.store.spill(table, span.start, min(len(span), self.choose.randint(1, RUN)))

    def save_checkpoint(self) -> None:
        anchor = self.choose.choice(history(self.choose.choice(HISTORIES)))
        self.serial += 1
        self.store.checkpoints.save(anchor, [self.serial], 4, checkpoint(anchor, [self.serial]))

    def read_checkpoint(self) -> None:
        self.wait()
        for lineage in HISTORIES:
            for anchor in history(lineage)[:6]:
                for run, tokens in self.store.checkpoints.find(anchor)[:1]:
                    for layer, numbers in enumerate(self.store.checkpoints.read(run)):
                        assert (numbers == checkpoint(anchor, tokens)[layer]).all(), "another checkpoint"

    def wait(self) -> None:
        while self.spiller.pending:
            self.store._settle(self.spiller.wait(10))

    def compact(self) -> None:
        """Until nothing moves any more."""
        self.wait()
        self.store.settle()
        while self.store.writing:
            self.compaction.wait(10)
            self.store.settle()

    def settle(self) -> None:
        self.store.settle()

    def forget(self) -> None:
        if self.sequences:
            table, _ = self.sequences.pop(self.choose.randrange(len(self.sequences)))
            self.store.forget(table)

    def discard(self) -> None:
        used = {ref.run for table, _ in self.sequences for ref in table.runs} | self.cache._pins.keys()
        others = [place.run for place in self.tier.runs() if place.run not in used]
        if others:
            self.cache.discard(self.choose.choice(others))

    def arrive(self) -> None:
        """Runs from elsewhere: an import."""
        names, first = history(self.choose.choice(HISTORIES)), self.choose.randint(1, BLOCKS - 2 * RUN)
        parts = [
            ImportedRun(at, RUN, names[at + RUN - 1], Contents(names[at - 1], names[at : at + RUN]), LAYOUTS)
            for at in (first, first + RUN)
        ]
        arrival = ImportedRuns(self.store, parts)
        for place in arrival.places:
            at = place.identity.first
            for layer in range(LAYERS):
                arrival.write(place, layer, np.stack([block(name)[layer] for name in names[at : at + RUN]]))
        arrival.sync()
        arrival.commit()

    def depart(self) -> None:
        """Runs that are copied while others move and go: an export."""
        runs = [place.run for place in self.tier.runs() if self.tier.contents(place.run).blocks]
        departure = ExportedRuns(self.store, runs[:3])
        with suppress(TierFull):
            self.thin_out()
        self.compact()
        for run in runs[:3]:
            name = self.tier.contents(run).blocks[0]
            for layer in range(LAYERS):
                assert (departure.read(run, layer)[0] == block(name)[layer]).all(), "another's bytes leave"
        departure.end()

    def thin_out(self) -> None:
        """Leave holes between checkpoints, so that runs move from now on."""
        for _ in range(5):
            self.save_checkpoint()
        self.wait()
        for _ in range(3):
            self.discard()


def live(folder: Path, journal: Path, seed: int, instants: bool) -> None:
    """In a process of its own, which ends here whatever happens."""
    choose = random.Random(seed)
    fate = Fate(Journal(journal), 0 if instants else choose.randint(1, MOST_TICKS))
    if instants:
        # Nobody handles their signals. By the CPU's time a life gets as far on a machine that has much to do.
        clock = choose.choice((signal.ITIMER_REAL, signal.ITIMER_PROF))
        signal.setitimer(clock, choose.uniform(0.001, 0.25))
    status = 1
    try:
        with mortal_transactions(fate):
            Life(folder, fate, choose).run(60)
        status = 0
    finally:
        if status:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)


# Afterwards.


class Ledger:
    """What the journal says."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self.present: set[str] = set()
        self.perhaps: set[str] = set()
        self.known: dict[str, tuple[int, list[str], str, list[int] | None]] = {}
        self.unsynced: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.died = "in good order"
        self.moves = 0
        self.moving = False

    def catch_up(self) -> None:
        """Take in the lines of another life."""
        text = self._path.read_bytes() if self._path.exists() else b""
        self.unsynced.clear()
        self.moving = False
        self.died = "in good order"
        for line in text[self._read :].splitlines():
            self.note(*json.loads(line))
        self._read = len(text)

    def note(self, word: str, *values: object) -> None:
        match word, values:
            case "committing", (str(run), *description):
                self.known[run] = tuple(description)  # type: ignore[assignment]
                self.perhaps.add(run)
            case "committed", (str(run),):
                self.perhaps.discard(run)
                self.present.add(run)
            case "deleting", (str(run),):
                self.present.discard(run)
                self.perhaps.add(run)
            case "deleted", (str(run),):
                self.perhaps.discard(run)
            case "moving" | "stays", ():
                self.moving = word == "moving"
            case "moved", ():
                self.moving = False
                self.moves += 1
            case "wrote", (str(name), int(offset), int(nbytes)):
                self.unsynced[name].append((offset, nbytes))
            case "synced", (str(name),):
                self.unsynced.pop(name, None)
            case "dies", (str(what),):
                self.died = what + (" while the index takes a move" if self.moving else "")
            case _:
                raise AssertionError(f"the journal says {word} {values}")


def scramble(folder: Path, ledger: Ledger, choose: random.Random) -> None:
    """What was not synced may be anything after a power cut."""
    for name, ranges in ledger.unsynced.items():
        if not (folder / name).exists():
            continue
        file = os.open(folder / name, os.O_WRONLY)
        for offset, nbytes in ranges:
            end = min(offset + nbytes, os.fstat(file).st_size)
            if offset < end and choose.random() < 0.5:
                os.pwrite(file, choose.randbytes(end - offset), offset)
        os.close(file)


def check(folder: Path, ledger: Ledger) -> dict[str, object]:
    """Open the folder: it holds what was promised, byte for byte, and nothing else."""
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.segment")}
    assert sum(sizes.values()) <= max(BUDGETS), "the files outgrew the budget"
    tier = DiskTier(folder, max(BUDGETS), LAYOUTS, FINGERPRINT, segment_bytes=SEGMENT_BYTES)
    try:
        tier.check_integrity()
        assert tier.used_bytes == sum(path.stat().st_size for path in folder.glob("*.segment"))
        assert not list(folder.glob("*.damaged")), "the index was put aside"
        found = {place.run.hex(): place for place in tier.runs()}
        lost, foreign = ledger.present - found.keys(), found.keys() - ledger.present - ledger.perhaps
        assert not lost, f"{len(lost)} committed runs are gone"
        assert not foreign, f"{len(foreign)} runs are there that were deleted or never committed"
        for run, place in found.items():
            first, names, parent, tokens = ledger.known[run]
            assert place.identity.first == first
            wanted = (
                stacked(block(bytes.fromhex(name)) for name in names)
                if tokens is None
                else checkpoint(bytes.fromhex(parent), tokens)
            )
            for layer in range(LAYERS):
                found_here = tier.io.read_extent(place, layer, page_aligned(place.identity.largest_extent))
                assert (found_here == wanted[layer]).all(), "other bytes than were written"
            if tokens is not None:
                assert (place.run, tokens) in tier.index.checkpoints(bytes.fromhex(parent))
        served = check_chains(tier, found, ledger)
    finally:
        tier.close()
    undecided = ledger.perhaps & found.keys()
    result = {
        "died": ledger.died,
        "runs": len(found),
        "undecided": len(undecided),
        "served": served,
        "moves": ledger.moves,
    }
    ledger.present, ledger.perhaps, ledger.moves = set(found), set(), 0
    return result


def check_chains(tier: DiskTier, found: dict[str, RunPlace], ledger: Ledger) -> int:
    """What can be found by a history is that history's, and no shorter than what is there."""
    served = 0
    stored = {name for run in found for name in ledger.known[run][1]}
    for lineage in HISTORIES:
        names, at = history(lineage), 1
        for stretch in tier.index.chain(names[1:], 1):
            first, blocks, _, _ = ledger.known[stretch.run.hex()]
            assert stretch.first == at
            assert stretch.base == first
            start = stretch.first - stretch.base
            wanted = [name.hex() for name in names[at : at + stretch.count]]
            assert blocks[start : start + stretch.count] == wanted
            at += stretch.count
        assert at == BLOCKS or names[at].hex() not in stored, "a block that is stored is not found"
        served += at - 1
    return served


def main(folder: Path, seed: int, lives: int, instants: bool) -> None:
    choose = random.Random(seed)
    journal = folder.with_name(folder.name + ".journal")
    ledger = Ledger(journal)
    for _ in range(lives):
        life = choose.getrandbits(32)
        if not (child := os.fork()):
            live(folder, journal, life, instants)
        _, status = os.waitpid(child, 0)
        by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        assert status == 0 or by in (signal.SIGKILL, signal.SIGALRM, signal.SIGPROF), (
            f"life {life} failed: status {status}"
        )
        ledger.catch_up()
        if choose.random() < 0.5:
            scramble(folder, ledger, choose)
        if choose.random() < 0.6:
            print(json.dumps(check(folder, ledger) | {"signal": by, "life": life}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), "instants" in sys.argv[4:])
