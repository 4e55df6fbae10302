"""The index: what was added is found by its names, and damage of any kind is a miss, never another's KV."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spilld.offload.block_table import RunRef
from spilld.offload.disk.files.extent import ExtentIdentity
from spilld.offload.disk.files.segment import Range
from spilld.offload.disk.index.database import Database
from spilld.offload.disk.index.index import _CREATE, SCHEMA, Index
from spilld.offload.disk.index.index_row import Contents, IndexRow
from spilld.offload.errors import FolderInUse, IndexDamaged, ReadFailed
from spilld.offload.prefix_cache.block_hash import chain_hash, root
from spilld.offload.record import Element, Format, Layout
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import Bytes

from .run_tier import RunTier
from .tier_contract import BUDGET, FINGERPRINT, LAYERS, LAYOUT, LAYOUTS, key

MODEL = root(FINGERPRINT, LAYOUT.format)


def history(*words: int, parent: bytes = MODEL) -> list[bytes]:
    """Chain hashes of blocks 0, 1, ... one word each."""
    names = []
    for word in words:
        parent = chain_hash(parent, [word])
        names.append(parent)
    return names


NAMES = history(*range(40))


def entry(n: int, first: int, count: int, names: list[bytes] = NAMES, used: int = 0) -> IndexRow:
    """Run n: blocks [first, first + count) of a history."""
    end = first + count
    identity = ExtentIdentity(LAYOUTS, FINGERPRINT, key(n), names[end - 1], first, count)
    contents = Contents(names[first - 1] if first else MODEL, tuple(names[first:end]))
    return IndexRow(identity, Range(n, 4096 * n, 4096), contents, used)


def checkpoint(n: int, anchor: bytes, tokens: tuple[int, ...], used: int = 0) -> IndexRow:
    identity = ExtentIdentity(LAYOUTS.raw, FINGERPRINT, key(n), anchor, 0, 2)
    return IndexRow(identity, Range(n, 0, 8192), Contents(anchor, tokens=tokens), used)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite"


@pytest.fixture
def index(path: Path) -> Iterator[Index]:
    index = Index(path)
    yield index
    index.check_integrity()
    index.close()


class TestEntries:
    def test_what_was_added_is_there_after_a_restart(self, path: Path) -> None:
        index = Index(path)
        layouts = [
            Layout(form, element, kv_heads, head_dim)
            for form, element, kv_heads, head_dim in zip(
                Format,
                [*Element, *Element, Element.FLOAT32],
                (1, 2, 3, 8, 128),
                (16, 64, 80, 128, 256),
                strict=True,
            )
        ]
        added = []
        for n, layout in enumerate(layouts):
            kinds = StoreLayout((layout,) * (1 + n) + (replace(layout, kv_heads=9),) * (n % 2))
            identity = ExtentIdentity(kinds, bytes([n]) * 32, key(n), NAMES[5], 2**40 + n, 1 + n)
            contents = Contents(NAMES[n], tuple(NAMES[n : 2 * n + 1]))
            added.append(IndexRow(identity, Range(n, 4096 * n, 2**40), contents, 2**33 + n))
        for one in reversed(added):
            index.add(one)
        for _ in range(2):
            index.check_integrity()
            assert index.entries() == added
            assert [one.contents.name for one in index.entries()] == NAMES[: len(layouts)]
            assert [one.contents.parent for one in index.entries()] == NAMES[: len(layouts)]
            index.close()
            index = Index(path)
        index.close()

    def test_the_least_recently_used_comes_first(self, index: Index) -> None:
        for n, used in ((1, 30), (2, 10), (3, 20)):
            index.add(entry(n, n, 1, used=used))
        assert [one.identity.run for one in index.entries()] == [key(2), key(3), key(1)]
        index.touch([key(2), key(99)], 25)
        assert [(one.identity.run, one.used) for one in index.entries()] == [
            (key(3), 20),
            (key(2), 25),
            (key(1), 30),
        ]
        index.touch([], 99)
        assert [one.used for one in index.entries()] == [20, 25, 30]

    def test_a_run_is_added_once_and_as_a_whole(self, index: Index) -> None:
        index.add(entry(1, 1, 3))
        with pytest.raises(IndexDamaged):
            index.add(entry(1, 4, 2))
        assert index.holders(NAMES[4]) == []
        assert index.entries() == [entry(1, 1, 3)]

    def test_a_removed_run_leaves_nothing(self, index: Index) -> None:
        index.add(entry(1, 1, 3))
        index.add(entry(2, 1, 5))
        index.add(checkpoint(3, NAMES[3], (1,)))
        index.remove([key(1), key(3), key(99)])
        assert index.entries() == [entry(2, 1, 5)]
        assert index.holders(NAMES[2]) == [key(2)]
        assert index.checkpoints(NAMES[3]) == []
        index.check_integrity()
        index.remove([key(2)])
        for table in ("runs", "blocks", "checkpoints"):
            assert index._db.rows(f"SELECT count(*) FROM {table}") == [(0,)]

    def test_integrity_checks_notice(self, path: Path) -> None:
        index = Index(path)
        index.add(entry(1, 1, 3))
        index._db.run("DELETE FROM runs")
        with pytest.raises(AssertionError, match="3 blocks of runs"):
            index.check_integrity()
        index.close()

    def test_it_says_what_it_takes(self, index: Index, path: Path) -> None:
        index.add(entry(1, 1, 3))
        assert index.nbytes == sum(file.stat().st_size for file in path.parent.iterdir())


class TestChains:
    def test_across_runs(self, index: Index) -> None:
        index.add(entry(1, 1, 4))
        index.add(entry(2, 5, 3))
        index.add(entry(3, 8, 1))
        assert index.chain(NAMES[1:20], 1) == [
            RunRef(key(1), 1, 1, 4),
            RunRef(key(2), 5, 5, 3),
            RunRef(key(3), 8, 8, 1),
        ]

    def test_from_and_to_the_middle_of_a_run(self, index: Index) -> None:
        index.add(entry(1, 1, 4))
        index.add(entry(2, 5, 4))
        assert index.chain(NAMES[3:7], 3) == [RunRef(key(1), 1, 3, 2), RunRef(key(2), 5, 5, 2)]
        assert index.chain(NAMES[6:7], 6) == [RunRef(key(2), 5, 6, 1)]
        assert index.chain([], 6) == []

    def test_up_to_the_first_gap(self, index: Index) -> None:
        index.add(entry(1, 1, 2))
        index.add(entry(2, 4, 2))
        assert index.chain(NAMES[1:], 1) == [RunRef(key(1), 1, 1, 2)]
        assert index.chain(NAMES[3:], 3) == []

    def test_of_two_runs_with_a_block_the_one_that_goes_further(self, index: Index) -> None:
        index.add(entry(1, 1, 2))
        index.add(entry(2, 1, 6))
        index.add(entry(3, 1, 4))
        assert index.chain(NAMES[1:], 1) == [RunRef(key(2), 1, 1, 6)]
        index.add(entry(4, 3, 7))
        assert index.chain(NAMES[3:], 3) == [RunRef(key(4), 3, 3, 7)]
        assert index.chain(NAMES[1:], 1) == [RunRef(key(2), 1, 1, 6), RunRef(key(4), 3, 7, 3)]

    def test_a_fork_follows_its_own_branch(self, index: Index) -> None:
        other = [*NAMES[:4], *history(70, 71, 72, parent=NAMES[3])]
        index.add(entry(1, 1, 6))
        index.add(entry(2, 4, 3, other))
        assert index.chain(NAMES[1:10], 1) == [RunRef(key(1), 1, 1, 6)]
        assert index.chain(other[1:], 1) == [RunRef(key(1), 1, 1, 3), RunRef(key(2), 4, 4, 3)]

    @pytest.mark.parametrize("seed", range(5))
    def test_it_finds_what_a_dict_finds(self, index: Index, seed: int) -> None:
        choose = random.Random(seed)
        branches = [NAMES, *([*NAMES[:at], *history(*range(20), at, parent=NAMES[at - 1])] for at in (5, 9))]
        held: dict[bytes, set[int]] = {}
        for n in range(30):
            names = choose.choice(branches)
            first = choose.randrange(1, 20)
            count = choose.randint(1, 5)
            index.add(entry(n, first, count, names))
            for name in names[first : first + count]:
                held.setdefault(name, set()).add(n)
            if choose.random() < 0.3:
                gone = choose.randrange(n + 1)
                index.remove([key(gone)])
                for runs in held.values():
                    runs.discard(gone)
            for names in branches:
                first = choose.randrange(1, 15)
                found = index.chain(names[first:], first)
                at = first
                for stretch in found:
                    assert stretch.first == at
                    at += stretch.count
                    for block in range(stretch.first, at):
                        assert int.from_bytes(stretch.run, "big") in held[names[block]]
                assert not held.get(names[at]), "a chain ends before it must"
        index.check_integrity()

    def test_tenants_never_meet(self, index: Index) -> None:
        mine, theirs = (history(*range(10), parent=root(FINGERPRINT, "k8v4", t)) for t in (b"me", b"them"))
        assert not set(mine) & set(theirs)
        index.add(entry(1, 1, 9, mine))
        assert index.chain(theirs[1:], 1) == []
        assert index.chain(mine[1:], 1) == [RunRef(key(1), 1, 1, 9)]


class TestTails:
    def test_the_newest_first_with_their_tokens(self, index: Index) -> None:
        index.add(checkpoint(1, NAMES[3], (5, 6), used=10))
        index.add(checkpoint(2, NAMES[3], (), used=30))
        index.add(checkpoint(3, NAMES[3], (2**32 - 1, 0), used=20))
        index.add(checkpoint(4, NAMES[4], (9,), used=40))
        assert index.checkpoints(NAMES[3]) == [(key(2), []), (key(3), [2**32 - 1, 0]), (key(1), [5, 6])]
        assert index.checkpoints(NAMES[5]) == []

    def test_a_checkpoint_is_no_block(self, index: Index) -> None:
        index.add(checkpoint(1, NAMES[3], (5, 6)))
        assert index.chain(NAMES[1:], 1) == []
        assert index.chain(NAMES[3:], 3) == []
        assert index.holders(NAMES[3]) == []
        assert [one.contents for one in index.entries()] == [Contents(NAMES[3])]


# A tier over a damaged index.


def blocks(names: list[bytes], first: int, count: int) -> list[Bytes]:
    """What the model computes: records by the name of their block, uint8[count, record_bytes] a layer."""
    records = [
        np.random.default_rng(int.from_bytes(name)).integers(
            0, 256, (LAYERS, LAYOUT.record_bytes), dtype=np.uint8
        )
        for name in names[first : first + count]
    ]
    return list(np.stack(records, axis=1))


def put(tier: RunTier, n: int, first: int, count: int, names: list[bytes] = NAMES) -> None:
    end = first + count
    contents = Contents(names[first - 1], tuple(names[first:end]))
    tier.put(key(n), first, names[end - 1], blocks(names, first, count), contents)


def open_tier(folder: Path) -> RunTier:
    return RunTier(folder, BUDGET, LAYOUTS, FINGERPRINT, segment_bytes=BUDGET // 3)


OTHER = [*NAMES[:6], *history(*range(90, 110), parent=NAMES[5])]
PARTS = [
    (1, 1, 4, NAMES),
    (2, 5, 3, NAMES),
    (3, 8, 4, NAMES),
    (4, 6, 2, OTHER),
    (5, 8, 6, OTHER),
    (6, 3, 4, NAMES),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six runs of two histories, closed in good order."""
    tier = open_tier(tmp_path / "kv")
    for part in PARTS:
        put(tier, *part)
    tier.delete(key(6))
    tier.close()
    return tmp_path / "kv"


