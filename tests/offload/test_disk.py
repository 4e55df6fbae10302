"""The disk tier on real files: what is served, what is refused, and what survives a failing disk."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spilld.offload.disk.files.extent import HEADER_BYTES, HEADER_FIELDS, RunPlace
from spilld.offload.disk.index.index_row import Contents
from spilld.offload.errors import (
    BudgetTooSmall,
    ExtentCorrupt,
    ExtentMissing,
    FolderInUse,
    FolderUnusable,
    ReadError,
    TierFull,
    WriteFailed,
)
from spilld.offload.size import size
from spilld.offload.system import page_aligned

from .faults import Fault, ScriptedSystem, Short, error
from .run_tier import RunTier
from .tier_contract import BUDGET, FINGERPRINT, LAYERS, LAYOUT, LAYOUTS, assert_tier, blocks, chain, key, put

CHECKSUM_AT, CHECKSUM_SIZE = HEADER_FIELDS["checksum"]


@pytest.fixture
def system() -> ScriptedSystem:
    return ScriptedSystem(durable=True)


@pytest.fixture
def tier(tmp_path: Path, system: ScriptedSystem) -> Iterator[RunTier]:
    tier = open_tier(tmp_path / "kv", system)
    yield tier
    tier.check_integrity()
    tier.close()


def open_tier(folder: Path, system: ScriptedSystem, budget: int = BUDGET) -> RunTier:
    return RunTier(folder, budget, LAYOUTS, FINGERPRINT, system, segment_bytes=BUDGET // 3)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def segment_of(tmp_path: Path, place: RunPlace) -> Path:
    return tmp_path / "kv" / f"{place.range.segment:08}.segment"


def poke(path: Path, offset: int, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY)
    try:
        assert os.pwrite(file, data, offset) == len(data)
        os.fsync(file)
    finally:
        os.close(file)


def peek(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def seal_again(path: Path, offset: int, payload_bytes: int) -> None:
    """Make the checksum of a damaged extent right, as a careful forger would."""
    extent = peek(path, offset, HEADER_BYTES + payload_bytes)
    checksum = xxhash.xxh3_64_intdigest(extent[CHECKSUM_AT + CHECKSUM_SIZE :])
    poke(path, offset + CHECKSUM_AT, checksum.to_bytes(CHECKSUM_SIZE, "little"))


class TestDamage:
    def test_the_file_holds_what_the_format_says(self, tier: RunTier, tmp_path: Path) -> None:
        """Read by hand from the byte table in FORMAT.md, not by the code under test."""
        put(tier, 7, 3)
        place = tier.locate(key(7))
        for layer, records in enumerate(blocks(7, 3)):
            raw = peek(segment_of(tmp_path, place), place.offset(layer), place.identity.largest_extent)
            payload = 3 * LAYOUT.record_bytes
            assert raw[:8] == b"SPILLDKV"
            assert int.from_bytes(raw[8:16], "little") == xxhash.xxh3_64_intdigest(raw[16 : 256 + payload])
            numbers = [
                (16, 4),
                (20, 4),
                (24, 1),
                (25, 1),
                (26, 2),
                (28, 4),
                (32, 4),
                (36, 4),
                (40, 4),
                (44, 4),
            ]
            assert [int.from_bytes(raw[a : a + n], "little") for a, n in numbers] == [
                2, 256, 1, 0, 64, 1, 16, LAYOUT.record_bytes, LAYERS, layer,
            ]  # fmt: skip
            longs = [int.from_bytes(raw[a : a + 8], "little") for a in (48, 56, 64, 72)]
            assert longs == [7, 3, payload, len(raw)]
            assert raw[80:112] == FINGERPRINT
            assert raw[112:144] == chain(7)
            assert raw[144:160] == key(7)
            assert raw[160:256] == bytes(96)
            assert raw[256 : 256 + payload] == records.tobytes()
            assert not any(raw[256 + payload :])
            assert len(raw) % 4096 == 0
            assert place.offset(layer) % 4096 == 0

    @pytest.mark.parametrize("forged", [False, True], ids=["careless", "forged"])
    @pytest.mark.parametrize("field", HEADER_FIELDS)
    def test_every_header_field_is_verified(
        self, tier: RunTier, tmp_path: Path, field: str, forged: bool
    ) -> None:
        put(tier, 1)
        put(tier, 2)
        place = tier.locate(key(1))
        path, (at, size) = segment_of(tmp_path, place), HEADER_FIELDS[field]
        for byte in {0, size // 2, size - 1}:
            where = place.offset(1) + at + byte
            before = peek(path, where, 1)
            poke(path, where, bytes([before[0] ^ 0x10]))
            if forged and field != "checksum":
                seal_again(path, place.offset(1), place.identity.payload_bytes(1))
            with pytest.raises(ExtentCorrupt, match=field if field != "checksum" else "checksum"):
                tier.get(key(1), 1)
            poke(path, where, before)
            seal_again(path, place.offset(1), place.identity.payload_bytes(1))
        assert_tier(tier, {1: 2, 2: 2})

    def test_every_part_of_the_payload_is_verified(self, tier: RunTier, tmp_path: Path) -> None:
        put(tier, 1)
        place = tier.locate(key(1))
        path, payload = segment_of(tmp_path, place), place.identity.payload_bytes(0)
        for at in [0, 1, payload // 2, payload - 1, *range(13, payload, 211)]:
            where = place.offset(2) + HEADER_BYTES + at
            before = peek(path, where, 1)
            poke(path, where, bytes([before[0] ^ 1]))
            with pytest.raises(ExtentCorrupt, match="wrong checksum"):
                tier.get(key(1), 2)
            poke(path, where, before)
        assert_tier(tier, {1: 2})

    def test_extents_that_changed_places_are_not_served(self, tier: RunTier, tmp_path: Path) -> None:
        """Each is intact in itself: only identity can tell."""
        put(tier, 1)
        put(tier, 2)
        one, two = tier.locate(key(1)), tier.locate(key(2))
        path, nbytes = segment_of(tmp_path, one), one.identity.largest_extent
        layers = [peek(path, one.offset(layer), nbytes) for layer in range(LAYERS)]
        poke(path, one.offset(0), layers[1])
        with pytest.raises(ExtentCorrupt, match="layer"):
            tier.get(key(1), 0)
        poke(path, two.offset(1), layers[1])
        with pytest.raises(ExtentCorrupt, match="first block"):
            tier.get(key(2), 1)
        np.testing.assert_array_equal(tier.get(key(1), 2), blocks(1, 2)[2])

    def test_extents_of_another_model_are_not_served(self, tmp_path: Path) -> None:
        for name, fingerprint in (("ours", FINGERPRINT), ("theirs", bytes(32))):
            other = RunTier(tmp_path / name, BUDGET, LAYOUTS, fingerprint)
            put(other, 1)
            place = other.locate(key(1))
            raw = peek(tmp_path / name / "00000000.segment", place.offset(0), place.identity.largest_extent)
            if name == "ours":
                ours = raw
            else:
                poke(tmp_path / name / "00000000.segment", place.offset(0), ours)
                with pytest.raises(ExtentCorrupt, match="fingerprint"):
                    other.get(key(1), 0)
            other.close()

    @pytest.mark.parametrize("left", [0, 100, 4096, 4800])
    def test_a_truncated_file_is_corrupt_not_padded(self, tier: RunTier, tmp_path: Path, left: int) -> None:
        put(tier, 1)
        place = tier.locate(key(1))
        path = segment_of(tmp_path, place)
        whole = path.stat().st_size
        os.truncate(path, place.offset(1) + left)
        np.testing.assert_array_equal(tier.get(key(1), 0), blocks(1, 2)[0])
        for layer in (1, 2):
            with pytest.raises(ExtentCorrupt, match="ends"):
                tier.get(key(1), layer)
        os.truncate(path, whole)
        with pytest.raises(ExtentCorrupt, match={0: "magic", 100: "fingerprint"}.get(left, "checksum")):
            tier.get(key(1), 1)


class TestFaults:
    def test_short_and_interrupted_transfers_are_completed(
        self, tier: RunTier, system: ScriptedSystem
    ) -> None:
        parts: list[Fault] = [Short(4096), InterruptedError(), Short(100), Short(4200), None, Short(8191)]
        system.script["pwritev"].extend([*parts, *parts])
        put(tier, 1, 6)
        assert system.calls["pwritev"] > LAYERS + 6
        system.script["preadv"].extend([*parts, *parts])
        assert_tier(tier, {1: 6})
        assert not system.script["preadv"]

    @pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
    @pytest.mark.parametrize(
        ("call", "at"),
        [("pwritev", 0), ("pwritev", 2), ("fdatasync", 0), ("ftruncate", 0), ("fsync_folder", 0)],
    )
    def test_a_run_that_cannot_be_written_is_absent(
        self, tier: RunTier, system: ScriptedSystem, call: str, at: int, number: int
    ) -> None:
        system.script[call].extend([*[None] * at, error(number)])
        with pytest.raises(WriteFailed) as caught:
            put(tier, 1)
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == number
        assert_tier(tier, {})
        put(tier, 2)
        if call != "fsync_folder":
            system.script[call].extend([*[None] * at, error(number)])
            with pytest.raises(WriteFailed):
                put(tier, 3, 4)
        assert_tier(tier, {2: 2})
        with pytest.raises(ExtentMissing):
            tier.get(key(3), 0)
        put(tier, 1)
        put(tier, 3, 4)
        assert_tier(tier, {1: 2, 2: 2, 3: 4})

    def test_a_file_that_cannot_be_made_is_a_failed_write(
        self, tier: RunTier, system: ScriptedSystem
    ) -> None:
        system.script["open"].append(error(errno.EMFILE))
        with pytest.raises(WriteFailed):
            put(tier, 1)
        assert_tier(tier, {})

    def test_a_write_that_makes_no_progress_ends(self, tier: RunTier, system: ScriptedSystem) -> None:
        system.script["pwritev"].append(Short(0))
        with pytest.raises(WriteFailed, match="no more bytes"):
            put(tier, 1)
        assert_tier(tier, {})

    def test_a_failed_read_says_so_and_passes(self, tier: RunTier, system: ScriptedSystem) -> None:
        put(tier, 1)
        system.script["preadv"].append(error(errno.EIO))
        with pytest.raises(ReadError) as caught:
            tier.get(key(1), 0)
        assert isinstance(caught.value.__cause__, OSError)
        assert_tier(tier, {1: 2})

    def test_the_name_of_a_new_segment_is_synced_once(self, tier: RunTier, system: ScriptedSystem) -> None:
        for n in range(3):
            put(tier, n, 1)
        assert system.calls["fsync_folder"] == 1
        assert system.calls["fdatasync"] == 3

    @pytest.mark.parametrize("call", ["ftruncate", "unlink"])
    def test_a_file_that_will_not_shrink_stays_counted_and_is_used_again(
        self, tier: RunTier, system: ScriptedSystem, call: str
    ) -> None:
        put(tier, 1, 1)
        if call == "ftruncate":
            put(tier, 2, 1)
        used = tier.used_bytes
        system.script[call].append(error(errno.EIO))
        tier.delete(key(2 if call == "ftruncate" else 1))
        assert tier.used_bytes == used
        tier.check_integrity()
        put(tier, 3, 1)
        assert tier.used_bytes == used
        np.testing.assert_array_equal(tier.get(key(3), 1), blocks(3, 1)[1])


class TestLeases:
    def test_space_is_not_reused_while_somebody_reads(self, tier: RunTier) -> None:
        put(tier, 1)
        put(tier, 2)
        place = tier.locate(key(1))
        tier.hold(place)
        tier.hold(place)
        tier.delete(key(1))
        assert key(1) not in tier
        with pytest.raises(ExtentMissing):
            tier.hold(place)
        put(tier, 3)
        assert tier.locate(key(3)).range != place.range
        buffer = page_aligned(place.identity.largest_extent)
        np.testing.assert_array_equal(tier.io.read_extent(place, 1, buffer), blocks(1, 2)[1])
        tier.release(place)
        put(tier, 4)
        assert tier.locate(key(4)).range != place.range
        tier.release(place)
        put(tier, 5)
        assert tier.locate(key(5)).range == place.range
        with pytest.raises(ValueError, match="more often"):
            tier.release(place)
        assert_tier(tier, {2: 2, 3: 2, 4: 2, 5: 2})

    def test_a_reserved_run_is_not_there_yet(self, tier: RunTier) -> None:
        place = tier.reserve(key(1), first=1, count=2, chain_hash=chain(1))
        assert key(1) not in tier
        with pytest.raises(ExtentMissing):
            tier.locate(key(1))
        with pytest.raises(ExtentMissing):
            tier.delete(key(1))
        tier.abandon(place)
        for finish in (tier.abandon, tier.commit):
            with pytest.raises(ValueError, match="not waiting"):
                finish(place)
        assert tier.used_bytes == 0

    def test_a_run_abandoned_while_it_is_written_keeps_its_space_until_then(self, tier: RunTier) -> None:
        place = tier.reserve(key(1), first=1, count=2, chain_hash=chain(1))
        tier.hold(place)
        tier.abandon(place)
        assert tier.used_bytes == place.range.nbytes
        tier.check_integrity()
        tier.release(place)
        assert tier.used_bytes == 0


class TestFolder:
    def test_one_daemon_a_folder(self, tier: RunTier, tmp_path: Path) -> None:
        put(tier, 1)
        with pytest.raises(FolderInUse):
            RunTier(tmp_path / "kv", BUDGET, LAYOUTS, FINGERPRINT)
        assert_tier(tier, {1: 2})

    def test_it_is_private_and_clean(self, tmp_path: Path) -> None:
        tier = RunTier(tmp_path / "kv", BUDGET, LAYOUTS, FINGERPRINT)
        put(tier, 1)
        assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
        assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "kv").iterdir())
        segments = {"00000000.segment"}
        index = {"index.sqlite"}
        assert names(tmp_path / "kv") == {"lock", "index.sqlite-wal", "index.sqlite-shm"} | segments | index
        tier.close()
        assert names(tmp_path / "kv") == {"lock"} | segments | index
        open_tier(tmp_path / "kv", ScriptedSystem()).close()
        assert names(tmp_path / "kv") == {"lock"} | segments | index
        assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "kv").iterdir())

    def test_segments_that_no_row_names_are_collected_and_nothing_else(self, tmp_path: Path) -> None:
        folder = tmp_path / "kv"
        tier = open_tier(folder, ScriptedSystem())
        put(tier, 1)
        tier.close()
        for name in ("00000003.segment", "00000004.segment", "notes.txt", "x00000003.segment"):
            (folder / name).write_text("old")
        tier = open_tier(folder, ScriptedSystem())
        assert_tier(tier, {1: 2})
        tier.close()
        assert names(folder) == {
            "lock", "index.sqlite", "00000000.segment", "notes.txt", "x00000003.segment",
        }  # fmt: skip

    def test_bytes_behind_the_last_run_are_collected(self, tmp_path: Path) -> None:
        """A process that dies while it writes leaves a file longer than its runs."""
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        put(tier, 1)
        used = tier.used_bytes
        lost = tier.reserve(key(2), first=0, count=2, chain_hash=chain(2))
        assert lost.range.segment == 0
        tier.close()
        assert (tmp_path / "kv" / "00000000.segment").stat().st_size == used + lost.range.nbytes
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        assert tier.used_bytes == used
        put(tier, 2, 4)
        assert_tier(tier, {1: 2, 2: 4})
        tier.close()

    def test_a_folder_that_cannot_be_used_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for folder in (tmp_path / "no" / "parent", tmp_path / "file"):
            with pytest.raises(FolderUnusable, match=folder.name):
                RunTier(folder, BUDGET, LAYOUTS, FINGERPRINT)
        system = ScriptedSystem()
        system.script["pwritev"].append(error(errno.ENOSPC))
        with pytest.raises(FolderUnusable, match="No space"):
            open_tier(tmp_path / "kv", system)
        open_tier(tmp_path / "kv", system).close()

    def test_a_budget_below_one_block_is_refused(self, tmp_path: Path) -> None:
        smallest = LAYERS * 4096
        with pytest.raises(BudgetTooSmall):
            open_tier(tmp_path / "kv", ScriptedSystem(), smallest - 1)
        tier = open_tier(tmp_path / "kv", ScriptedSystem(), smallest)
        put(tier, 1, 1)
        with pytest.raises(TierFull):
            put(tier, 2, 1)
        assert_tier(tier, {1: 1})
        tier.close()

    def test_the_probe_agrees_with_the_file_system(self, tmp_path: Path) -> None:
        try:
            file = os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
            os.pwritev(file, [page_aligned(4096).data], 0)
            os.close(file)
            direct = True
        except OSError:
            direct = False
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        assert tier.direct is direct
        tier.close()

    def test_buffered_where_direct_is_refused(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        tier = open_tier(tmp_path / "kv", ScriptedSystem(direct=False))
        assert tier.direct is False
        assert "no O_DIRECT" in caplog.text
        put(tier, 1)
        assert_tier(tier, {1: 2})
        tier.close()


class TestReopening:
    def test_runs_holes_and_room_are_as_before(self, tmp_path: Path) -> None:
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        runs = {n: 2 + n % 2 for n in range(8)}
        for n, count in runs.items():
            put(tier, n, count)
        for n in (1, 3, 7):
            tier.delete(key(n))
            del runs[n]
        used, places = tier.used_bytes, {n: tier.locate(key(n)) for n in runs}
        for _ in range(3):
            tier.close()
            tier = open_tier(tmp_path / "kv", ScriptedSystem())
            assert_tier(tier, runs)
            assert tier.used_bytes == used
            assert {n: tier.locate(key(n)).range for n in runs} == {n: p.range for n, p in places.items()}
            assert {n: tier.locate(key(n)).identity for n in runs} == {
                n: p.identity for n, p in places.items()
            }
        for n in (1, 3):
            put(tier, n, 2 + n % 2)
        assert tier.used_bytes == used, "the holes were not found again"
        tier.close()

    def test_a_run_without_a_commit_is_absent(self, tmp_path: Path) -> None:
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        put(tier, 1)
        place = tier.reserve(key(2), first=2, count=2, chain_hash=chain(2))
        scratch = page_aligned(place.identity.largest_extent)
        for layer, records in enumerate(blocks(2, 2)):
            tier.io.write_extent(place, layer, records, np.arange(2), scratch)
        tier.io.sync(place)
        tier.close()
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        assert_tier(tier, {1: 2})
        assert key(2) not in tier
        tier.close()

    def test_a_deleted_run_stays_deleted(self, tmp_path: Path) -> None:
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        put(tier, 1)
        put(tier, 2)
        tier.delete(key(1))
        tier.close()
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        assert_tier(tier, {2: 2})
        assert key(1) not in tier
        tier.close()

    def test_a_lower_budget_takes_the_least_recently_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        clock = iter(range(1000, 2000))
        monkeypatch.setattr("spilld.offload.disk.tier.time.time", lambda: next(clock))
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        for n in range(6):
            put(tier, n, 4)
        for n in (5, 4, 0, 1, 2, 3):
            tier.touch([key(n)])
        whole = tier.used_bytes
        tier.close()
        open_tier(tmp_path / "kv", ScriptedSystem(), whole).close()
        assert not caplog.messages
        tier = open_tier(tmp_path / "kv", ScriptedSystem(), whole - 1)
        assert caplog.messages == [
            f"{tmp_path}/kv: {size(whole)} of KV is stored, and disk_budget is {size(whole - 1)}: what was "
            "not used for longest goes now, and is computed again when it is needed"
        ]
        assert_tier(tier, dict.fromkeys((0, 1, 2, 3, 4), 4))
        tier.close()
        tier = open_tier(tmp_path / "kv", ScriptedSystem(), tier.run_bytes(1))
        assert tier.runs() == []
        assert_tier(tier, {})
        tier.close()
        assert names(tmp_path / "kv") == {"lock", "index.sqlite"}

    def test_a_lower_budget_is_kept_though_a_file_will_not_shrink(self, tmp_path: Path) -> None:
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        put(tier, 1, 4)
        tier.close()
        system = ScriptedSystem()
        system.script["unlink"].append(error(errno.EIO))
        tier = open_tier(tmp_path / "kv", system, tier.run_bytes(1))
        assert tier.runs() == []
        with pytest.raises(TierFull):
            put(tier, 2, 6)
        tier.close()
        tier = open_tier(tmp_path / "kv", ScriptedSystem(), tier.run_bytes(1))
        put(tier, 3, 1)
        assert_tier(tier, {3: 1})
        tier.close()

    def test_runs_of_another_model_take_room_and_are_not_served(self, tmp_path: Path) -> None:
        tier = RunTier(tmp_path / "kv", BUDGET, LAYOUTS, bytes(32))
        put(tier, 1)
        theirs = tier.locate(key(1))
        tier.close()
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        assert tier.used_bytes == theirs.range.nbytes
        assert [place.identity for place in tier.runs()] == [theirs.identity]
        assert tier.locate(key(1)).identity.fingerprint != tier.fingerprint
        put(tier, 2)
        tier.delete(key(1))
        assert_tier(tier, {2: 2})
        tier.close()

    @pytest.mark.parametrize("what", ["segment", "part of a segment", "all segments"])
    def test_rows_without_bytes_are_misses(self, tmp_path: Path, what: str) -> None:
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        runs = dict.fromkeys(range(5), 4)
        for n in runs:
            put(tier, n, 4)
        places = {n: tier.locate(key(n)) for n in runs}
        assert len({place.range.segment for place in places.values()}) > 1
        tier.close()
        if what == "part of a segment":
            os.truncate(segment_of(tmp_path, places[1]), places[1].range.end - 1)
            lost = {
                n for n in runs if places[n].range.segment == 0 and places[n].range.end >= places[1].range.end
            }
        elif what == "segment":
            segment_of(tmp_path, places[0]).unlink()
            lost = {n for n in runs if places[n].range.segment == 0}
        else:
            for path in (tmp_path / "kv").glob("*.segment"):
                path.unlink()
            lost = set(runs)
        for _ in range(2):
            tier = open_tier(tmp_path / "kv", ScriptedSystem())
            assert_tier(tier, {n: 4 for n in runs if n not in lost})
            for n in lost:
                assert key(n) not in tier
            tier.close()
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        for n in lost:
            put(tier, n, 4)
        assert_tier(tier, runs)
        tier.close()

    @pytest.mark.parametrize("call", ["open", "ftruncate"])
    def test_a_folder_that_cannot_be_taken_over_is_let_go(self, tmp_path: Path, call: str) -> None:
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        for n in range(5):
            put(tier, n, 4)
        tier.close()
        open_files = set(Path("/proc/self/fd").iterdir())
        system = ScriptedSystem()
        system.script[call].extend([*[None] * (2 if call == "open" else 1), error(errno.EIO)])
        with pytest.raises(FolderUnusable):
            open_tier(tmp_path / "kv", system)
        assert set(Path("/proc/self/fd").iterdir()) == open_files
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        assert_tier(tier, dict.fromkeys(range(5), 4))
        tier.close()

    @pytest.mark.parametrize("field", HEADER_FIELDS)
    def test_damage_while_nobody_looked_is_never_served(self, tmp_path: Path, field: str) -> None:
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        put(tier, 1)
        put(tier, 2)
        place = tier.locate(key(1))
        at, size = HEADER_FIELDS[field]
        path = segment_of(tmp_path, place)
        for bit in range(8 * size) if size <= 8 else range(0, 8 * size, 13):
            tier.close()
            where = place.offset(1) + at + bit // 8
            before = peek(path, where, 1)
            poke(path, where, bytes([before[0] ^ 1 << bit % 8]))
            tier = open_tier(tmp_path / "kv", ScriptedSystem())
            with pytest.raises(ExtentCorrupt):
                tier.get(key(1), 1)
            poke(path, where, before)
        assert_tier(tier, {1: 2, 2: 2})
        tier.close()

    def test_damage_of_a_payload_while_nobody_looked_is_never_served(self, tmp_path: Path) -> None:
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        put(tier, 1)
        place = tier.locate(key(1))
        path, bits = segment_of(tmp_path, place), 8 * place.identity.payload_bytes(0)
        for bit in [0, 7, bits - 1, *range(3, bits, bits // 40)]:
            tier.close()
            where = place.offset(2) + HEADER_BYTES + bit // 8
            before = peek(path, where, 1)
            poke(path, where, bytes([before[0] ^ 1 << bit % 8]))
            tier = open_tier(tmp_path / "kv", ScriptedSystem())
            with pytest.raises(ExtentCorrupt, match="checksum"):
                tier.get(key(1), 2)
            poke(path, where, before)
        assert_tier(tier, {1: 2})
        tier.close()


class TestIndexFaults:
    """The index is on the same disk: what it cannot take does not exist."""

    def fail(self, *_: object) -> None:
        raise OSError(errno.ENOSPC, "database or disk is full")

    def test_a_run_that_the_index_does_not_take_is_absent(
        self, tier: RunTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(tier, 1)
        used = tier.used_bytes
        with monkeypatch.context() as patched:
            patched.setattr(tier.index, "add", self.fail)
            with pytest.raises(WriteFailed, match="in no index"):
                put(tier, 2)
        assert key(2) not in tier
        assert tier.used_bytes == used
        assert_tier(tier, {1: 2})
        put(tier, 2)
        assert_tier(tier, {1: 2, 2: 2})

    def test_a_real_full_index_is_a_failed_write(self, tmp_path: Path) -> None:
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        runs: dict[int, int] = {}
        ((pages,),) = tier.index._db.rows("PRAGMA page_count")
        tier.index._db.run(f"PRAGMA max_page_count = {pages + 1}")
        with pytest.raises(WriteFailed, match="full"):  # noqa: PT012
            for n in range(80):
                contents = Contents(chain(n), tuple(bytes([n, b]) * 16 for b in range(60)))
                tier.put(key(n), n, chain(n), blocks(n, 1), contents)
                runs[n] = 1
                if n > 20:
                    tier.delete(key(n - 20))
                    del runs[n - 20]
        assert runs
        assert_tier(tier, runs)
        tier.close()
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        assert_tier(tier, runs)
        put(tier, 100)
        assert_tier(tier, runs | {100: 2})
        tier.close()

    def test_a_row_that_cannot_be_removed_keeps_its_bytes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else it would come to name the bytes of another run."""
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        put(tier, 1)
        put(tier, 2)
        where = tier.locate(key(1)).range
        with monkeypatch.context() as patched:
            patched.setattr(tier.index, "remove", self.fail)
            tier.delete(key(1))
        assert key(1) not in tier
        put(tier, 3)
        assert tier.locate(key(3)).range != where
        tier.close()
        tier = open_tier(tmp_path / "kv", ScriptedSystem())
        assert_tier(tier, {1: 2, 2: 2, 3: 2})
        tier.close()

    def test_a_use_that_cannot_be_noted_is_no_error(
        self, tier: RunTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        put(tier, 1)
        with monkeypatch.context() as patched:
            patched.setattr(tier.index, "write_notes", self.fail)
            tier.touch([key(1)])
            tier.write_notes()
        assert "not noted" in caplog.text
        assert_tier(tier, {1: 2})


class DiskMachine(RuleBasedStateMachine):
    """Runs come and go on a disk that fails now and then and is damaged now and then. Daemons come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.home = tempfile.TemporaryDirectory()
        self.system = ScriptedSystem()
        self.tier = open_tier(Path(self.home.name) / "kv", self.system)
        self.runs: dict[int, int] = {}
        self.damaged: set[int] = set()
        self.held: list[tuple[int, int, RunPlace]] = []
        self.next = 0

    @rule(count=st.integers(1, 12), call=st.sampled_from(["", "", "", "pwritev", "fdatasync", "ftruncate"]))
    def put(self, count: int, call: str) -> None:
        n, self.next = self.next, self.next + 1
        if call:
            self.system.script[call].append(error(errno.EIO))
        try:
            put(self.tier, n, count)
            self.runs[n] = count
        except TierFull:
            assert self.tier.used_bytes + self.tier.run_bytes(count) > self.tier.budget_bytes
        except WriteFailed:
            assert call
        finally:
            self.system.script.clear()

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), call=st.sampled_from(["", "", "ftruncate", "unlink"]))
    def delete(self, data: st.DataObject, call: str) -> None:
        n = data.draw(st.sampled_from(sorted(self.runs)))
        if call:
            self.system.script[call].append(error(errno.EIO))
        self.tier.delete(key(n))
        self.system.script.clear()
        del self.runs[n]

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        n = data.draw(st.sampled_from(sorted(self.runs)))
        place = self.tier.locate(key(n))
        self.tier.hold(place)
        self.held.append((n, self.runs[n], place))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.tier.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))[2])

    @precondition(lambda self: self.runs.keys() - self.damaged)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        n = data.draw(st.sampled_from(sorted(self.runs.keys() - self.damaged)))
        place = self.tier.locate(key(n))
        where = place.offset(0) + data.draw(
            st.integers(0, HEADER_BYTES + place.identity.payload_bytes(0) - 1)
        )
        path = segment_of(Path(self.home.name), place)
        poke(path, where, bytes([peek(path, where, 1)[0] ^ 0x80]))
        self.damaged.add(n)

    @rule(
        call=st.sampled_from(["", "", "unlink", "ftruncate"]), budget=st.sampled_from([BUDGET, BUDGET // 2])
    )
    def reopen(self, call: str, budget: int) -> None:
        """Nothing is lost but what a lower budget has no room for; of a start that fails, nothing."""
        while self.held:
            self.tier.release(self.held.pop()[2])
        used = self.tier.used_bytes
        self.tier.close()
        folder = Path(self.home.name) / "kv"
        if call:
            self.system.script[call].append(error(errno.EIO))
            with suppress(FolderUnusable):
                open_tier(folder, self.system).close()
            self.system.script.clear()
        self.tier = open_tier(folder, self.system, budget)
        self.tier.check_integrity()
        assert self.tier.used_bytes <= min(used, budget)
        if used > budget:
            self.runs = {n: count for n, count in self.runs.items() if key(n) in self.tier}
            self.tier.close()
            self.tier = open_tier(folder, self.system)
        assert {place.run for place in self.tier.runs()} == {key(n) for n in self.runs}

    @invariant()
    def everything_intact_is_served_and_nothing_else(self) -> None:
        self.tier.check_integrity()
        assert self.tier.used_bytes <= self.tier.budget_bytes
        for n, count in self.runs.items():
            if n in self.damaged:
                with pytest.raises(ExtentCorrupt):
                    self.tier.get(key(n), 0)
            else:
                np.testing.assert_array_equal(self.tier.get(key(n), 0), blocks(n, count)[0])
            np.testing.assert_array_equal(self.tier.get(key(n), 2), blocks(n, count)[2])
        for n, count, place in self.held:
            buffer = page_aligned(place.identity.largest_extent)
            np.testing.assert_array_equal(self.tier.io.read_extent(place, 1, buffer), blocks(n, count)[1])

    def teardown(self) -> None:
        for _, _, place in self.held:
            self.tier.release(place)
        for n in self.runs:
            self.tier.delete(key(n))
        self.tier.check_integrity()
        self.tier.close()
        assert names(Path(self.home.name) / "kv") == {"lock", "index.sqlite"}
        self.home.cleanup()


DiskMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestDiskMachine = DiskMachine.TestCase