def served(folder: Path) -> int:
    """Open it, find both histories, and read all that is found: right or a miss; how many are right."""
    tier = open_tier(folder)
    right = 0
    try:
        for names in (NAMES, OTHER):
            at = 1
            for stretch in tier.index.chain(names[1:], 1):
                assert stretch.first == at
                at += stretch.count
                for layer in range(LAYERS):
                    try:
                        records = tier.get(stretch.run, layer)
                    except ReadFailed:
                        continue
                    start = stretch.first - stretch.base
                    assert 0 <= start <= len(records) - stretch.count
                    np.testing.assert_array_equal(
                        records[start : start + stretch.count],
                        blocks(names, stretch.first, stretch.count)[layer],
                    )
                    right += stretch.count
        tier.index.checkpoints(NAMES[3])
        tier.check_integrity()
        put(tier, 99, 30, 2)
        assert tier.index.chain(NAMES[30:], 30) == [RunRef(key(99), 30, 30, 2)]
        tier.delete(key(99))
    finally:
        tier.close()
    return right


ALL = LAYERS * (11 + 13)


class TestDamage:
    def test_undamaged(self, folder: Path) -> None:
        assert served(folder) == ALL
        assert served(folder) == ALL

    def once(self, folder: Path, content: bytes, log: bytes | None = None) -> int:
        """served, on a copy of the folder with this index."""
        copy = folder.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        (copy / "index.sqlite").write_bytes(content)
        if log is not None:
            (copy / "index.sqlite-wal").write_bytes(log)
        return served(copy)

    @pytest.mark.parametrize("seed", range(8))
    def test_a_flipped_bit_is_a_miss_at_most(self, folder: Path, seed: int) -> None:
        whole = (folder / "index.sqlite").read_bytes()
        pages = len(whole) // 4096
        choose = random.Random(seed)
        for page in range(pages):
            for _ in range(4):
                content = bytearray(whole)
                used = [at for at in range(page * 4096, page * 4096 + 4096) if whole[at]]
                at = choose.choice(used) if choose.random() < 0.8 else page * 4096 + choose.randrange(4096)
                content[at] ^= 1 << choose.randrange(8)
                self.once(folder, bytes(content))

    @pytest.mark.parametrize("seed", range(3))
    def test_noise_is_a_miss_at_most(self, folder: Path, seed: int) -> None:
        whole = (folder / "index.sqlite").read_bytes()
        choose = random.Random(seed)
        for page in range(len(whole) // 4096):
            size = choose.choice([8, 64, 512, 4096])
            at = page * 4096 + choose.randrange(4096 - size + 1)
            self.once(folder, whole[:at] + choose.randbytes(size) + whole[at + size :])

    def test_a_page_in_the_place_of_another_is_a_miss_at_most(self, folder: Path) -> None:
        whole = (folder / "index.sqlite").read_bytes()
        pages = [whole[at : at + 4096] for at in range(0, len(whole), 4096)]
        for a in range(len(pages)):
            for b in range(len(pages)):
                if a != b:
                    self.once(folder, b"".join([*pages[:a], pages[b], *pages[a + 1 :]]))

    def test_a_truncated_file_is_a_miss(self, folder: Path) -> None:
        whole = (folder / "index.sqlite").read_bytes()
        for left in [0, 1, 50, 100, *range(2000, len(whole), 2500), len(whole) - 1]:
            assert self.once(folder, whole[:left]) in (0, ALL), "lost, or nothing lay there"

    def test_no_index_is_a_miss(self, folder: Path) -> None:
        (folder / "index.sqlite").unlink()
        assert served(folder) == 0

    @pytest.mark.parametrize("seed", range(3))
    def test_a_damaged_log_is_a_miss_at_most(self, tmp_path: Path, seed: int) -> None:
        """A copy of the folder as kill -9 would leave it."""
        tier = open_tier(tmp_path / "kv")
        for part in PARTS:
            put(tier, *part)
        tier.delete(key(6))
        copy = tmp_path / "killed"
        shutil.copytree(tmp_path / "kv", copy)
        tier.close()
        (copy / "index.sqlite-shm").unlink()
        content, log = (copy / "index.sqlite").read_bytes(), (copy / "index.sqlite-wal").read_bytes()
        assert len(log) > 10_000
        assert self.once(copy, content, log) == ALL
        choose = random.Random(seed)
        lost = 0
        for _ in range(15):
            broken = bytearray(log)
            broken[choose.randrange(len(broken))] ^= 1 << choose.randrange(8)
            lost += self.once(copy, content, bytes(broken)) < ALL
            lost += self.once(copy, content, log[: choose.randrange(len(log))]) < ALL
        assert lost > 5

    @pytest.mark.parametrize(
        "change",
        [
            "segment = 7", "segment = -1", "segment = 'x'", "offset = offset + 4096", "offset = offset + 1",
            "offset = -4096", "offset = NULL", "offset = 1.5", "nbytes = nbytes + 4096", "nbytes = 0",
            "nbytes = x'00'", "format = 'int4'", "format = x'ff'", "format = 'exact'", "element = 'float16'",
            "shapes = x'030000000000000010000000'", "shapes = x'030000000200000010000000'",
            "shapes = 'many'", "shapes = x'030000000100000011000000'", "shapes = 0.5",
            "shapes = x'000000000100000010000000'", "shapes = x'ffffffff0100000010000000'",
            "shapes = x'040000000100000010000000'", "shapes = x''", "shapes = x'03'",
            "shapes = x'020000000100000010000000010000000100000020000000'",
            "fingerprint = x'00'", "fingerprint = zeroblob(32)", "fingerprint = 'text'",
            f"fingerprint = '{'a' * 32}'", "first = -1", "first = first + 1", "first = first - 1",
            "first = 'one'", "first = 9223372036854775807", "count = 0", "count = count + 1",
            "count = count - 1", "count = 4000000000000000000", "count = 2.5", "chain = zeroblob(32)",
            "chain = 7", "parent = 'x'", "used = 'never'",
        ],
    )  # fmt: skip
    def test_a_row_that_is_not_so_is_a_miss(self, folder: Path, change: str) -> None:
        db = Database(folder / "index.sqlite", SCHEMA, _CREATE)
        if "NULL" in change:
            db.run("PRAGMA ignore_check_constraints = 1")
            change = change.replace("NULL", "x''")
        assert db.run(f"UPDATE runs SET {change} WHERE run = ?", [key(2)]) == 1
        db.close()
        right = served(folder)
        assert right >= LAYERS * (4 + 4) or not right
        assert served(folder) == right

    def test_rows_of_blocks_that_are_elsewhere_are_a_miss(self, folder: Path) -> None:
        db = Database(folder / "index.sqlite", SCHEMA, _CREATE)
        db.run("UPDATE blocks SET run = ? WHERE run = ?", [key(3), key(2)])
        db.close()
        assert served(folder) == LAYERS * (4 + 4)

    def test_a_lone_run_before_the_beginning_of_its_file_is_lost(self, folder: Path) -> None:
        """No other row overlaps it there."""
        db = Database(folder / "index.sqlite", SCHEMA, _CREATE)
        assert db.run("UPDATE runs SET offset = -4096 WHERE run = ?", [key(5)]) == 1
        db.close()
        tier = open_tier(folder)
        assert {place.run for place in tier.runs()} == {key(n) for n in (1, 2, 3, 4)}
        tier.check_integrity()
        tier.close()

    def test_overlapping_rows_are_both_lost(self, folder: Path) -> None:
        db = Database(folder / "index.sqlite", SCHEMA, _CREATE)
        ((segment, offset),) = db.rows("SELECT segment, offset FROM runs WHERE run = ?", [key(1)])
        db.run("UPDATE runs SET segment = ?, offset = ? WHERE run = ?", [segment, offset, key(3)])
        db.close()
        tier = open_tier(folder)
        assert {place.run for place in tier.runs()} == {key(n) for n in (2, 4, 5)}
        tier.close()

    def test_a_foreign_index_names_nothing_here(self, folder: Path, tmp_path: Path) -> None:
        """Rows that lie within the files, but whose extents say something else."""
        other = open_tier(tmp_path / "other")
        for n, first, count, names in PARTS:
            put(other, n + 50, first, count, names)
        other.close()
        assert self.once(folder, (tmp_path / "other" / "index.sqlite").read_bytes()) == 0


def test_the_second_opener_is_refused_and_does_no_harm(folder: Path) -> None:
    tier = open_tier(folder)
    with pytest.raises(FolderInUse):
        open_tier(folder)
    assert {place.run for place in tier.runs()} == {key(n) for n in range(1, 6)}
    tier.check_integrity()
    tier.close()
    assert served(folder) == ALL


def test_a_folder_with_fifty_thousand_extents_opens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sparse files, real rows: a start looks at every row and at no extent."""
    import time

    layouts = StoreLayout.uniform(Layout(Format.K8V4, Element.BFLOAT16, 3, 64), 30)
    count, runs = 24, 1700
    identity = ExtentIdentity(layouts, FINGERPRINT, key(0), bytes(32), 1, count)
    nbytes = identity.run_bytes
    each = (256 << 20) // nbytes
    folder = tmp_path / "kv"
    budget = 2 * runs * nbytes
    RunTier(folder, budget, layouts, FINGERPRINT).close()
    index = Index(folder / "index.sqlite")
    index._db.run("PRAGMA synchronous = OFF")
    names = list(map(os.urandom, [32] * (count + 1)))
    for n in range(runs):
        place = Range(n // each, n % each * nbytes, nbytes)
        blocks = tuple(os.urandom(32) for _ in range(count))
        one = replace(identity, run=os.urandom(16), chain_hash=blocks[-1], first=1 + n % 10 * count)
        index.add(IndexRow(one, place, Contents(os.urandom(32), blocks), n))
        names = list(blocks)
    index.close()
    for number in range(-(-runs // each)):
        with (folder / f"{number:08}.segment").open("wb") as file:
            file.truncate(min(each, runs - number * each) * nbytes)
    began = time.perf_counter()
    tier = RunTier(folder, budget, layouts, FINGERPRINT)
    opened = time.perf_counter()
    assert len(tier.runs()) == runs
    assert tier.used_bytes == runs * nbytes
    first = 1 + (runs - 1) % 10 * count
    assert tier.index.chain(names, first)[0].count == count
    size = tier.index.nbytes
    tier.close()
    with capsys.disabled():
        extents = len(layouts) * runs
        print(f"\n{extents} extents, {runs * count} blocks, {size >> 20} MiB: {opened - began:.3f} s")
